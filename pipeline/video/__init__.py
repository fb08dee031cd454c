"""Videos and images as clips of YUV planes.

- `clips`, `crops`, `black_bars`: which clips are cut from a video; which part of the frame their variants show; letterboxes
- `spans`: annotated spans as places of the video
- `cutting`, `chunks`: cuts them in one pass, inside a decoder process; the chunks of their frames
- `members`: paired videos, cut as the main one; masks at latent resolution
- `first_frame`: the first frame of a clip as an image file
- `decode`: encoded bytes to frames
- `images`, `image_colour`, `image_rules`: still images and animations that Pillow decodes; their colour as sRGB; sizes of images
"""
