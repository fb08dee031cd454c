"""Quality of one clip's reconstruction, measured frame by frame.

Takes uint8 RGB frames `3 T H W` of both, black 0, white 255; returns a `ClipQuality`. `model.metrics.frames` computes PSNR and SSIM of each
frame, `model.metrics.perceptual` LPIPS. Memory depends on the frames passed at once, not on the clip's length.

- **psnr**: mean over frames of each frame's PSNR, peak 255. Identical frames (infinite PSNR) count as 100 dB, as in published code.
- **psnr_of_mse**: PSNR of the mean squared error over all frames. At most the mean of PSNRs (Jensen): a single bad frame counts more.
- **ssim**: 11x11 Gaussian window, sigma 1.5, per colour; mean over the pixels whose window lies inside the frame (the five at each border
  do not count: Wang et al. 2004, and the scripts of LeanVAE and WF-VAE), over colours and frames.
- **lpips**: LPIPS (VGG16 or AlexNet, by the weights given) of each frame in [-1, 1]; mean over frames.
- **degree** of information preservation: 1 - sum|x - x'| / sum|x|, pixels from 0 (black) to 1 (IV-VAE supplement 1.1, equation 2). It
  depends on which value is zero, which the paper does not say; another range gives another number.
- **ssim_positions**: mean SSIM of the frames at position 1, 2, ... of their groups, without the frames coded alone at the start (IV-VAE
  supplement 1.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.metrics.frames import SSIM_WINDOW, WHITE, decibels_of, frame_psnr, frame_ssim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.metrics.perceptual import LPIPS

FRAMES_AT_ONCE = 4  # passed to LPIPS, so that memory does not grow with the chunks added


@dataclass(frozen=True, slots=True)
class ClipQuality:
    """Measures of one clip; the module defines them. `lpips` is None without weights, `degree` None if every pixel is black."""

    frames: int
    psnr: float
    psnr_of_mse: float
    ssim: float
    lpips: float | None
    degree: float | None
    groups: int  # groups of frames, without the frames coded alone
    ssim_positions: tuple[float, ...]  # empty if there is no group
    frame_psnr: tuple[float, ...]
    frame_ssim: tuple[float, ...]
    error_sum: float  # sum|x - x'|, pixels from 0 to 1; with `light_sum`, sum|x|, it gives a corpus's degree
    light_sum: float


class ClipMeter:
    """Measures one clip from its frames, added in order and in parts of any size; call `result` after the last."""

    def __init__(self, lead_frames: int, time_stride: int, lpips: LPIPS | None = None) -> None:
        """`lead_frames` frames are coded alone at the start (1 or 0), then groups of `time_stride`."""
        self._lead, self._stride, self._lpips = lead_frames, time_stride, lpips
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._distances: list[float] = []
        self._squares = self._errors = self._light = self._values = 0

    def add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        """Adds the next frames: uint8 `3 T H W` of both, T may be 0.

        Raises:
            ValueError: not uint8, not three colours, shapes that differ, sides under 11 pixels.
        """
        check_pair(original_CTHW, other_CTHW)
        for start in range(0, original_CTHW.shape[1], FRAMES_AT_ONCE):
            frames = slice(start, start + FRAMES_AT_ONCE)
            self._add(original_CTHW[:, frames], other_CTHW[:, frames])

    def _add(self, original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
        difference = original_CTHW.int() - other_CTHW.int()
        self._squares += int(difference.square().sum())
        self._errors += int(difference.abs().sum())
        self._light += int(original_CTHW.sum(dtype=torch.int64))
        self._values += difference.numel()
        self._psnr += frame_psnr(original_CTHW, other_CTHW)
        self._ssim += frame_ssim(original_CTHW, other_CTHW)
        if self._lpips is not None:
            scaled = (clip.transpose(0, 1).float() / (WHITE / 2) - 1 for clip in (original_CTHW, other_CTHW))
            self._distances += self._lpips(*scaled).tolist()

    def result(self) -> ClipQuality:
        """Quality of all frames added. Raises ValueError if there are none."""
        if not self._psnr:
            raise ValueError("got no frames; add frames before reading the result")
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
    """Quality of a whole clip: uint8 `3 T H W` of both. Raises ValueError as `ClipMeter.add`."""
    meter = ClipMeter(lead_frames, time_stride, lpips)
    meter.add(original_CTHW, other_CTHW)
    return meter.result()


def by_position(values: Sequence[float], lead_frames: int, time_stride: int) -> tuple[float, ...]:
    """Means over the frames at each position of complete groups (IV-VAE supplement 1.2); empty if there is no complete group."""
    grouped = values[lead_frames:]
    groups = len(grouped) // time_stride
    if not groups:
        return ()
    return tuple(_mean(grouped[p : groups * time_stride : time_stride]) for p in range(time_stride))


def check_pair(original_CTHW: torch.Tensor, other_CTHW: torch.Tensor) -> None:
    """Raises ValueError unless both are uint8 `3 T H W` of the same shape, with sides of at least SSIM's window."""
    for clip in (original_CTHW, other_CTHW):
        if clip.ndim != 4 or clip.shape[0] != 3 or clip.dtype != torch.uint8:
            raise ValueError(f"expected uint8 frames (3, T, H, W), got {clip.dtype} {tuple(clip.shape)}")
    if original_CTHW.shape != other_CTHW.shape:
        raise ValueError(
            f"original and reconstruction differ in shape: {tuple(original_CTHW.shape)}, {tuple(other_CTHW.shape)}"
        )
    if min(original_CTHW.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side, got {original_CTHW.shape[2]}x{original_CTHW.shape[3]}"
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
