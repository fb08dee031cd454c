"""IV-VAE: 4x8x8, group-causal, a key-frame branch and a motion branch that read each other in every convolution.

Enters: published weights and configuration; videos `B 3 T H W` in [-1, 1] (first chunk 4n+1 frames, later ones 4n) or latents.
Leaves: raw posterior means `B z t H/8 W/8` (the authors' constants `(z - shift) * scale` are in the spec, not applied), videos, and the
causal state for the next chunk: the last input frame of every 3x3x3 convolution.

This file checks, steps through chunks and hands the state on. The arithmetic is in `model.ivvae.coder`, the parameters in
`model.ivvae.parameters`. Nothing keeps state between calls.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from model import inputs
from model.ivvae.coder import Decoder, Encoder
from model.ivvae.heads import GROUP
from model.ivvae.parameters import empty_network, random_weights
from model.vae import CausalVAE
from model.weights import check_weights, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from model.interface import LatentSpec
    from model.ivvae.parameters import Network
    from model.state import CausalState
    from model.weights import CheckedWeights, WeightsSha256


__all__ = ["IVVAE", "NUMERICS", "build", "check", "random_weights"]

NUMERICS = 1  # raise whenever the same weights and frames would give other bits; part of every build's fingerprint

Past = tuple[torch.Tensor, ...]


class IVVAE(CausalVAE):
    """IV-VAE ready to run; see `model.interface.VideoVAE` for the contract.

    On a CPU one latent of one video is worked on at a time, so latents and videos are bit for bit the same under any chunking and any
    batch, and memory is that of four frames; on other devices a chunk's groups and videos go together and results are the same to rounding
    (`spec.chunking` says which). `decode` needs no look-ahead, so `last` changes nothing here. The log-variance is not clamped.

    Attributes, besides those of `CausalVAE`:
        network: parameters under their published names.
    """

    numerics = NUMERICS

    def __init__(self, network: Network, *arguments: Any, **provenance: Any) -> None:
        super().__init__(*arguments, **provenance)
        self.network = network
        self.stepwise = self.device.type == "cpu"  # one latent of one video at a time

    def _run_encoder(
        self, video_BCTHW: torch.Tensor, state: CausalState | None, *, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, CausalState]:
        B, T = video_BCTHW.shape[0], video_BCTHW.shape[2]
        buffers: dict[str, torch.Tensor] = {}

        def step(videos: slice, rows: slice, past: Past | None) -> tuple[torch.Tensor, Past]:
            first = 1 - GROUP if state is None else 0  # frame at which row 0 would begin, had it four
            frames = slice(max(0, GROUP * rows.start + first), GROUP * rows.stop + first)
            part = video_BCTHW[videos, :, frames].to(self.device, self.input_dtype)
            outputs, past = self._encoder(part, past, buffers, moments=moments)
            return torch.stack(outputs), past

        rows = inputs.check_frames(T, self.spec, first=state is None)
        moments_KtBhwC, past = self._walk(step, B, rows, state, time_axis=1)
        mean, *logvar = moments_KtBhwC.permute(0, 2, 5, 1, 3, 4).contiguous()
        return mean, logvar[0] if moments else None, self._remember("encode", self._grid_of(video_BCTHW), past)

    def _run_decoder(
        self, latent_BCthw: torch.Tensor, state: CausalState | None, *, last: bool
    ) -> tuple[torch.Tensor, CausalState]:
        del last
        B, _, rows, h, w = latent_BCthw.shape
        buffers: dict[str, torch.Tensor] = {}

        def step(videos: slice, rows: slice, past: Past | None) -> tuple[torch.Tensor, Past]:
            return self._decoder(latent_BCthw[videos, :, rows].to(self.device, self.input_dtype), past, buffers)

        video_TBHWC, past = self._walk(step, B, rows, state, time_axis=0)
        return video_TBHWC.permute(1, 4, 0, 2, 3).contiguous(), self._remember("decode", (h, w), past)

    def _walk(
        self,
        step: Callable[[slice, slice, Past | None], tuple[torch.Tensor, Past]],
        batch: int,
        rows: int,
        state: CausalState | None,
        *,
        time_axis: int,
    ) -> tuple[torch.Tensor, Past]:
        """Steps through latent rows with the memory handed on; the batch stands behind time in what `step` gives."""
        outputs, pasts = [], []
        for videos in self._video_steps(batch):
            past = None if state is None else tuple(tensor[videos] for tensor in state.tensors)
            pieces = []
            for part in self._row_steps(rows, lead=state is None):
                piece, past = step(videos, part, past)
                pieces.append(piece)
            outputs.append(torch.cat(pieces, dim=time_axis))
            pasts.append(past or ())
        memory = pasts[0] if len(pasts) == 1 else tuple(torch.cat(parts) for parts in zip(*pasts, strict=True))
        return torch.cat(outputs, dim=time_axis + 1), memory

    def _video_steps(self, batch: int) -> Iterator[slice]:
        step = 1 if self.stepwise else batch
        return (slice(start, start + step) for start in range(0, batch, step))

    def _row_steps(self, rows: int, *, lead: bool) -> Sequence[slice]:
        """The clip's first latent is always alone; after it one at a time on a CPU, all at once elsewhere."""
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
    """Weights compared with their network, which is not built.

    Raises:
        ValueError: keys or shapes that are not this configuration's, or non-finite weights.
    """
    return check_weights(empty_network(config), spec, config, weights)


def build(
    checked: CheckedWeights, sha256: WeightsSha256, device: torch.device, dtype: torch.dtype, **provenance: Any
) -> IVVAE:
    """The VAE of these weights; `provenance`: `checkpoint` or `seed`."""
    spec = checked.spec.on_device(device.type)
    return IVVAE(fill(checked), spec, checked.config, sha256, device, dtype, **provenance)
