"""Network class for VAEs of diffusers: the library's modules with this package's interface, checks and states.

Takes videos `B 3 T H W` in [-1, 1] or latents; returns raw posterior means (not sampled, not scaled) or videos, and the state of
the next chunk for classes that can be run in chunks without loss:

| class                             | encode            | decode            | by                                            |
|-----------------------------------|-------------------|-------------------|-----------------------------------------------|
| Wan, QwenImage                    | any 4n+1, 4n, ... | any               | their own feature cache (`wan_stream.py`)     |
| Magvit (EasyAnimate)              | any 4n+1, 4n, ... | any               | the frames before each layer, carried along   |
| LTX2Video, VidTok                 | any 8n+1, 8n, ... | whole clips       | (`causal_stream.py`)                          |
| AutoencoderKL (SD, SDXL), Flux2,  | any               | any               | frames, which do not depend on each other     |
| AutoencoderDC, AutoencoderTiny    |                   |                   |                                               |
| TemporalDecoder (SVD)             | any               | whole clips       | the same; its decoder mixes frames            |
| HunyuanVideo, HunyuanVideo15,     | whole clips       | whole clips       | reasons: `classes.WHOLE_CLIPS`, `clips.py`    |
| CogVideoX, Cosmos, LTXVideo,      |                   |                   |                                               |
| Allegro, Mochi                    |                   |                   |                                               |

On a CPU the videos of a batch are processed one by one, so that batches give the same bits. diffusers' options to save memory (tiles,
framewise coding) blend overlapping pieces and stay off.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from model.diffusers_vae.causal_stream import STREAMS, open_causal_stream
from model.diffusers_vae.classes import DETERMINISTIC
from model.diffusers_vae.clips import WholeClips, clips_of
from model.diffusers_vae.facts import needs_whole_clips
from model.diffusers_vae.frames import DeterministicFrameCoder, FrameCoder, FrameEncoderClipDecoder
from model.diffusers_vae.module import check_weights, empty_module, filled, full_config, library, random_weights
from model.diffusers_vae.wan_stream import WanStream, open_stream
from model.vae import CausalVAE
from model.weights import CheckedWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from model.history import StateTensors
    from model.interface import LatentSpec
    from model.state import CausalState
    from model.vae import Pixels
    from model.weights import WeightsSha256

__all__ = ["NUMERICS", "DiffusersVAE", "build", "check", "random_weights"]

NUMERICS = 1  # version of this adapter's arithmetic; the library's version is part of `config`

Coder = WholeClips | FrameCoder | WanStream


class DiffusersVAE(CausalVAE):
    """VAE of diffusers ready to run; implements `model.interface.VideoVAE`.

    `config` holds every option in force and the version of diffusers. If a direction takes whole clips only, a state or `last=False` raises
    ValueError with the reason; classes without a Gaussian refuse `moments=True`.
    """

    numerics = NUMERICS

    def __init__(self, coder: Coder, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self._coder = coder

    def _module(self) -> torch.nn.Module:
        return cast("torch.nn.Module", self._coder.module)

    @property
    def decode_chunking(self) -> str:
        """`spec.chunking`, for decoding."""
        if self._coder.decodes_whole:
            return "none"
        return "exact" if self.device.type == "cpu" else "rounding"

    def _check_state(self, state: CausalState | None, kind: str, batch: int, grid: tuple[int, int]) -> None:
        reason = self._coder.encodes_whole if kind == "encode" else self._coder.decodes_whole
        if state is not None and reason:
            raise ValueError(self._needs_whole_clips(kind, reason))
        super()._check_state(state, kind, batch, grid)

    def _needs_whole_clips(self, kind: str, reason: str) -> str:
        return f"{self.spec.network} {kind}s whole clips, because {reason}; pass every frame of a clip in one call, without a state"

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        video_BCTHW = pixels.whole()
        if moments and self.config["_class_name"] in DETERMINISTIC:
            raise ValueError(
                f"{self.spec.network} is deterministic: it has no log-variance; call encode with moments=False"
            )
        results = [self._coder.encode(*part) for part in self._parts(video_BCTHW, state)]
        mean = self._joined([mean for (mean, _), _ in results])
        logvar = self._joined([logvar for (_, logvar), _ in results if logvar is not None]) if moments else None
        memories = [memory for _, memory in results]
        return mean, logvar, self._state_after("encode", memories, self._grid(pixels.size), video_BCTHW.shape[0])

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        if not last and self._coder.decodes_whole:
            raise ValueError(self._needs_whole_clips("decode", self._coder.decodes_whole))
        results = [self._coder.decode(*part) for part in self._parts(latent_BCthw, state)]
        B, _, _, h, w = latent_BCthw.shape
        video = self._joined([video for video, _ in results])
        return video, self._state_after("decode", [memory for _, memory in results], (h, w), B)

    def _parts(self, clips: torch.Tensor, state: CausalState | None) -> list[tuple[torch.Tensor, StateTensors | None]]:
        """Inputs of each call of the module, with their states: single videos on a CPU, the batch on other devices."""
        clips = clips.to(self.device, self.dtype)
        memory = None if state is None else state.tensors
        if self.device.type != "cpu":
            return [(clips, memory)]
        return [
            (clips[b : b + 1].contiguous(), None if memory is None else tuple(tensor[b : b + 1] for tensor in memory))
            for b in range(clips.shape[0])
        ]

    def _joined(self, parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).to(self.input_dtype).contiguous()

    def _state_after(self, kind: str, memories: list[StateTensors], grid: tuple[int, int], batch: int) -> CausalState:
        if self._coder.encodes_whole if kind == "encode" else self._coder.decodes_whole:
            return self._ended(kind, batch, grid)
        tensors = memories[0] if len(memories) == 1 else [torch.cat(parts) for parts in zip(*memories, strict=True)]
        return self._next_state(kind, grid, tensors or [torch.empty((batch, 0), device=self.device)])


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with their network, without building it. The result's configuration and spec hold what is in force.

    Raises:
        ValueError: diffusers is missing or too old, a configuration its class cannot be built from, keys or shapes of another
            configuration, or non-finite weights.
    """
    module = empty_module(spec.network, config)
    config = full_config(module)
    check_weights(spec.network, module, weights)
    coder = _coder(config, module, spec)
    spec = dataclasses.replace(spec, chunking="none" if coder.encodes_whole else "exact")
    if config["_class_name"] in (
        "AutoencoderKLLTXVideo",
        "AutoencoderKLLTX2Video",
    ):  # their statistics are not in their configuration
        mean, std = (tuple(weights[key].double().tolist()) for key in ("latents_mean", "latents_std"))
        spec = dataclasses.replace(spec, mean=mean, std=std, scale=None if spec.scale == 1 else spec.scale)
    return CheckedWeights(spec, config, weights, coder)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> DiffusersVAE:
    """Network with these weights; `provenance`: `checkpoint` or `seed`."""
    coder: Coder = checked.empty
    coder.module = filled(coder.module, checked.weights, device, dtype)
    spec = checked.spec.on_device(device.type)
    return DiffusersVAE(coder, spec, checked.config, sha256, device, dtype, **provenance)


FRAME_CODERS = {
    "AutoencoderKLTemporalDecoder": FrameEncoderClipDecoder,
    "AutoencoderKL": FrameCoder,
    "AutoencoderKLFlux2": FrameCoder,
    "AutoencoderDC": DeterministicFrameCoder,
    "AutoencoderTiny": DeterministicFrameCoder,
}


def _coder(config: Mapping[str, Any], module: Any, spec: LatentSpec) -> Coder:
    """Coder for this configuration."""
    kind = config["_class_name"]
    if kind in FRAME_CODERS:
        return FRAME_CODERS[kind](module)
    if whole := needs_whole_clips(config):
        return clips_of(module, whole)
    reason = f"this adapter does not know how the layers of diffusers {library().__version__} look back in time"
    if kind in STREAMS:
        stream: Coder | str = open_causal_stream(clips_of(module, reason), spec)
    else:
        stream = open_stream(module, spec.space_stride)
        reason = f"this adapter does not know how diffusers {library().__version__} keeps its cache"
    if isinstance(stream, str):
        warnings.warn(f"{spec.network} encodes and decodes whole clips only: {reason} ({stream})", stacklevel=3)
        return clips_of(module, reason)
    return stream
