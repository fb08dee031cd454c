"""Coders that run a diffusers module on whole clips, including two classes with special calls.

They take a video or latents in the module's dtype, on its device, and return the posterior's parameters or a video. There is no state.

Whether these networks could be run in chunks was tried with tiny random ones (`tests/model/test_diffusers_chunking.py`):

| class         | a prefix of the video gives the prefix of the latent | chunks with the state diffusers keeps           |
|---------------|------------------------------------------------------|-------------------------------------------------|
| HunyuanVideo  | no: group norms over all frames                      | keeps none                                      |
| CogVideoX     | no: group norms over batches of 8 frames or more,    | exact between batches, but batch borders depend |
|               | the remainder of the length going into the first     | on the clip length, unknown in a stream         |
| Cosmos        | to rounding: causal convolutions and attention       | keeps none; the attention needs every frame     |
| LTXVideo      | to rounding: causal convolutions, norms by position  | keeps none                                      |
| Mochi         | to rounding: causal convolutions and attention       | none to encode; the attention needs every frame |
| Allegro       | no: group norms and convolutions over both sides     | keeps none                                      |
| HunyuanVideo  | to rounding: causal convolutions and attention       | keeps none; the attention needs every frame     |
| 1.5           |                                                      |                                                 |

LTX-2, EasyAnimate (Magvit) and VidTok are run in chunks by `causal_stream`; here are their whole clips, which decode the first and last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from model.history import StateTensors

Moments = tuple[torch.Tensor, torch.Tensor | None]  # mean; log-variance if the class gives a Gaussian


def split_moments(parameters_BCthw: torch.Tensor) -> Moments:
    """Splits the `2 d` channels of an encoder into mean and log-variance, bounded as diffusers does."""
    mean, logvar = parameters_BCthw.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


class WholeClips:
    """Coder for classes that need every frame of a clip in one call. `reason` says why."""

    encodes_whole: str | None
    decodes_whole: str | None

    def __init__(self, module: Any, reason: str) -> None:
        self.module = module
        self.encodes_whole = self.decodes_whole = reason

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posterior of the clip; `memory` must be None, and the new state is empty."""
        posterior = self.module.encode(video_BCTHW).latent_dist
        return (posterior.mode(), getattr(posterior, "logvar", None)), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        return self.module.decode(latent_BCthw).sample, ()


class AllegroClips(WholeClips):
    """`AutoencoderKLAllegro` without its tiling, which diffusers cannot switch off: the same layers, once over the whole clip."""

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posterior of the clip; equal to that of diffusers for a clip of one tile (24 frames of `sample_size`)."""
        parameters = self.module.encoder(video_BCTHW)
        return split_moments(_each_frame(self.module.quant_conv, parameters)), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        return self.module.decoder(_each_frame(self.module.post_quant_conv, latent_BCthw)), ()


class LTXClips(WholeClips):
    """`AutoencoderKLLTXVideo`, whose later decoders take a time step and draw noise: here step 0 and fixed noise."""

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        device = latent_BCthw.device
        step = latent_BCthw.new_zeros(latent_BCthw.shape[0]) if self.module.config.timestep_conditioning else None
        # the decoder draws from torch's global generator; fork_rng restores it afterwards
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=True):
            torch.manual_seed(0)
            return self.module.decode(latent_BCthw, step).sample, ()


class HunyuanVideo15Clips(WholeClips):
    """`AutoencoderKLHunyuanVideo15`, one video at a time: the mask of its attention has the wrong shape for batches (diffusers 0.42)."""

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posteriors of the clips."""
        moments = [super(HunyuanVideo15Clips, self).encode(video, memory)[0] for video in video_BCTHW.split(1)]
        means, logvars = zip(*moments, strict=True)
        return (torch.cat(means), torch.cat(logvars)), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Videos of the clips."""
        return torch.cat([self.module.decode(latent).sample for latent in latent_BCthw.split(1)]), ()


class VidTokClips(WholeClips):
    """`AutoencoderVidTok`: pads and cuts as its `forward`, for every number of frames, and leaves no caches behind."""

    def encode(self, video_BCTHW: torch.Tensor, memory: StateTensors | None) -> tuple[Moments, StateTensors]:
        """Posterior of the clip. The first frame of a causal network stands for a whole group."""
        if self.module.is_causal:
            before = [video_BCTHW[:, :, :1]] * (self.module.temporal_compression_ratio - 1)
            video_BCTHW = torch.cat([*before, video_BCTHW], dim=2)
        parameters = self._run(self.module.encoder, video_BCTHW)
        return split_moments(parameters), ()

    def decode(self, latent_BCthw: torch.Tensor, memory: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video of the clip."""
        video = self._run(self.module.decoder, latent_BCthw)
        return video[:, :, self.module.temporal_compression_ratio - 1 :] if self.module.is_causal else video, ()

    def _run(self, coder: Any, clip: torch.Tensor) -> torch.Tensor:
        self.module._set_first_chunk(True)
        result: torch.Tensor = coder(clip)
        self.module._empty_causal_cached(coder)
        return result


def _each_frame(layer: Any, latent_BCthw: torch.Tensor) -> torch.Tensor:
    """Applies a 2-D layer to every latent frame."""
    B = latent_BCthw.shape[0]
    frames = layer(latent_BCthw.contiguous().permute(0, 2, 1, 3, 4).flatten(0, 1))
    return frames.unflatten(0, (B, -1)).permute(0, 2, 1, 3, 4)


_CODERS: dict[str, type[WholeClips]] = {
    "AutoencoderKLAllegro": AllegroClips,
    "AutoencoderKLHunyuanVideo15": HunyuanVideo15Clips,
    "AutoencoderKLLTXVideo": LTXClips,
    "AutoencoderKLLTX2Video": LTXClips,
    "AutoencoderVidTok": VidTokClips,
}


def clips_of(module: Any, reason: str) -> WholeClips:
    """Coder of whole clips for the class of `module`. `reason`: why it takes no chunks."""
    return _CODERS.get(type(module).__name__, WholeClips)(module, reason)
