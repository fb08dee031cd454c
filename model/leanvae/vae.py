"""LeanVAE: 4x8x8 or 4x16x16, causal, a Haar transform and linear patches around NAF layers, latents by compressed sensing.

Enters: published weights and configuration; videos `B 3 T H W` in `spec.value_range` (first chunk 4n+1 frames, later ones 4n), uint8
planes, or latents. Leaves: raw posterior means `B d t h w`, videos, and the causal state for the next chunk.

This file checks, steps through chunks and hands the state on. The arithmetic is in `model.leanvae.coder` (with `haar`, `pixels`, `tokens`
and `fused` beside it), the parameters in `model.leanvae.parameters`. Nothing of a video is kept between calls.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs, kernels
from model.kernels.graphs import StepGraphs
from model.leanvae.coder import Decoder, Encoder
from model.leanvae.parameters import empty_network, random_weights
from model.leanvae.pixels import FloatPixels, PlanePixels, first_frame
from model.posterior import Posterior
from model.vae import CausalVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from model.interface import LatentSpec
    from model.leanvae.parameters import Network
    from model.leanvae.pixels import Pixels
    from model.leanvae.tokens import Projection
    from model.state import CausalState
    from model.vae import Memory
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["NUMERICS", "LeanVAE", "build", "check", "random_weights"]

NUMERICS = 2  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint

# A chunk of more tokens than this is stepped through, so that memory does not grow with it. A GPU wants more rows at a time: the state
# of every layer is copied once a step.
STEP_TOKENS, STEP_TOKENS_GPU = 1 << 16, 1 << 19
LOGVAR_RANGE = (-30.0, 20.0)


class LeanVAE(CausalVAE):
    """LeanVAE ready to run; see `model.interface.VideoVAE` for the contract.

    On a CPU latents and videos are bit for bit the same under any chunking and any batch; on other devices to rounding
    (`spec.chunking` says which). `decode` needs no look-ahead, so `last` changes nothing here.

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
        """The same weights, device and arithmetic on another backend.

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
        """As `CausalVAE.encode_planes`. Planes become pixel rows a few frames at a time; a float video never exists as a whole."""
        inputs.check_planes(planes_BT3HW, self.spec, first=state is None)
        planes_BT3HW = planes_BT3HW.to(self.device, non_blocking=True)
        dtype = self._encoder.pixel_dtype
        pixels = PlanePixels(planes_BT3HW, matrices, self.spec.value_range, dtype, self._kernels)
        with self._arithmetic():
            mean, logvar, after = self._posterior(pixels, state, moments=moments)
        return Posterior(mean, logvar), after

    def _run_encoder(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        pixels = FloatPixels(video_BCTHW, self.device, self._encoder.pixel_dtype)
        return self._posterior(pixels, state, moments=moments)

    def features(self, video_BCTHW: torch.Tensor, state: CausalState | None = None) -> tuple[torch.Tensor, CausalState]:
        """What the heads read: `B C t H/8 W/8`. Arguments as `encode`."""
        inputs.check_video(video_BCTHW, self.spec, first=state is None)
        encoder = self._encoder
        heads = (
            encoder.project(torch.eye(encoder.width), wide=True),
            encoder.project(encoder.fusion_layers[-1].narrow_weight(), wide=True),
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

    def _here(self) -> AbstractContextManager[object]:
        """Kernels run on the current CUDA device; this makes it the network's."""
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
            with self._here():
                piece, past = self._encode_step(pixels.cut(frames), past, heads, graphs)
            pieces.append(piece)
        outputs = [torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*pieces, strict=True)]
        return outputs, self._remember("encode", grid, past or ())

    def _encode_step(
        self,
        pixels: Pixels,
        past: Memory | None,
        heads: Sequence[tuple[Projection, Projection]],
        graphs: StepGraphs | None,
    ) -> tuple[Sequence[torch.Tensor], Memory]:
        """One run of the encoder, recorded and replayed where `graphs` are given."""
        if graphs is None:
            return self._encoder(pixels, past, heads)
        given = pixels.tensors()

        def step(*tensors: torch.Tensor) -> Memory:
            before = tensors[len(given) :] or None
            outputs, after = self._encoder(pixels.of_tensors(tensors[: len(given)]), before, heads)
            return (*outputs, *after)

        done = graphs.run((type(pixels), len(heads)), step, (*given, *(past or ())))
        return done[: len(heads)], done[len(heads) :]

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        del last
        B, _, rows, h, w = latent_BCthw.shape
        past = None if state is None else state.tensors
        pieces = []
        for start, stop in self._steps(rows, B, (h, w)):
            latent = latent_BCthw[:, :, start:stop].to(self.device, self.input_dtype)
            with self._here():
                piece, past = self._decoder(latent.permute(0, 2, 3, 4, 1).contiguous(), past)
            pieces.append(piece)
        video = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return video, self._remember("decode", (h, w), past or ())

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
    """Weights compared with their network, which is not built.

    Raises:
        ValueError: keys or shapes that are not this configuration's, or non-finite weights.
    """
    return check_weights(empty_network(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> LeanVAE:
    """The VAE of these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return LeanVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
