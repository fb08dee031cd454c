"""The driver of a build: what is to do, who does it, what failed."""
