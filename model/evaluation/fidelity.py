"""How alike one clip and its reconstruction are, measured frame by frame as the frames come.

Enters: uint8 RGB frames `3 T H W` of both, black 0, white 255. Leaves: a `ClipQuality`. torchmetrics computes PSNR and SSIM of each frame,
`model.training.perceptual` LPIPS; here they are put together. Memory is that of the frames handed in, whatever a clip's length.

What the numbers mean
- **psnr**: of each frame by itself, peak 255; frames' mean. Identical frames, whose PSNR is infinite, count as 100 dB as in published code.
- **psnr_of_mse**: of the mean squared error over all frames of the clip. Never above the mean of PSNRs (Jensen): one bad frame weighs.
- **ssim**: 11x11 Gaussian window, sigma 1.5, per colour; mean over pixels and colours of each frame; frames' mean.
- **lpips**: LPIPS-VGG of each frame in [-1, 1]; frames' mean.
- **degree** of information preservation: 1 - sum|x - x'| / sum|x|, pixels from 0 (black) to 1 (IV-VAE supplement 1.1, equation 2). It
  depends on where zero is: the paper does not say, and another range gives another number.
- **ssim_positions**: mean SSIM of the frames at position 1, 2, ... of their groups, the frames coded alone at the start left out (IV-VAE
  supplement 1.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.training.perceptual import LPIPS

WHITE = 255.0
MOST_DB = 100.0  # what identical frames count as
SMALLEST_SIDE = 11  # SSIM's window
FRAMES_AT_ONCE = 4  # of SSIM and LPIPS: memory does not grow with the chunks that come


@dataclass(frozen=True, slots=True)
class ClipQuality:
    """Measures of one clip; see the module for their meaning. `lpips` is None without weights, `degree` None where all is black."""

    frames: int
    psnr: float
    psnr_of_mse: float
    ssim: float
    lpips: float | None
    degree: float | None
    groups: int  # of frames, behind those coded alone
    ssim_positions: tuple[float, ...]  # empty where there is no group
    frame_psnr: tuple[float, ...]
    frame_ssim: tuple[float, ...]
    error_sum: float  # sum|x - x'| and sum|x|, pixels from 0 to 1: what a corpus's degree is made of
    light_sum: float


class ClipMeter:
    """Takes the frames of one clip in order, in as many parts as they come; `result` once they are all there."""

    def __init__(self, lead_frames: int, time_stride: int, lpips: LPIPS | None = None) -> None:
        """`lead_frames` are coded alone at the start (1 or 0), then groups of `time_stride`."""
        self._lead, self._stride, self._lpips = lead_frames, time_stride, lpips
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._distances: list[float] = []
        self._squares = self._errors = self._light = self._values = 0

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """The next frames: uint8 `3 T H W` of both, T may be 0.

        Raises:
            ValueError: not uint8, not three colours, shapes that differ, sides under 11 pixels.
        """
        check_pair(original_CTHW, other_CTHW)
        for start in range(0, original_CTHW.shape[1], FRAMES_AT_ONCE):
            frames = slice(start, start + FRAMES_AT_ONCE)
            self._add(original_CTHW[:, frames].transpose(0, 1), other_CTHW[:, frames].transpose(0, 1))

    def _add(self, original_TCHW: torch.Tensor, other_TCHW: torch.Tensor) -> None:
        difference = original_TCHW.int() - other_TCHW.int()
        self._squares += int(difference.square().sum())
        self._errors += int(difference.abs().sum())
        self._light += int(original_TCHW.sum(dtype=torch.int64))
        self._values += difference.numel()
        original, other = (
            original_TCHW.double(),
            other_TCHW.double(),
        )  # sums of squares are exact, in whatever parts frames come
        decibels = peak_signal_noise_ratio(other, original, data_range=WHITE, reduction="none", dim=(1, 2, 3))
        self._psnr += decibels.clamp(max=MOST_DB).tolist()
        original, other = original.float(), other.float()
        likeness = structural_similarity_index_measure(other, original, data_range=WHITE, reduction="none")
        assert isinstance(likeness, torch.Tensor)  # noqa: S101 - a pair only with return_full_image
        self._ssim += likeness.reshape(-1).tolist()  # torchmetrics drops the axis of a single frame
        if self._lpips is not None:
            self._distances += self._lpips(original / (WHITE / 2) - 1, other / (WHITE / 2) - 1).tolist()

    def result(self) -> ClipQuality:
        """Of everything added. Raises ValueError where that is nothing."""
        if not self._psnr:
            raise ValueError("a clip without a frame has no quality; add frames first")
        return ClipQuality(
            frames=len(self._psnr),
            psnr=_mean(self._psnr),
            psnr_of_mse=decibels_of(self._squares / self._values),
            ssim=_mean(self._ssim),
            lpips=_mean(self._distances) if self._distances else None,
            degree=1 - self._errors / self._light if self._light else None,
            groups=max(0, len(self._ssim) - self._lead) // self._stride,
            ssim_positions=by_position(self._ssim, self._lead, self._stride),
            frame_psnr=tuple(self._psnr),
            frame_ssim=tuple(self._ssim),
            error_sum=self._errors / WHITE,
            light_sum=self._light / WHITE,
        )


def clip_quality(
    original_CTHW: torch.Tensor,
    other_CTHW: torch.Tensor,
    lead_frames: int = 1,
    time_stride: int = 4,
    lpips: LPIPS | None = None,
) -> ClipQuality:
    """`ClipMeter` for a clip that is there as a whole: uint8 `3 T H W` of both. Raises ValueError as its `add`."""
    meter = ClipMeter(lead_frames, time_stride, lpips)
    meter.add(original_CTHW, other_CTHW)
    return meter.result()


def decibels_of(mean_square: float) -> float:
    """PSNR of a mean squared error of 8-bit values, at most `MOST_DB`."""
    return MOST_DB if mean_square == 0 else min(MOST_DB, 10 * math.log10(WHITE**2 / mean_square))


def by_position(values: Sequence[float], lead_frames: int, time_stride: int) -> tuple[float, ...]:
    """Means over the frames at each position of complete groups (IV-VAE supplement 1.2); empty where there is no such group."""
    grouped = values[lead_frames:]
    groups = len(grouped) // time_stride
    if not groups:
        return ()
    return tuple(_mean(grouped[p : groups * time_stride : time_stride]) for p in range(time_stride))


def check_pair(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
    """Raises ValueError unless both are uint8 `3 T H W`, alike in shape, with sides SSIM's window fits into."""
    for clip in (original_CTHW, other_CTHW):
        if clip.ndim != 4 or clip.shape[0] != 3 or clip.dtype != torch.uint8:
            raise ValueError(f"expected uint8 frames (3, T, H, W), got {clip.dtype} {tuple(clip.shape)}")
    if original_CTHW.shape != other_CTHW.shape:
        raise ValueError(
            f"original and reconstruction differ in shape: {tuple(original_CTHW.shape)}, {tuple(other_CTHW.shape)}"
        )
    if min(original_CTHW.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"SSIM looks through a window of {SMALLEST_SIDE} pixels; got frames of {original_CTHW.shape[2]}x{original_CTHW.shape[3]}"
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
