"""First frame of a clip as a lossless image file: WebP, or PNG where a side is beyond what WebP holds.

Takes limited-range uint8 planes as the network gets them; gives the bytes of an RGB image. Made in decoder processes, because compressing a
frame takes longer than encoding it on a GPU.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

WEBP_SIDE = 16_383  # pixels
EFFORT = 0  # of 0 to 6; see docs/i2v.md
LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020nc": (0.2627, 0.0593)}
"""Kr and Kb of each matrix, as `model.colour` has them: decoders do not import torch."""


def lossless_image(planes_3HW: np.ndarray, matrix: str) -> bytes:
    """uint8 YUV 4:4:4 planes, limited range, as a WebP or PNG file of 8 bits a channel."""
    height, width = planes_3HW.shape[1:]
    picture = Image.fromarray(rgb_of(planes_3HW, matrix))
    out = io.BytesIO()
    if max(height, width) <= WEBP_SIDE:
        picture.save(out, "WEBP", lossless=True, method=EFFORT, quality=0, exact=True)
    else:
        picture.save(out, "PNG", compress_level=1)
    return out.getvalue()


def rgb_of(planes_3HW: np.ndarray, matrix: str) -> np.ndarray:
    """The planes as uint8 RGB `(H, W, 3)`, rounded to nearest: what the network sees before it is scaled to its range."""
    kr, kb = LUMA[matrix]
    kg = 1 - kr - kb
    y, u, v = planes_3HW.astype(np.float32)
    y, u, v = (y - 16) * np.float32(255 / 219), (u - 128) * np.float32(255 / 224), (v - 128) * np.float32(255 / 224)
    rgb_HW3 = np.empty((*y.shape, 3), np.float32)
    rgb_HW3[..., 0] = y + v * np.float32(2 * (1 - kr))
    rgb_HW3[..., 1] = y - u * np.float32(2 * (1 - kb) * kb / kg) - v * np.float32(2 * (1 - kr) * kr / kg)
    rgb_HW3[..., 2] = y + u * np.float32(2 * (1 - kb))
    return np.rint(rgb_HW3).clip(0, 255).astype(np.uint8)
