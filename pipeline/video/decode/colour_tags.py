"""Meaning of a frame's colour tags: libav's enumeration values become the name of a matrix, a range, and SDR or HDR.

Planes stay YUV: the matrix is only named here, the encoder applies it. Part of the decode package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import PolicyReject

# ITU-T H.273 code points, which libav uses.
RGB, BT709, UNSPECIFIED, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020NC, BT2020C = 0, 1, 2, 4, 5, 6, 7, 9, 10
PQ, HLG = 16, 18
RANGES = {0: "untagged", 1: "limited", 2: "full"}
HD_LINES = 720
XYZ, BAYER = "xyz12", "bayer_"

MATRICES = {BT709: "bt709", BT470BG: "bt601", SMPTE170M: "bt601", BT2020NC: "bt2020nc"}
# Treated as a matrix whose coefficients differ by less than 0.02, with a warning.
NEIGHBOURS = {FCC: ("bt601", "fcc"), SMPTE240M: ("bt709", "smpte240m"), BT2020C: ("bt2020nc", "bt2020c")}


@dataclass(frozen=True, slots=True)
class Colour:
    """Resolved colour of a video. `transfer` is "pq" or "hlg" for HDR, else "sdr"."""

    matrix: str
    range: str
    transfer: Literal["sdr", "pq", "hlg"]
    warnings: tuple[str, ...]


def rgb_matrix(pixel_format: Any) -> str | None:
    """The matrix with which swscale converts this format (PyAV's `VideoFormat`) to YUV; None if it is YUV or grey already.

    Palettes and CIE XYZ count as RGB here, although libav does not say so. Raw sensor data always becomes BT.601.
    """
    if str(pixel_format.name).startswith(BAYER):
        return "bt601"
    return "bt709" if pixel_format.is_rgb or pixel_format.has_palette or pixel_format.name.startswith(XYZ) else None


def resolve(
    matrix: int,
    color_range: int,
    transfer: int,
    lines: int,
    rgb: str | None,
    untagged: Literal["auto", "bt601", "bt709"],
) -> Colour:
    """Resolves the colour of a video. `lines` is the coded height, `rgb` the frames' `rgb_matrix`.

    Raises:
        PolicyReject: `color_matrix`, for a matrix that is not near one of `MATRICES` (YCgCo, ICtCp, …).
    """
    warnings: tuple[str, ...] = ()
    if rgb:
        name = rgb
    elif matrix in MATRICES:
        name = MATRICES[matrix]
    elif matrix in NEIGHBOURS:
        name, tag = NEIGHBOURS[matrix]
        warnings = (f"color_matrix:{tag}~{name}",)
    elif matrix in (UNSPECIFIED, RGB):  # YUV tagged as RGB: a muxer that writes 0 for unknown
        name = untagged if untagged != "auto" else "bt709" if lines >= HD_LINES else "bt601"
        warnings = (f"untagged_color:{name}",)
    else:
        raise PolicyReject(
            "color_matrix", f"colour matrix {matrix} (H.273) is not one of BT.601, BT.709, BT.2020", stage="decode"
        )
    return Colour(name, RANGES.get(color_range, "untagged"), transfer_kind(transfer), warnings)


def refuse_dolby_vision(profile: int, compatibility: int) -> None:
    """Refuses Dolby Vision whose base layer is IPT-PQ-c2, which no tag of the stream says: shown as YUV it is green and purple.

    Profile 5 has no other base layer; profiles 10 (AV1) and 20 (MV-HEVC) have it with compatibility id 0.

    Raises:
        PolicyReject: `color_matrix`.
    """
    if profile == 5 or (profile in (10, 20) and compatibility == 0):
        message = f"Dolby Vision profile {profile} has the colours IPT-PQ-c2, expected BT.601, BT.709 or BT.2020; convert it to BT.709"
        raise PolicyReject("color_matrix", message, stage="decode")


def transfer_kind(transfer: int) -> Literal["sdr", "pq", "hlg"]:
    """The kind of an H.273 transfer characteristic."""
    return "pq" if transfer == PQ else "hlg" if transfer == HLG else "sdr"
