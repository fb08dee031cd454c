"""LeanVAE ready to run: splits chunks into steps, passes the causal state on, replays recorded steps on CUDA.

Takes videos `B 3 T H W` in `spec.value_range` (first chunk 4n+1 frames, later ones 4n), uint8 planes, or latents; returns raw
posterior means `B d t h w` or videos, and the state for the next chunk. The arithmetic is in `model.leanvae.fast.coder`, the network in
`model.leanvae.network`. Nothing of a video is kept between calls.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs, kernels
from model.kernels.graphs import StepGraphs
from model.leanvae.fast.coder import Decoder, Encoder
from model.leanvae.fast.pixels import FloatPixels, PlanePixels, first_frame
from model.leanvae.network import empty_network
from model.leanvae.random_weights import random_weights
from model.posterior import LOGVAR_RANGE, Posterior
from model.vae import CausalVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from model.interface import LatentSpec
    from model.leanvae.fast.pixels import Pixels
    from model.leanvae.fast.tokens import Projection
    from model.leanvae.network import Network
    from model.state import CausalState
    from model.vae import Pixels as Source
    from model.vae import StateTensors
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["NUMERICS", "LeanVAE", "build", "check", "random_weights"]

NUMERICS = 2  # increase when the same weights and frames give other bits; part of every build's fingerprint

# Larger chunks are split into steps of this many tokens, so that memory does not grow with the chunk. A GPU gets more rows per
# step, because every step copies the state of every layer.
STEP_TOKENS, STEP_TOKENS_GPU = 1 << 16, 1 << 19


class LeanVAE(CausalVAE):
    """LeanVAE ready to run; implements `model.interface.VideoVAE`.

    On a CPU latents and videos have the same bits for any chunking and any batch; on other devices they are equal up to rounding
    (`spec.chunking` says which). `decode` needs no look-ahead, so `last` has no effect.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
        backend: "plain" or "fused", see `model.kernels.choose`; the same latents up to rounding.
    """

    numerics = NUMERICS

    def __init__(self, network: Network, *arguments: Any, backend: str | None = None, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network = network
        self.backend = kernels.choose(self.device, self.dtype, backend)
        self._kernels = kernels.load(self.backend)
        self._graphs = StepGraphs() if self.device.type == "cuda" and self.backend == "fused" else None

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.backend})"

    def with_backend(self, backend: str) -> LeanVAE:
        """The same weights, device and dtype on another backend.

        Raises:
            ValueError: an unknown backend, or one that cannot run here.
        """
        provenance = (self.spec, self.config, self.sha256, self.device, self.dtype, self.checkpoint, self.seed)
        return LeanVAE(self.network, *provenance, backend=backend)

    def encode_planes(
        self,
        planes_BT3HW: torch.Tensor,
        matrices: Sequence[str],
        state: CausalState | None = None,
        *,
        moments: bool = False,
    ) -> tuple[Posterior, CausalState]:
        """As `CausalVAE.encode_planes`. Planes become pixel rows a few frames at a time; the whole float video is never in memory."""
        inputs.check_planes(planes_BT3HW, self.spec, first=state is None)
        planes_BT3HW = planes_BT3HW.to(self.device, non_blocking=True)
        dtype = self._encoder.pixel_dtype
        pixels = PlanePixels(planes_BT3HW, matrices, self.spec.value_range, dtype, self._kernels)
        with self._arithmetic():
            mean, logvar, after = self._posterior(pixels, state, moments=moments)
        return Posterior(mean, logvar), after

    def _run_encoder(
        self, pixels: Source, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        video = FloatPixels(pixels.whole(), self.device, self._encoder.pixel_dtype)
        return self._posterior(video, state, moments=moments)

    def features(self, video_BCTHW: torch.Tensor, state: CausalState | None = None) -> tuple[torch.Tensor, CausalState]:
        """Input of the posterior heads: `B C t H/8 W/8`. Arguments as for `encode`."""
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        encoder = self._encoder
        heads = (
            encoder.project(torch.eye(encoder.width), full_precision=True),
            encoder.project(encoder.fusion_layers[-1].narrow_weight(), full_precision=True),
        )
        pixels = FloatPixels(video_BCTHW, self.device, encoder.pixel_dtype)
        with self._arithmetic():
            (features,), state = self._run_heads(pixels, state, [heads], None)
        return features, state

    def _posterior(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        heads = [self._encoder.mean_heads, self._encoder.logvar_heads][: 1 + moments]
        (mean, *rest), state = self._run_heads(pixels, state, heads, self._graphs)
        return mean, rest[0].clamp_(*LOGVAR_RANGE) if moments else None, state

    def _on_device(self) -> AbstractContextManager[object]:
        """Context that makes the network's CUDA device current; kernels run on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run_heads(
        self,
        pixels: Pixels,
        state: CausalState | None,
        heads: Sequence[tuple[Projection, Projection]],
        graphs: StepGraphs | None,
    ) -> tuple[list[torch.Tensor], CausalState]:
        height, width = pixels.size
        grid = (height // self.spec.space_stride, width // self.spec.space_stride)
        self._check_state(state, "encode", pixels.batch, grid)
        past = None if state is None else state.tensors
        rows = inputs.check_frames(pixels.frames, self.spec, first=past is None)
        image, pieces = past is None, []
        for start, stop in self._steps(rows, pixels.batch, grid):
            frames = slice(first_frame(start, image), first_frame(stop, image))
            with self._on_device():
                piece, past = self._encode_step(pixels.select_frames(frames), past, heads, graphs)
            pieces.append(piece)
        outputs = [torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*pieces, strict=True)]
        return outputs, self._next_state("encode", grid, past or ())

    def _encode_step(
        self,
        pixels: Pixels,
        past: StateTensors | None,
        heads: Sequence[tuple[Projection, Projection]],
        graphs: StepGraphs | None,
    ) -> tuple[Sequence[torch.Tensor], StateTensors]:
        """One run of the encoder, recorded and replayed if `graphs` is given."""
        if graphs is None:
            return self._encoder(pixels, past, heads)
        frames = pixels.tensors()

        def step(*tensors: torch.Tensor) -> StateTensors:
            before = tensors[len(frames) :] or None
            outputs, after = self._encoder(pixels.from_tensors(tensors[: len(frames)]), before, heads)
            return (*outputs, *after)

        results = graphs.run((type(pixels), len(heads)), step, (*frames, *(past or ())))
        return results[: len(heads)], results[len(heads) :]

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        del last
        B, _, rows, h, w = latent_BCthw.shape
        past = None if state is None else state.tensors
        pieces = []
        for start, stop in self._steps(rows, B, (h, w)):
            latent = latent_BCthw[:, :, start:stop].to(self.device, self.input_dtype)
            with self._on_device():
                piece, past = self._decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), past)
            pieces.append(piece)
        video = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return video, self._next_state("decode", (h, w), past or ())

    def _steps(self, rows: int, batch: int, grid: tuple[int, int]) -> list[tuple[int, int]]:
        tokens = STEP_TOKENS if self.device.type == "cpu" else STEP_TOKENS_GPU
        step = max(1, tokens // (batch * grid[0] * grid[1]))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.network, self.config, self.device, self.dtype, self._kernels)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.network, self.config, self.device, self.dtype, self._kernels)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    return check_weights(empty_network(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> LeanVAE:
    """Network with these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return LeanVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
