"""Orientation of a video: a frame's display matrix as a transpose and two flips; its displayed size. Part of the decode package."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from pipeline.video.decode.container import damage
from pipeline.video.decode.filtering import FilterChain

SANE_ASPECT = 16.0  # a sample aspect ratio beyond this (or its inverse) is a broken header
MATRIX_BYTES = 36
MATRIX_TYPE = 6  # AV_FRAME_DATA_DISPLAYMATRIX
OTHER_TYPES = [number for number in range(64) if number != MATRIX_TYPE]  # libav 8.1 has 35


@dataclass(frozen=True, slots=True)
class Orientation:
    """A transpose, then flips: the eight cases of a display matrix."""

    transpose: bool = False
    flip_rows: bool = False  # top <-> bottom
    flip_columns: bool = False  # left <-> right

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """The orientation in the frame's display matrix, if it has one. Other angles are rounded to multiples of 90 degrees.

        `frame.rotation` is not enough: it reads a mirror image as a rotation by 180 or 0 degrees. Raises libav's errors.
        """
        data = _display_matrix(frame)
        if len(data) < MATRIX_BYTES:
            return cls()
        # Native int32 (a b u, c d v, x y w): a stored point (x, y) is displayed at (a x + c y, b x + d y).
        a, b, _, c, d, *_ = struct.unpack("=9i", data[:MATRIX_BYTES])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    @property
    def rotation(self) -> int:
        """Degrees clockwise, without the mirroring if there is one."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged, in addition to the rotation."""
        return self.transpose == (self.flip_rows == self.flip_columns)

    def show(self, plane: np.ndarray) -> np.ndarray:
        """A view of `plane` (H, W) as it is displayed."""
        if self.transpose:
            plane = plane.T
        return plane[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


def _display_matrix(frame: Any) -> bytes:
    """The bytes of the frame's display matrix; empty if it has none.

    PyAV 18.1's `frame.side_data` wraps all entries at once. It raises ValueError for types it does not know (EXIF, the view of spatial
    video), and frees an entry's metadata (the name of an ICC profile), which the frame frees again: a crash later. So libav's filters first
    remove everything but the matrix. 0.2 ms for a frame without one, 1 ms with.
    """
    held = FilterChain(frame, [("sidedata", f"mode=select:type={MATRIX_TYPE}")]).apply(frame)
    if held is None:
        return b""
    alone = FilterChain(held, [("sidedata", f"mode=delete:type={number}") for number in OTHER_TYPES]).apply(held)
    return bytes(alone.side_data[-1]) if alone is not None and len(alone.side_data) else b""


def display_size(stream: Any, size: tuple[int, int], orientation: Orientation) -> tuple[int, int, tuple[int, int]]:
    """Displayed width and height of a stored picture of `size` (width, height), and the sample aspect ratio that was applied.

    Raises DamagedInput, `undecodable`.
    """
    with damage("undecodable", "reading the sample aspect ratio"):
        ratio = sane_aspect(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio) or Fraction(1)
    width, height = max(1, round(size[0] * ratio.numerator / ratio.denominator)), size[1]
    if orientation.transpose:
        width, height = height, width
    return width, height, (ratio.numerator, ratio.denominator)


def sane_aspect(ratio: Fraction | None) -> Fraction | None:
    """A sample aspect ratio, or None if it is unknown or absurd."""
    return ratio if ratio and 1 / SANE_ASPECT <= ratio <= SANE_ASPECT else None
