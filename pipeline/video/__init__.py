"""Videos as clips of YUV planes.

- `clips`: which clips are cut from a video
- `cutting`: cuts them in one pass, inside a decoder process
- `decode`: encoded bytes to frames
"""
