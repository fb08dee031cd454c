"""Colour of still images: a loaded Pillow image of any mode becomes 8-bit sRGB without transparency.

An embedded ICC profile is applied (relative colorimetric, with black point compensation). 16 bits become 8: grey is rounded, colour is cut,
as Pillow reads it. Transparent pixels show a background. What was decided is in warnings for the row. Like in video, colour without a
profile is taken for sRGB.
"""

from __future__ import annotations

from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipeline.errors import PolicyReject

SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # of TIFF
WITH_ALPHA = {"RGBA": "RGB", "LA": "L"}
PROFILED = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # mode -> colour space of its profiles
ROUNDING = 1  # levels by which the conversion of sRGB to itself may be off
PQ, HLG = 16, 18  # ITU-T H.273
NCLX, CICP = b"colrnclx", b"cICP"  # AVIF and PNG: primaries, transfer, matrix follow; two bytes each, or one
PNG_GREY, PNG_RGB = 0, 2  # colour types
HEADER_BYTES = 64 * 1024  # colour is described before the pixels


def srgb(image: Image.Image, background: tuple[int, int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """uint8 `(H, W, 3)` in sRGB, and warnings: `icc_profile`, `bad_icc_profile`, `no_cmyk_profile`, `alpha`.

    Raises:
        PolicyReject: `pixel_format`, for values without a known range (32 bits, floating point).
        OSError, ValueError, MemoryError: Pillow cannot convert the image.
    """
    profile = image.info.get("icc_profile")
    warnings: list[str] = []
    image = _eight_bits(image)
    alpha = None
    if image.mode in WITH_ALPHA:
        alpha = image.getchannel("A")
        image = image.convert(WITH_ALPHA[image.mode])
    if profile:
        converted = _by_profile(image, profile)
        if converted is None:
            warnings.append("bad_icc_profile")
        elif converted is not image:
            warnings.append("icc_profile")
            image = converted
    elif image.mode == "CMYK":
        warnings.append("no_cmyk_profile")
    image = image.convert("RGB")
    if alpha is not None and alpha.getextrema()[0] != 255:
        below = Image.new("RGB", image.size, background)
        below.paste(image, mask=alpha)
        image = below
        warnings.append(f"alpha:#{bytes(background).hex()}")
    return np.asarray(image), tuple(warnings)


def transfer(head: bytes) -> str | None:
    """`pq` or `hlg` if the first `HEADER_BYTES` of an AVIF or PNG file declare it, else None."""
    for mark, at in ((NCLX, 3), (CICP, 1)):
        start = head.find(mark)
        if start >= 0 and start + len(mark) + at < len(head):
            return {PQ: "pq", HLG: "hlg"}.get(head[start + len(mark) + at])
    return None


def scale_transparent_value(image: Image.Image, head: bytes) -> None:
    """Gives the transparent value of an opened PNG that begins with `head` the range of its pixels, which Pillow converts to 8 bits."""
    value = image.info.get("transparency")
    bits, kind = head[(at := head.find(b"IHDR") + 12) : at + 2]
    if kind == PNG_GREY and bits in (2, 4, 8) and isinstance(value, int):
        most = (1 << bits) - 1
        image.info["transparency"] = (value & most) * 255 // most
    elif kind == PNG_RGB and bits == 16 and isinstance(value, tuple):  # Pillow keeps the upper 8
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L, LA, RGB, RGBA, CMYK or LAB."""
    if image.mode in SIXTEEN_BITS:
        return _from_sixteen_bits(image)
    if image.mode in ("I", "F"):
        message = f"values of Pillow's mode {image.mode} have no known range; convert the image to 8 or 16 bits"
        raise PolicyReject("pixel_format", message, stage="decode")
    if image.info.get("transparency") is not None or image.mode in ("PA", "RGBa"):
        return image.convert("RGBA")
    if image.mode == "La":
        return image.convert("LA")
    if image.mode in (*WITH_ALPHA, *PROFILED):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits in mode L, or LA if a value is transparent. Pillow gives 12 bits and grey with white as 0 as the file has them."""
    tags = getattr(image, "tag_v2", {})
    most = (1 << int(np.ravel(tags.get(BITS_PER_SAMPLE, 16))[0])) - 1
    values_HW = np.asarray(image).astype(np.uint32)
    grey_HW = ((values_HW * 255 + most // 2) // most).astype(np.uint8)
    grey = Image.fromarray(255 - grey_HW if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey_HW)
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values_HW == transparent, 0, 255).astype(np.uint8)))
    return grey


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB, itself if the profile is sRGB; None if the profile cannot be read or is of another kind of image."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if source.profile.xcolor_space.strip() != PROFILED[image.mode]:
            return None
        to_srgb = _transform(source, image.mode)
        if image.mode == "RGB" and _is_identity(to_srgb):
            return image
        return to_srgb.apply(image)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _transform(source: Any, mode: str) -> Any:
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    return ImageCms.ImageCmsTransform(source, target, mode, "RGB", intent, flags=flags)


def _is_identity(to_srgb: Any) -> bool:
    """Whether a profile is sRGB but for rounding: its pixels then stay as they are, as those of a video do."""
    grid = _grid()
    moved = np.asarray(to_srgb.apply(grid)).astype(np.int16) - np.asarray(grid)
    return bool(np.abs(moved).max() <= ROUNDING)


@cache
def _grid() -> Image.Image:
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    cube_NNN3 = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
    return Image.fromarray(cube_NNN3.reshape(18, -1, 3))
