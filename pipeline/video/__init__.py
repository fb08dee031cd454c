"""A video becomes clips of planes: which clips (`clips`), cutting them in one pass (`cutting`), bytes to planes (`decode`)."""
