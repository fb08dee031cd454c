"""IV-VAE ready to stream: splits chunks into steps and passes the causal state on.

Takes videos `B 3 T H W` in [-1, 1] (first chunk 4n+1 frames, later ones 4n) or latents; returns raw posterior means `B z t H/8 W/8` (the
authors' `(z - shift) * scale` is not applied; the constants are in the spec) or videos, and the state: the last input frame of every 3x3x3
convolution. The arithmetic is in `model.ivvae.fast.coder`, the network in `model.ivvae.network`.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model.ivvae.fast.coder import Decoder, Encoder
from model.ivvae.network import GROUP, empty_network
from model.ivvae.random_weights import random_weights
from model.vae import CausalVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from model.interface import LatentSpec
    from model.ivvae.network import Network
    from model.state import CausalState
    from model.vae import Pixels, StateTensors
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["IVVAE", "NUMERICS", "build", "check", "random_weights"]

NUMERICS = 1  # increase when the same weights and frames give other bits; part of every build's fingerprint


class IVVAE(CausalVAE):
    """IV-VAE ready to run; implements `model.interface.VideoVAE`.

    On a CPU one latent of one video is computed at a time, so latents and videos have the same bits for any chunking and any
    batch, and memory is that of four frames. On other devices the groups and videos of a chunk are computed together, and results
    are equal up to rounding (`spec.chunking` says which). `decode` needs no look-ahead, so `last` has no effect. The log-variance
    is not clamped.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
    """

    numerics = NUMERICS

    def __init__(self, network: Network, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network = network
        self.stepwise = self.device.type == "cpu"  # one latent of one video at a time

    def _run_encoder(
        self, pixels: Pixels, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        video_BCTHW = pixels.whole()
        B, T = video_BCTHW.shape[0], video_BCTHW.shape[2]
        buffers: dict[str, torch.Tensor] = {}

        def step(videos: slice, rows: slice, past: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
            first = (
                1 - GROUP if state is None else 0
            )  # index of the frame where row 0 would start if it had four frames
            frames = slice(max(0, GROUP * rows.start + first), GROUP * rows.stop + first)
            part = video_BCTHW[videos, :, frames].to(self.device, self.input_dtype)
            outputs, past = self._encoder(part, past, buffers, moments=moments)
            return torch.stack(outputs), past

        rows = inputs.check_frames(T, self.spec, first=state is None)
        moments_KtBhwC, past = self._walk(step, B, rows, state, time_axis=1)
        mean, *logvar = moments_KtBhwC.permute(0, 2, 5, 1, 3, 4).contiguous()
        return mean, logvar[0] if moments else None, self._next_state("encode", self._grid(pixels.size), past)

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        del last
        B, _, rows, h, w = latent_BCthw.shape
        buffers: dict[str, torch.Tensor] = {}

        def step(videos: slice, rows: slice, past: StateTensors | None) -> tuple[torch.Tensor, StateTensors]:
            return self._decoder(latent_BCthw[videos, :, rows].to(self.device, self.input_dtype), past, buffers)

        video_TBHWC, past = self._walk(step, B, rows, state, time_axis=0)
        return video_TBHWC.permute(1, 4, 0, 2, 3).contiguous(), self._next_state("decode", (h, w), past)

    def _walk(
        self,
        step: Callable[[slice, slice, StateTensors | None], tuple[torch.Tensor, StateTensors]],
        batch: int,
        rows: int,
        state: CausalState | None,
        *,
        time_axis: int,
    ) -> tuple[torch.Tensor, StateTensors]:
        """Runs `step` over latent rows and passes the state on; in its results the batch axis follows the time axis."""
        outputs, pasts = [], []
        for videos in self._video_steps(batch):
            past = None if state is None else tuple(tensor[videos] for tensor in state.tensors)
            pieces = []
            for part in self._row_steps(rows, lead=state is None):
                piece, past = step(videos, part, past)
                pieces.append(piece)
            outputs.append(torch.cat(pieces, dim=time_axis))
            pasts.append(past or ())
        after = pasts[0] if len(pasts) == 1 else tuple(torch.cat(parts) for parts in zip(*pasts, strict=True))
        return torch.cat(outputs, dim=time_axis + 1), after

    def _video_steps(self, batch: int) -> Iterator[slice]:
        step = 1 if self.stepwise else batch
        return (slice(start, start + step) for start in range(0, batch, step))

    def _row_steps(self, rows: int, *, lead: bool) -> Sequence[slice]:
        """Latent rows of each step: the clip's first latent alone; then one at a time on a CPU, all at once on other devices."""
        first = [slice(0, 1)] if lead else []
        start = len(first)
        step = 1 if self.stepwise else max(1, rows - start)
        return [*first, *(slice(row, min(row + step, rows)) for row in range(start, rows, step))]

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.network, self.device, self.dtype)

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.network, self.device, self.dtype)


def check(spec: LatentSpec, config: dict[str, Any], weights: Mapping[str, torch.Tensor]) -> CheckedWeights:
    """Compares weights with the network of this configuration, without building it.

    Raises:
        ValueError: keys or shapes of another configuration, or non-finite weights.
    """
    return check_weights(empty_network(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> IVVAE:
    """Network with these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return IVVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
