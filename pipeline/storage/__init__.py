"""The only door to the street."""
