"""LeanVAE: 4x8x8, causal, a Haar transform and linear patches around NAF layers, latents by compressed sensing.

Enters: published weights and configuration; videos `B 3 T H W` in [-0.5, 0.5] (first chunk 4n+1 frames, later ones 4n) or latents.
Leaves: raw posterior means `B d t H/8 W/8`, videos, and the causal state for the next chunk.

This file checks, steps through chunks and hands the state on. The arithmetic is in `model.leanvae.coder` (with `model.leanvae.haar` and
`model.leanvae.tokens`), the parameters in `model.leanvae.parameters`. Nothing keeps state between calls.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model.leanvae.coder import PIXELS, Decoder, Encoder, first_frame
from model.leanvae.parameters import empty_network, random_weights
from model.vae import CausalVAE
from model.weights import check_finite, check_keys, hash_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.checkpoint import CheckpointInfo
    from model.interface import LatentSpec
    from model.leanvae.parameters import Network
    from model.leanvae.tokens import Projection
    from model.state import CausalState

__all__ = ["NUMERICS", "LeanVAE", "build", "random_weights"]

NUMERICS = 1  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint

STEP_TOKENS = 65536  # a chunk longer than this is stepped through, so that memory does not grow with it
LOGVAR_RANGE = (-30.0, 20.0)


class LeanVAE(CausalVAE):
    """LeanVAE ready to run; see `model.interface.VideoVAE` for the contract.

    On a CPU latents and videos are bit for bit the same under any chunking and any batch; on other devices to rounding
    (`spec.chunking` says which). `decode` needs no look-ahead, so `last` changes nothing here.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
    """

    numerics = NUMERICS

    def __init__(self, network: Network, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network = network

    def _run_encoder(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        heads = [self._encoder.mean_heads, self._encoder.logvar_heads][: 1 + moments]
        (mean, *rest), state = self._run_heads(video_BCTHW, state, heads)
        return mean, rest[0].clamp_(*LOGVAR_RANGE) if moments else None, state

    @torch.no_grad()
    def features(self, video_BCTHW: torch.Tensor, state: CausalState | None = None) -> tuple[torch.Tensor, CausalState]:
        """What the heads read: `B C t H/8 W/8`. Arguments as `encode`."""
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        encoder = self._encoder
        heads = (
            encoder.project(torch.eye(encoder.width), wide=True),
            encoder.project(encoder.fusion_layers[-1].narrow_weight(), wide=True),
        )
        (features,), state = self._run_heads(video_BCTHW, state, [heads])
        return features, state

    def _run_heads(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, heads: Sequence[tuple[Projection, Projection]]
    ) -> tuple[list[torch.Tensor], CausalState]:
        B, _, T, H, W = video_BCTHW.shape
        grid = (H // PIXELS, W // PIXELS)
        past = None if state is None else state.tensors
        rows = inputs.check_frames(T, self.spec, first=past is None)
        image, pieces = past is None, []
        for start, stop in self._steps(rows, B, grid):
            frames = slice(first_frame(start, image), first_frame(stop, image))
            piece, past = self._encoder(video_BCTHW[:, :, frames].to(self.device, self.input_dtype), past, heads)
            pieces.append(piece)
        outputs = [torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*pieces, strict=True)]
        return outputs, self._remember("encode", grid, past or ())

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        del last
        B, _, rows, h, w = latent_BCthw.shape
        past = None if state is None else state.tensors
        pieces = []
        for start, stop in self._steps(rows, B, (h, w)):
            latent = latent_BCthw[:, :, start:stop].to(self.device, self.input_dtype)
            piece, past = self._decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), past)
            pieces.append(piece)
        video = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return video, self._remember("decode", (h, w), past or ())

    def _steps(self, rows: int, batch: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
        step = max(1, STEP_TOKENS // (batch * grid[0] * grid[1]))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.network, self.config, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.network, self.config, self.device, self.dtype)


def build(
    spec: LatentSpec,
    config: dict[str, Any],
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    *,
    info: CheckpointInfo | None = None,
    untrained: int | None = None,
) -> LeanVAE:
    """The VAE of these weights.

    Raises:
        ValueError: keys or shapes that are not this configuration's, or non-finite weights.
    """
    network = empty_network(config)
    check_keys(spec.network, network.state_dict(), weights)
    check_finite(spec.network, weights)
    network.load_state_dict({key: value.detach().cpu().clone() for key, value in weights.items()}, assign=True)
    network.requires_grad_(False).eval()
    if device.type != "cpu":
        spec = dataclasses.replace(spec, chunking="rounding")
    return LeanVAE(network, spec, config, hash_weights(weights), device, dtype, info, untrained)
