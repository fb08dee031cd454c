"""LeanVAE ready to run: its definition in steps, or on CUDA in 16 bits fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model import inputs, kernels
from model.colour import rgb_map
from model.leanvae.fast.pixels import FloatPixels, PlanePixels
from model.leanvae.fast.runner import FusedRunner
from model.leanvae.network import Network
from model.leanvae.random_weights import random_weights
from model.posterior import LOGVAR_RANGE, Posterior
from model.stepped_vae import SteppedVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from model.interface import LatentSpec
    from model.leanvae.fast.pixels import StepPixels
    from model.state import CausalState
    from model.vae import Pixels
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["NUMERICS", "LeanVAE", "build", "check", "random_weights"]

NUMERICS = 3  # increase when the same weights and frames give other bits; part of every build's fingerprint


class LeanVAE(SteppedVAE):
    """LeanVAE ready to run; implements `model.interface.VideoVAE`. `decode` needs no look-ahead, so `last` has no effect.

    Attributes, besides those of `SteppedVAE`:
        backend: "plain" (the definition) or "fused", see `model.kernels.choose`; the same latents up to rounding.
        fused: the fused network, or None.
    """

    numerics = NUMERICS

    def __init__(self, network: Network, *arguments: Any, backend: str | None = None, **provenance: Any) -> None:
        super().__init__(network, *arguments, **provenance)
        if self.compiled and backend == "fused":
            raise ValueError(
                "fused kernels cannot be compiled; load the network without compile, or take backend 'plain'"
            )
        self.backend = kernels.choose(self.device, self.dtype, "plain" if self.compiled else backend)
        loaded = kernels.load(self.backend)
        self.fused = None if loaded is None else FusedRunner(network, self.device, self.dtype, loaded)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, {self.backend})"

    def with_backend(self, backend: str) -> LeanVAE:
        """The same weights, device and dtype on another backend; after `drop_decoder` without a decoder as well.

        Raises:
            ValueError: an unknown backend, or one that cannot run here.
        """
        provenance = (self.spec, self.config, self.sha256, self.device, self.dtype, self.checkpoint, self.seed)
        other = LeanVAE(self.network, *provenance, backend=backend)
        other._decodes = self._decodes
        return other

    def encode_planes(
        self,
        planes_BT3HW: torch.Tensor,
        matrices: Sequence[str],
        state: CausalState | None = None,
        *,
        moments: bool = False,
    ) -> tuple[Posterior, CausalState]:
        """As `CausalVAE.encode_planes`. Fused kernels read the planes themselves."""
        fused = self.fused
        if fused is None:
            return super().encode_planes(planes_BT3HW, matrices, state, moments=moments)
        pixels = self._pixels_of(planes_BT3HW, matrices, first=state is None)
        planes = planes_BT3HW.to(self.device, non_blocking=True)
        colours = rgb_map(matrices, self.spec.value_range).float()
        colours = colours.to(self.device, non_blocking=True)  # must not wait for the device
        how = self.spec.value_range, fused.encoder.pixel_dtype, fused.kernels

        def step(frames: slice) -> StepPixels:
            return PlanePixels((planes[:, frames], colours), *how)

        self._check_state(state, "encode", pixels.batch, self._grid(pixels.size))
        with self._arithmetic():
            mean, logvar, after = self._run_fused(fused, pixels, step, state, moments=moments)
        return Posterior(mean, logvar), after

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        fused = self.fused
        if fused is None:
            return super()._run_encoder(pixels, state, moments=moments)

        def step(frames: slice) -> StepPixels:
            return FloatPixels((pixels.part(slice(None), frames).to(fused.encoder.pixel_dtype),))

        return self._run_fused(fused, pixels, step, state, moments=moments)

    def _run_fused(
        self,
        fused: FusedRunner,
        pixels: Pixels,
        step: Callable[[slice], StepPixels],
        state: CausalState | None,
        *,
        moments: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        """`_run_encoder` on fused kernels; `step(frames)` gives a step's pixels."""
        first, grid = state is None, self._grid(pixels.size)
        rows = inputs.check_frames(pixels.frames, self.spec, first=first)
        steps = (step(self._frames(span, first)) for span in self._spans(rows, pixels.batch * grid[0] * grid[1]))
        past = None if state is None else state.tensors
        (mean, *rest), tensors = fused.encode(steps, past, 1 + moments)
        return mean, rest[0].clamp_(*LOGVAR_RANGE) if moments else None, self._next_state("encode", grid, tensors)

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        if self.fused is None:
            return super()._run_decoder(latent_BCthw, state, last=last)
        B, _, rows, h, w = latent_BCthw.shape
        spans = self._spans(rows, B * h * w)
        steps = (latent_BCthw[:, :, span].to(self.device, self.input_dtype) for span in spans)
        video, tensors = self.fused.decode(steps, None if state is None else state.tensors)
        return video, self._next_state("decode", (h, w), tensors)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    return check_weights(Network.empty(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> LeanVAE:
    """Network with these weights; `provenance`: `checkpoint` or `seed`, and `compiled`."""
    spec = checked.spec.on_device(device.type)
    return LeanVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
