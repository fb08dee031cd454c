"""Image VAEs, frame by frame: `AutoencoderKL` (Stable Diffusion, SDXL, Flux) and the encoder of `AutoencoderKLTemporalDecoder` (SVD).

Enters: a video or latents in the module's dtype on its device. Leaves: parameters of the posterior, or a video. Frames know nothing of each
other, so any chunking is exact where each goes through alone, as on a CPU. SVD's decoder mixes frames and takes whole clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.diffusers_vae.clips import Moments, split_moments

if TYPE_CHECKING:
    from collections.abc import Callable

    from model.vae import Memory

FRAMES_A_PASS = 8  # on devices where results are the same to rounding only


class Frames:
    """Single frames both ways."""

    encodes_whole: str | None = None
    decodes_whole: str | None = None

    def __init__(self, module: Any) -> None:
        self.module = module

    def encode(self, video_BCTHW: torch.Tensor, memory: Memory | None) -> tuple[Moments, Memory]:
        """Posteriors of the frames; the memory is empty."""
        return split_moments(_each(video_BCTHW, lambda x: self.module.encode(x).latent_dist.parameters)), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: Memory | None) -> tuple[torch.Tensor, Memory]:
        """The frames."""
        return _each(latent_BCthw, lambda z: self.module.decode(z).sample), ()


class FramesToClip(Frames):
    """Single frames to latents, whole clips back (SVD)."""

    decodes_whole = "its decoder mixes the frames before and after"

    def decode(self, latent_BCthw: torch.Tensor, memory: Memory | None) -> tuple[torch.Tensor, Memory]:
        """The clip's video."""
        B, _, t, _, _ = latent_BCthw.shape
        frames = latent_BCthw.transpose(1, 2).flatten(0, 1)
        return self.module.decode(frames, num_frames=t).sample.unflatten(0, (B, t)).transpose(1, 2), ()


def _each(clip_BCTHW: torch.Tensor, layer: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`layer` on the frames of a clip, on a CPU one by one."""
    B = clip_BCTHW.shape[0]
    frames = clip_BCTHW.transpose(1, 2).flatten(0, 1).contiguous()
    step = 1 if frames.device.type == "cpu" else FRAMES_A_PASS
    return torch.cat([layer(part) for part in frames.split(step)]).unflatten(0, (B, -1)).transpose(1, 2)
