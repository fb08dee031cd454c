"""LeanVAE: 4x8x8, causal, a Haar transform and linear patches around NAF layers, latents by compressed sensing.

Enters: published weights and configuration; videos `B 3 T H W` in [-0.5, 0.5] (first chunk 4n+1 frames, later ones 4n) or latents.
Leaves: raw posterior means `B d t H/8 W/8`, videos, and the causal state for the next chunk.

This file checks, steps through chunks and hands the state on. The arithmetic is in `model.leanvae_coder` (with `model.haar` and
`model.tokens`), the parameters in `model.leanvae_parameters`. Nothing keeps state between calls.
"""

from __future__ import annotations

import dataclasses
import warnings
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model import state as causal
from model.colour import PlanesDoor
from model.leanvae_coder import PIXELS, Decoder, Encoder, first_frame
from model.leanvae_parameters import empty_network, random_weights
from model.posterior import Posterior
from model.tokens import wide_dtype
from model.weights import check_finite, check_keys, hash_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.checkpoint import CheckpointInfo
    from model.interface import LatentSpec
    from model.leanvae_parameters import Network
    from model.state import CausalState
    from model.tokens import Projection

__all__ = ["NUMERICS", "LeanVAE", "build", "random_weights"]

NUMERICS = 1  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint

STEP_TOKENS = 65536  # a chunk longer than this is stepped through, so that memory does not grow with it
LOGVAR_RANGE = (-30.0, 20.0)


class LeanVAE(PlanesDoor):
    """LeanVAE ready to run; see `model.interface.VideoVAE` for the contract.

    On a CPU latents and videos are bit for bit the same under any chunking and any batch; on other devices to rounding
    (`spec.chunking` says which). `decode` needs no look-ahead, so `last` changes nothing here.

    Attributes:
        spec: LatentSpec. config: published configuration keys. numerics: version of this code's arithmetic.
        weights_sha256: hash of the weights' values. checkpoint: CheckpointInfo or None. untrained: True for random weights of `seed`.
        device, dtype: where, and in which arithmetic the large products run. network: parameters under their published names.
    """

    numerics = NUMERICS

    def __init__(
        self,
        network: Network,
        spec: LatentSpec,
        config: dict[str, Any],
        weights_sha256: str,
        device: torch.device,
        dtype: torch.dtype,
        checkpoint: CheckpointInfo | None = None,
        seed: int | None = None,
    ) -> None:
        self.network, self.spec, self.config, self.weights_sha256 = network, spec, config, weights_sha256
        self.device, self.dtype, self.input_dtype = device, dtype, wide_dtype(dtype)
        self.checkpoint, self.seed, self.untrained = checkpoint, seed, seed is not None
        self._owner = f"{spec.network} {weights_sha256[:12]} {str(dtype).removeprefix('torch.')}"
        self._warned = False

    def __repr__(self) -> str:
        origin = f"untrained, seed {self.seed}" if self.untrained else f"weights {self.weights_sha256[:12]}"
        return f"LeanVAE({self.spec.network}, {origin}, {self.dtype} on {self.device})"

    def encode(
        self, video_BCTHW: torch.Tensor, state: CausalState | None = None, *, moments: bool = False
    ) -> tuple[Posterior, CausalState]:
        """Floating video `B 3 T H W` in [-0.5, 0.5] -> raw posterior `B d t H/8 W/8` (float32, or float64), state.

        Without `state` T is 4n+1 (one frame is an image), with it 4n. `moments=True` adds the log-variance; the mean is the same bits.

        Raises:
            ValueError: wrong rank, dtype, frame count or size; a state of another network, batch or size.
        """
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        if state is None and not self._warned and (complaint := inputs.range_complaint(video_BCTHW, self.spec)):
            self._warned = True
            warnings.warn(complaint, stacklevel=2)
        return self._encode(video_BCTHW, state, moments=moments)

    @torch.no_grad()
    def _encode(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, *, moments: bool
    ) -> tuple[Posterior, CausalState]:
        heads = [self._encoder.mean_heads, self._encoder.logvar_heads][: 1 + moments]
        (mean, *rest), state = self._run_encoder(video_BCTHW, state, heads)
        logvar = rest[0].clamp_(*LOGVAR_RANGE) if moments else None
        return Posterior(mean, logvar), state

    @torch.no_grad()
    def features(self, video_BCTHW: torch.Tensor, state: CausalState | None = None) -> tuple[torch.Tensor, CausalState]:
        """What the heads read: `B C t H/8 W/8`. Arguments as `encode`."""
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        encoder = self._encoder
        heads = (
            encoder.project(torch.eye(encoder.width), wide=True),
            encoder.project(encoder.fusion_layers[-1].narrow_weight(), wide=True),
        )
        (features,), state = self._run_encoder(video_BCTHW, state, [heads])
        return features, state

    def _run_encoder(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, heads: Sequence[tuple[Projection, Projection]]
    ) -> tuple[list[torch.Tensor], CausalState]:
        B, _, T, H, W = video_BCTHW.shape
        grid = (H // PIXELS, W // PIXELS)
        past = self._past(state, "encode", B, grid)
        rows = inputs.check_frames(T, self.spec, first=past is None)
        image, pieces = past is None, []
        for start, stop in self._steps(rows, B, grid):
            frames = slice(first_frame(start, image), first_frame(stop, image))
            piece, past = self._encoder(video_BCTHW[:, :, frames].to(self.device, self.input_dtype), past, heads)
            pieces.append(piece)
        outputs = [torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*pieces, strict=True)]
        return outputs, causal.CausalState(self._owner, "encode", grid, past or ())

    @torch.no_grad()
    def decode(
        self, latent_BCthw: torch.Tensor, state: CausalState | None = None, *, last: bool = True
    ) -> tuple[torch.Tensor, CausalState]:
        """Raw latents `B d t h w` -> video `B 3 T 8h 8w` (float32, or float64; not clamped), state.

        Without `state` T is 4(t-1)+1, with it 4t.

        Raises:
            ValueError: wrong rank, dtype or channels; a state of another network, batch or size.
        """
        del last
        inputs.check_latent(latent_BCthw, self.spec)
        B, _, rows, h, w = latent_BCthw.shape
        past = self._past(state, "decode", B, (h, w))
        pieces = []
        for start, stop in self._steps(rows, B, (h, w)):
            latent = latent_BCthw[:, :, start:stop].to(self.device, self.input_dtype)
            piece, past = self._decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), past)
            pieces.append(piece)
        video = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return video, causal.CausalState(self._owner, "decode", (h, w), past or ())

    def stack_states(self, states: Sequence[CausalState]) -> CausalState:
        """Batches concatenated in order. Raises ValueError for none, or for states of different networks or sizes."""
        return causal.stack(states)

    def split_state(self, state: CausalState) -> list[CausalState]:
        """States of batch one that own their memory."""
        return causal.split(state)

    def _past(
        self, state: CausalState | None, kind: str, batch: int, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, ...] | None:
        if state is None:
            return None
        causal.check(state, owner=self._owner, kind=kind, batch=batch, grid=grid, device=self.device)
        return state.tensors

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
