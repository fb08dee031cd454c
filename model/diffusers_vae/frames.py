"""Coders of image VAEs, frame by frame: Stable Diffusion, SDXL, FLUX.1 and FLUX.2, DC-AE, TAESD, and the encoder of SVD.

They take a video or latents in the module's dtype, on its device, and return the posterior's parameters or a video. Frames do not depend on
each other, so any chunking is exact if each is computed alone, as on a CPU. SVD's decoder mixes frames and needs whole clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.diffusers_vae.clips import Moments, split_moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from model.history import StateTensors

FRAMES_A_PASS = 8  # on devices where results are equal up to rounding only


class FrameCoder:
    """Coder that encodes and decodes single frames."""

    encodes_whole: str | None = None
    decodes_whole: str | None = None

    def __init__(self, module: Any) -> None:
        self.module = module

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posteriors of the frames; the state is empty."""
        return split_moments(_each(video_BCTHW, lambda x: self.module.encode(x).latent_dist.parameters)), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Decoded frames."""
        return _each(latent_BCthw, lambda z: self.module.decode(z).sample), ()


class DeterministicFrameCoder(FrameCoder):
    """Coder of `AutoencoderDC` and `AutoencoderTiny`, which give one latent and not a Gaussian."""

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Latents of the frames; the state is empty."""
        return (_each(video_BCTHW, lambda x: self.module.encode(x, return_dict=False)[0]), None), ()


class FrameEncoderClipDecoder(FrameCoder):
    """Coder that encodes single frames and decodes whole clips (SVD)."""

    decodes_whole = "its decoder mixes the frames before and after"

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        B, _, t, _, _ = latent_BCthw.shape
        frames = latent_BCthw.transpose(1, 2).flatten(0, 1)
        return self.module.decode(frames, num_frames=t).sample.unflatten(0, (B, t)).transpose(1, 2), ()


def _each(clip_BCTHW: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Applies `layer` to the frames of a clip, one by one on a CPU."""
    B = clip_BCTHW.shape[0]
    frames = clip_BCTHW.transpose(1, 2).flatten(0, 1).contiguous()
    step = 1 if frames.device.type == "cpu" else FRAMES_A_PASS
    return torch.cat([layer(part) for part in frames.split(step)]).unflatten(0, (B, -1)).transpose(1, 2)
