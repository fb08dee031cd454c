"""Checks of videos, planes and latents before they reach a network; each raises ValueError.

Messages say what was got, what was expected and which nearby values fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.interface import nearest_multiples

if TYPE_CHECKING:
    from model.interface import LatentSpec


def check_frames(num_frames: int, spec: LatentSpec, *, first: bool) -> int:
    """Number of latent frames of a chunk. Raises ValueError if the frame count does not fit; `first`: the chunk starts a video."""
    if first:
        return spec.latent_frames(num_frames)
    if num_frames < 1 or num_frames % spec.time_stride:
        raise ValueError(
            f"{spec.network} takes {spec.time_stride}n frames in every chunk after the first, got {num_frames}; "
            f"nearest that fit: {nearest_multiples(num_frames, spec.time_stride)}"
        )
    return num_frames // spec.time_stride


def _check_tensor(value: object) -> None:
    if not isinstance(value, torch.Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"expected a torch tensor, got {kind}; convert arrays with torch.from_numpy")


def check_video(video: torch.Tensor, spec: LatentSpec, *, first: bool) -> None:
    """Raises ValueError unless `video` is floating-point `(B, 3, T, H, W)` with a frame count and size the network takes."""
    _check_tensor(video)
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[0] < 1:
        hint = " (an image is a video of one frame: video[:, :, None])" if video.ndim == 4 else ""
        raise ValueError(f"expected a video of shape (B, 3, T, H, W), got {tuple(video.shape)}{hint}")
    if not video.is_floating_point():
        lo, hi = spec.value_range
        raise ValueError(
            f"expected floating-point values in [{lo:g}, {hi:g}], got {video.dtype}; "
            "scale the frames, or give uint8 YUV planes to encode_planes"
        )
    check_frames(video.shape[2], spec, first=first)
    spec.check_size(video.shape[3], video.shape[4])


def check_planes(planes: torch.Tensor, spec: LatentSpec, *, first: bool) -> None:
    """Raises ValueError unless `planes` is uint8 `(B, T, 3, H, W)` with a frame count and size the network takes."""
    _check_tensor(planes)
    if planes.ndim != 5 or planes.shape[2] != 3 or planes.shape[0] < 1 or planes.dtype != torch.uint8:
        raise ValueError(
            f"expected uint8 YUV planes of shape (B, T, 3, H, W), got {planes.dtype} {tuple(planes.shape)}"
        )
    check_frames(planes.shape[1], spec, first=first)
    spec.check_size(planes.shape[3], planes.shape[4])


def check_latent(latent: torch.Tensor, spec: LatentSpec) -> None:
    """Raises ValueError unless `latent` is floating-point `(B, latent_channels, t >= 1, h, w)`."""
    _check_tensor(latent)
    if latent.ndim != 5 or latent.shape[1] != spec.latent_channels or 0 in latent.shape:
        raise ValueError(
            f"expected latents of shape (B, {spec.latent_channels}, t, h, w) for {spec.network}, got {tuple(latent.shape)}"
        )
    if not latent.is_floating_point():
        raise ValueError(f"expected floating-point latents, got {latent.dtype}")


def range_warning(video: torch.Tensor, spec: LatentSpec) -> str | None:
    """Warning text if the first frame's values are far outside `spec.value_range`, else None.

    Far means more than a quarter of the range beyond either end; resampling filters overshoot less than that.
    """
    lo, hi = spec.value_range
    low, high = (bound.item() for bound in video[:, :, 0].aminmax())
    slack = 0.25 * (hi - lo)
    if lo - slack <= low and high <= hi + slack:
        return None
    if high > 2:
        cause = "frames in 0..255"
    elif low >= 0:
        cause = "frames in [0, 1]"
    elif low >= -1.25 and high <= 1.25 and (lo, hi) != (-1.0, 1.0):
        cause = "frames in [-1, 1]"
    else:
        cause = "frames with another scaling"
    return (
        f"{spec.network} expects values in [{lo:g}, {hi:g}], the first frame spans [{low:.4g}, {high:.4g}]: "
        f"probably {cause}; the latents will be wrong"
    )
