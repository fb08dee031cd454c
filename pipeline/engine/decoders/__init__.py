"""Decoder processes and the thread that feeds them."""
