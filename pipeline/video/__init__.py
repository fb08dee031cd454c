"""A video becomes clips of planes.

- `clips`: which clips a video gives
- `cutting`: cuts them in one pass, inside a decoder process
- `decode`: bytes to frames
"""
