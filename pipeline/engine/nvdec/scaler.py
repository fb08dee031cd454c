"""Scaling of NV12 frames in device memory to uint8 YUV 4:4:4 planes of a bucket's size, with the bits of `Scaler` (swscale on the CPU).

Each direction is a product with a matrix of small integers (`bicubic`). The products run in float32, which is exact here: sums of products
stay below 2^24, in any order of addition. Frames come by DLPack, without a copy; only the planes of the window leave the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch.utils.dlpack import from_dlpack

from pipeline.engine.nvdec import bicubic
from pipeline.errors import WorkerLost
from pipeline.video.decode.orientation import Orientation
from pipeline.video.decode.planes import Geometry, Scaler

LARGEST = (1 << 15) - 1  # of the values between the two directions
ROUNDING = 64 << bicubic.DOWN_BITS
FULL_RANGE = 2  # libav's AVCOL_RANGE_JPEG
# Full range to limited, of 15-bit values: factor and offset of luma and of chroma, 14 bits of fraction.
TO_LIMITED = (14071, 33561472), (14393, 33537152)
SMALLEST = 16  # pixels of a side; swscale's filters of smaller ones are longer than the side
MOST_SHRUNK = 30  # from 170 weights on (about 40 times smaller) swscale scales in two steps
CACHED = 32  # matrices on the device: of 1080p to 256 pixels 0.1 to 3.5 MB each
PROBE_SIDE = 32  # of the frame of noise by which the position of chroma is found, pixels
UPRIGHT = Orientation()


class DeviceScaler:
    """Writes frames of one video as planes."""

    def __init__(self, orientation: Orientation, chroma: ChromaPosition, device: str) -> None:
        self._orientation, self._chroma, self._device = orientation, chroma, device
        self._software = Scaler(orientation, "sdr")

    def write(self, frame: Any, geometry: Geometry, out_3HW: np.ndarray) -> None:
        """Fills `out_3HW` (uint8, `3 x geometry.height x geometry.width`) with limited-range Y, U, V of an NV12 frame with even sides.

        Raises:
            DamagedInput: `corrupt_stream`, as `Scaler`, which shrinks a frame more than `MOST_SHRUNK` times.
            WorkerLost: the GPU or its driver failed; the process is of no further use.
        """
        if self._is_for_software(frame, geometry):
            self._software.write(frame, geometry, out_3HW)  # downloads the frame
            return
        try:
            planes = self._planes(frame, geometry)
            torch.from_numpy(out_3HW).copy_(planes)  # waits for the device
        except RuntimeError as error:
            raise _device_failed("scaling a frame", error) from error

    def _is_for_software(self, frame: Any, geometry: Geometry) -> bool:
        scaled = geometry.scaled_height, geometry.scaled_width
        height, width = scaled[::-1] if self._orientation.transpose else scaled
        tiny = min(frame.height, frame.width) < SMALLEST
        return bool(tiny or max(frame.height / height, frame.width / width) > MOST_SHRUNK)

    def _planes(self, frame: Any, geometry: Geometry) -> torch.Tensor:
        # By capsule: torch would pass its stream to `__dlpack__`, which PyAV refuses. Both use the default stream of one context, in order.
        luma_HW, chroma_HW2 = (from_dlpack(plane.__dlpack__()) for plane in frame.planes[:2])
        window = _stored_window(self._orientation, geometry)
        full = int(frame.color_range) == FULL_RANGE
        planes = [
            self._scaled(luma_HW[None], LUMA, *window, TO_LIMITED[0] if full else None),
            self._scaled(chroma_HW2.permute(2, 0, 1), self._chroma, *window, TO_LIMITED[1] if full else None),
        ]
        shown = torch.cat(planes)
        if self._orientation.transpose:
            shown = shown.transpose(1, 2)
        flips = [self._orientation.flip_rows, self._orientation.flip_columns]
        return shown.flip([axis for axis, flipped in enumerate(flips, 1) if flipped])

    def _scaled(
        self,
        planes_NHW: torch.Tensor,
        position: ChromaPosition,
        rows: Side,
        columns: Side,
        to_limited: tuple[int, int] | None,
    ) -> torch.Tensor:
        """The window of scaled planes, uint8."""
        wide_NHw = self._across(planes_NHW.float(), position[1], columns)
        if to_limited is not None:
            factor, offset = to_limited
            wide_NHw = ((wide_NHw.int() * factor + offset) >> 14).float()
        values_Nhw = (self._down(wide_NHw, position[0], rows) + ROUNDING) >> (bicubic.DOWN_BITS + 7)
        return values_Nhw.clamp(0, 255).byte()

    def _across(self, planes_NHW: torch.Tensor, position: int, columns: Side) -> torch.Tensor:
        """15-bit values of the columns, as float32."""
        width = planes_NHW.shape[2]
        if _is_unscaled(width, position, columns):
            return planes_NHW[:, :, columns[1] : columns[2]] * 128
        weights_wW = _matrix("across", width, position, columns, self._device)
        return torch.floor((planes_NHW @ weights_wW.T) / 128).clamp(max=LARGEST)

    def _down(self, planes_NHw: torch.Tensor, position: int, rows: Side) -> torch.Tensor:
        """27-bit values of the rows, int32."""
        height = planes_NHw.shape[1]
        if _is_unscaled(height, position, rows):
            return planes_NHw[:, rows[1] : rows[2]].int() << bicubic.DOWN_BITS
        weights_hH = _matrix("down", height, position, rows, self._device)
        # A 15-bit value by a 12-bit weight is beyond the exact range of float32: the high and the low byte are scaled apart.
        high_NHw = torch.floor(planes_NHw / 256)
        sums_2Nhw = (weights_hH @ torch.stack([high_NHw, planes_NHw - 256 * high_NHw])).int()
        return 256 * sums_2Nhw[0] + sums_2Nhw[1]


ChromaPosition = tuple[int, int]
"""Position of chroma down and across, as `bicubic` takes it."""
LUMA: ChromaPosition = bicubic.CENTRED, bicubic.CENTRED
# Centre, left (MPEG-2, H.264, HEVC), and what streams may be tagged with besides: top left, top, bottom left, bottom.
CHROMA_POSITIONS: tuple[ChromaPosition, ...] = (LUMA, (128, 64), (64, 64), (64, 128), (192, 64), (192, 128))

Side = tuple[int, int, int]
"""(scaled length, first, end) of rows or columns, in pixels of the stored orientation."""


def same_pixels(one: Any, other: Any, device: str) -> bool:
    """Whether libav's frame of 8-bit 4:2:0 in host memory and an NV12 frame on the device have the same samples.

    Raises:
        WorkerLost: the GPU or its driver failed.
    """
    try:
        ours = [from_dlpack(plane.__dlpack__()).to(device) for plane in one.planes]
        luma_HW, chroma_HW2 = (from_dlpack(plane.__dlpack__()) for plane in other.planes[:2])
        pairs = zip(ours, (luma_HW, chroma_HW2[..., 0], chroma_HW2[..., 1]), strict=True)
        return all(torch.equal(mine, theirs) for mine, theirs in pairs)
    except RuntimeError as error:
        raise _device_failed("comparing a frame", error) from error


def _device_failed(doing: str, error: RuntimeError) -> WorkerLost:
    text = " ".join(str(error).split())[:200]
    return WorkerLost(f"the GPU failed while {doing}: {text}", stage="decode")


def chroma_position(first: Any) -> ChromaPosition | None:
    """Where swscale takes the chroma of a video's frames to lie, given libav's first frame of 8-bit 4:2:0; None if at none of the places
    known here.

    PyAV 18.1 does not give a frame's `chroma_location`. But copies of a frame have it: a copy filled with noise is scaled by swscale, and
    here for each position.
    """
    noise = VideoReformatter().reformat(first, PROBE_SIDE, PROBE_SIDE, "yuv420p", threads=1)
    draw = np.random.default_rng(0)
    for plane in noise.planes:
        plane.update(draw.integers(16, 235, plane.buffer_size, np.uint8).tobytes())
    interleaved = VideoReformatter().reformat(noise, format="nv12", threads=1)
    geometry = Geometry(PROBE_SIDE, PROBE_SIDE, 0, 0, PROBE_SIDE, PROBE_SIDE)
    wanted, found = np.empty((2, 3, PROBE_SIDE, PROBE_SIDE), np.uint8)
    Scaler(UPRIGHT, "sdr").write(noise, geometry, wanted)
    for position in CHROMA_POSITIONS:
        DeviceScaler(UPRIGHT, position, "cpu").write(interleaved, geometry, found)
        if np.array_equal(wanted, found):
            return position
    return None


def _stored_window(orientation: Orientation, geometry: Geometry) -> tuple[Side, Side]:
    """Rows and columns of the window, before the frame is flipped and transposed for display."""
    rows = _side(geometry.scaled_height, geometry.top, geometry.height, flipped=orientation.flip_rows)
    columns = _side(geometry.scaled_width, geometry.left, geometry.width, flipped=orientation.flip_columns)
    return (columns, rows) if orientation.transpose else (rows, columns)


def _side(scaled: int, first: int, length: int, *, flipped: bool) -> Side:
    first = scaled - first - length if flipped else first
    return scaled, first, first + length


def _is_unscaled(length: int, position: int, side: Side) -> bool:
    return side[0] == length and position == bicubic.CENTRED


@lru_cache(CACHED)
def _matrix(direction: str, source: int, position: int, side: Side, device: str) -> torch.Tensor:
    """float32 `(end - first, source)`: the weights of `bicubic` for a part of the target."""
    scaled, first, end = side
    weights = (bicubic.down if direction == "down" else bicubic.across)(source, scaled, position)[first:end]
    if int(np.abs(weights).sum(axis=1).max()) * 255 >= 1 << 24:
        raise ValueError(f"weights from {source} to {scaled} samples are too large for exact products in float32")
    return torch.from_numpy(weights.astype(np.float32)).to(device)
