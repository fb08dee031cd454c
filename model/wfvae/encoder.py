"""WF-VAE's encoder prepared for running: Haar transforms are folded into the convolutions that read them.

Enters: parameters, then the frames a step brings and its `Memory`. Leaves: what the posterior heads give, `B t h w d`.
No checks and no chunking here; `model.wfvae.vae` does both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from model.wfvae import wavelets
from model.wfvae.blocks import Attention, Bench, Norm, Residual, Shrink
from model.wfvae.blocks import Frames as FrameBlock
from model.wfvae.facts import time_stride

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.convolution import ClipConv
    from model.wfvae.memory import Memory


class Band:
    """One level of the transform: cells of the image below, its low band, and the convolution that reads the bands."""

    def __init__(self, bench: Bench, filters: torch.Tensor, conv: Any) -> None:
        self.volume = filters.shape[0] == 8
        self.analysis = wavelets.per_colour(filters).to(bench.device, bench.wide)
        self.conv = FrameBlock(bench, conv, wide=True, weight=wavelets.fold_analysis(conv.weight, filters))

    def cells(self, image_BTHWC: torch.Tensor, *, first: bool) -> torch.Tensor:
        """`B T H W 3` -> cells `B T' H/2 W/2 24|12`."""
        return wavelets.volume_cells(image_BTHWC, first=first) if self.volume else wavelets.plane_cells(image_BTHWC)

    def low(self, cells_BTHWC: torch.Tensor) -> torch.Tensor:
        """Cells -> the next smaller image `B T' H/2 W/2 3`."""
        return F.linear(cells_BTHWC, self.analysis[:3])

    def bands(self, cells_BTHWC: torch.Tensor) -> torch.Tensor:
        """Cells -> all bands, as published: `B C T' H/2 W/2`."""
        return F.linear(cells_BTHWC, self.analysis).permute(0, 4, 1, 2, 3).contiguous()


class Heads:
    """Norm, SiLU and the last convolution, its two halves apart: the mean's bits do not depend on whether the other is asked for."""

    def __init__(self, bench: Bench, norm: Any, conv: Any) -> None:
        self.norm, self.slot = Norm(bench, norm), bench.slot()
        halves = zip(conv.weight.chunk(2), conv.bias.chunk(2), strict=True)
        self.mean, self.logvar = (bench.clip_conv(weight, bias, wide=True) for weight, bias in halves)

    def __call__(self, x_BTHWC: torch.Tensor, memory: Memory, wanted: Sequence[ClipConv]) -> list[torch.Tensor]:
        """`B t h w C` -> `B t h w d` of each wanted half."""
        x_BTHWC = self.norm.activated(x_BTHWC)
        past = memory.history(self.slot, x_BTHWC, 2)
        return [half(x_BTHWC, past) for half in wanted]


def prepare_middle(bench: Bench, published: Any, *, mixing: bool) -> list[Residual | Attention]:
    """The blocks of a `mid` as published: residual blocks and attention; `mixing` as `Attention` has it."""
    return [
        Attention(bench, block, mixing=mixing) if hasattr(block, "proj_out") else Residual(bench, block)
        for block in published
    ]


class Encoder:
    """Pixels -> posterior: stages of blocks, the flow of one more level joining before each stage but the first (spec section 4)."""

    def __init__(self, bench: Bench, levels: Sequence[Band], stages: Sequence[Sequence[Any]], heads: Heads) -> None:
        self.levels, self.stages, self.heads, self.slots = levels, stages, heads, bench.slots

    def __call__(self, frames_BCTHW: torch.Tensor, memory: Memory, wanted: Sequence[ClipConv]) -> list[torch.Tensor]:
        """`B 3 T H W` in at least float32 -> one `B t h w d` per wanted head."""
        flows = [level.conv(cells) for level, cells in self._cells(frames_BCTHW, first=memory.first)]
        h = flows[0]
        for number, stage in enumerate(self.stages):
            h = torch.cat([h, flows[number]], dim=-1) if number else h
            for block in stage:
                h = block(h, memory)
        return self.heads(h, memory, wanted)

    def coefficients(self, video_BCTHW: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Bands of every level but the first of a whole video, `B 12|24 t h w`, as published."""
        return tuple(level.bands(cells) for level, cells in self._cells(video_BCTHW, first=True)[1:])

    def _cells(self, frames_BCTHW: torch.Tensor, *, first: bool) -> list[tuple[Band, torch.Tensor]]:
        image, found = frames_BCTHW.permute(0, 2, 3, 4, 1), []
        for level in self.levels:
            cells = level.cells(image, first=first)
            found.append((level, cells))
            if len(found) < len(self.levels):
                image = level.low(cells)
        return found


def prepare_encoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Encoder:
    """WF-VAE's encoder. `weights` are the whole network's, by published key: the Haar filters are read from there."""
    bench = Bench(device, dtype, pace=time_stride(config) // 2)
    levels = [
        Band(bench, wavelets.filters_of(weights, f"encoder.wavelet_transform_{where}"), conv)
        for where, conv in (("in", published.down1[0]), ("l1", published.connect_l1), ("l2", published.connect_l2))
    ]
    down1, down2 = (
        [*(Residual(bench, block) for block in down[1:-1]), Shrink(bench, down[-1])]
        for down in (published.down1, published.down2)
    )
    stages: list[list[Any]] = [
        down1,
        [FrameBlock(bench, published.down2[0]), *down2],
        prepare_middle(bench, published.mid, mixing=config["attention_type"] == "AttnBlock3D"),
    ]
    return Encoder(bench, levels, stages, Heads(bench, published.norm_out, published.conv_out.conv))
