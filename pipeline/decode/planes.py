"""A decoded frame becomes uint8 YUV 4:4:4 planes of a bucket's size. Part of the decode room.

Enters: a libav frame, where it goes (`Geometry`), how it is held (`Orientation`). Leaves: planes written into a given
array.

One swscale pass, bicubic, straight to limited-range yuv444p: 3.6x cheaper than its RGB path and 10 dB closer to the
exact resize.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from pipeline.decode.container import damage
from pipeline.decode.tonemap import to_sdr

# Accurate rounding removes swscale's bias of -0.2/255; bit-exact makes all CPUs agree. Together 0.05 ms at 256x256.
BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a frame goes, in pixels as shown: scaled to cover, then a `height` x `width` window cut at (`top`,
    `left`).
    """

    scaled_height: int
    scaled_width: int
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Orientation:
    """How stored rows become shown rows: transpose first, then flips. All eight cases of a display matrix."""

    transpose: bool = False
    flip_rows: bool = False  # top <-> bottom
    flip_columns: bool = False  # left <-> right

    @classmethod
    def of(cls, frame: Any) -> Orientation:
        """From the frame's display matrix, if it has one. A tilt is taken as the nearest right angle.

        `frame.rotation` is not enough: it reads a mirror image as half a turn.
        """
        data = frame.side_data.get("DISPLAYMATRIX")
        if data is None or data.buffer_size < 36:
            return cls()
        # Native int32 (a b u, c d v, x y w): a stored point (x, y) is shown at (a x + c y, b x + d y).
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data)[:36])
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    @property
    def rotation(self) -> int:
        """Degrees clockwise, after undoing a mirror image if there is one."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    @property
    def mirrored(self) -> bool:
        """Whether left and right are exchanged besides the rotation."""
        return self.transpose == (self.flip_rows == self.flip_columns)

    def show(self, plane: np.ndarray) -> np.ndarray:
        """A view of `plane` as it is to be seen."""
        if self.transpose:
            plane = plane.T
        return plane[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


class Scaler:
    """Writes frames of one video as planes. Keeps one swscale context (a context per call leaks time, PyAV#1935)."""

    def __init__(self, orientation: Orientation, transfer: str) -> None:
        self._orientation = orientation
        self._transfer = transfer
        self._reformatter = VideoReformatter()

    def write(self, frame: Any, geometry: Geometry, out_3HW: np.ndarray) -> None:
        """Fills `out_3HW` (uint8, `3 x geometry.height x geometry.width`) with limited-range Y, U, V.

        Raises:
            DamagedInput: `corrupt_stream`, when libav cannot convert the frame.
        """
        size = geometry.scaled_width, geometry.scaled_height
        width, height = size[::-1] if self._orientation.transpose else size
        hdr = self._transfer != "sdr"
        with damage("corrupt_stream", "scaling a frame"):
            picture = self._reformat(frame, width, height, "yuv444p16le" if hdr else "yuv444p")
        rows = slice(geometry.top, geometry.top + geometry.height)
        columns = slice(geometry.left, geometry.left + geometry.width)
        target_3HW = np.empty(out_3HW.shape, np.uint16) if hdr else out_3HW
        for channel, plane in enumerate(picture.planes):
            # Lines are padded to `line_size` bytes.
            values = np.frombuffer(plane, np.uint16 if hdr else np.uint8)
            values = values.reshape(height, plane.line_size // values.itemsize)[:, :width]
            target_3HW[channel] = self._orientation.show(values)[rows, columns]
        if hdr:
            out_3HW[:] = to_sdr(target_3HW, 16, self._transfer)

    def _reformat(self, frame: Any, width: int, height: int, pixel_format: str) -> Any:
        # The same matrix on both sides: swscale must not convert between matrices. From RGB it makes BT.709 YUV.
        source = None if frame.format.is_rgb else Colorspace.ITU709
        return self._reformatter.reformat(
            frame,
            width,
            height,
            pixel_format,
            src_colorspace=source,
            dst_colorspace=Colorspace.ITU709,
            interpolation=BICUBIC,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
