"""LeanVAE on fused kernels, a step at a time; steps whose shapes come back are replayed as CUDA graphs.

Takes the pixels of each step, or latents, with the tensors of a state; returns posterior heads or a video, and the next state's tensors.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from model.kernels.graphs import StepGraphs
from model.leanvae.fast.coder import Decoder, Encoder

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from model.history import StateTensors
    from model.kernels import Kernels
    from model.leanvae.fast.pixels import StepPixels
    from model.leanvae.network import Network


class FusedRunner:
    """Runs fused encoder and decoder steps. `graphs`: recorded encoder steps, None on a CPU."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        self.kernels = kernels
        self._network, self._device, self._dtype = network, device, dtype
        self.graphs = StepGraphs() if device.type == "cuda" else None

    @cached_property
    def encoder(self) -> Encoder:
        """Encoder with prepared weights."""
        return Encoder(self._network, self._device, self._dtype, self.kernels)

    @cached_property
    def decoder(self) -> Decoder:
        """Decoder with prepared weights."""
        return Decoder(self._network, self._device, self._dtype, self.kernels)

    def encode(
        self, steps: Iterable[StepPixels], past: StateTensors | None, heads: int
    ) -> tuple[list[torch.Tensor], StateTensors]:
        """Outputs `B d t h w` of that many heads over all steps, the next state's tensors."""
        pieces = []
        for pixels in steps:
            with self._on_device():
                outputs, past = self._encode_step(pixels, past, heads)
            pieces.append(outputs)
        joined = [torch.cat(parts, dim=1).permute(0, 4, 1, 2, 3).contiguous() for parts in zip(*pieces, strict=True)]
        return joined, past or ()

    def decode(self, steps: Iterable[torch.Tensor], past: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
        """Video `B 3 T H W` of the latents `B d t h w` of all steps, the next state's tensors."""
        pieces = []
        for latent_BCthw in steps:
            with self._on_device():
                piece, past = self.decoder(latent_BCthw.permute(0, 2, 3, 4, 1).contiguous(), past)
            pieces.append(piece)
        return torch.cat(pieces, dim=2), past or ()

    def _encode_step(
        self, pixels: StepPixels, past: StateTensors | None, heads: int
    ) -> tuple[list[torch.Tensor], StateTensors]:
        """One run of the encoder, recorded and replayed if there are graphs."""
        if self.graphs is None:
            return self.encoder(pixels, past, heads)
        count = len(pixels.tensors)

        def step(*tensors: torch.Tensor) -> StateTensors:
            outputs, after = self.encoder(pixels.of(tensors[:count]), tensors[count:] or None, heads)
            return (*outputs, *after)

        results = self.graphs.run((type(pixels), heads), step, (*pixels.tensors, *(past or ())))
        return list(results[:heads]), results[heads:]

    def _on_device(self) -> AbstractContextManager[object]:
        """Context that makes the network's CUDA device current; kernels run on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
