"""WF-VAE's encoder, prepared for speed: Haar transforms are folded into the convolutions that read them.

Takes the frames of a step and its `StreamState`; returns the outputs of the posterior heads, `B t h w d`. Checks of inputs and splitting
into steps are in `model.wfvae.vae`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from model.wfvae import wavelets
from model.wfvae.facts import time_stride
from model.wfvae.fast.blocks import Attention, Downsample, FrameBlock, LayerBuilder, Norm, Residual

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from model.convolution import ClipConv
    from model.wfvae.fast.stream_state import StreamState


class EncoderLevel:
    """Level of the Haar transform: cells of an image, its low band, and the convolution that reads the bands."""

    def __init__(self, builder: LayerBuilder, filters: torch.Tensor, conv: Any) -> None:
        self.volume = filters.shape[0] == 8
        self.analysis = wavelets.per_colour(filters).to(builder.device, builder.full_dtype)
        self.conv = FrameBlock(builder, conv, full_precision=True, weight=wavelets.fold_analysis(conv.weight, filters))

    def cells(self, image_BTHWC: torch.Tensor, *, first: bool) -> torch.Tensor:
        """`B T H W 3` -> cells `B T' H/2 W/2 24|12`."""
        if self.volume:
            return wavelets.volume_cells(image_BTHWC, first=first)
        return wavelets.plane_cells(image_BTHWC)

    def low(self, cells_BTHWC: torch.Tensor) -> torch.Tensor:
        """Cells -> the next smaller image `B T' H/2 W/2 3`."""
        return F.linear(cells_BTHWC, self.analysis[:3])


class PosteriorHeads:
    """Norm, SiLU and last convolution, split into mean and log-variance: the mean's bits do not depend on whether the other is computed."""

    def __init__(self, builder: LayerBuilder, norm: Any, conv: Any) -> None:
        self.norm, self.slot = Norm(builder, norm), builder.new_slot()
        halves = zip(conv.weight.chunk(2), conv.bias.chunk(2), strict=True)
        self.mean, self.logvar = (builder.clip_conv(weight, bias, full_precision=True) for weight, bias in halves)

    def __call__(self, x_BTHWC: torch.Tensor, stream: StreamState, heads: Sequence[ClipConv]) -> list[torch.Tensor]:
        """`B t h w C` -> `B t h w d` of each of `heads`."""
        x_BTHWC = self.norm.activated(x_BTHWC)
        past = stream.past_frames(self.slot, x_BTHWC, 2)
        return [head(x_BTHWC, past) for head in heads]


def prepare_middle(builder: LayerBuilder, published: Any, *, mixes_frames: bool) -> list[Residual | Attention]:
    """Builds the blocks of a published `mid`: residual blocks and attention; `mixes_frames` as in `Attention`."""
    return [
        Attention(builder, block, mixes_frames=mixes_frames) if hasattr(block, "proj_out") else Residual(builder, block)
        for block in published
    ]


class Encoder:
    """Encoder ready to run, pixels -> posterior: stages of blocks; one level's flow joins before each stage but the first (section 4)."""

    def __init__(
        self,
        builder: LayerBuilder,
        levels: Sequence[EncoderLevel],
        stages: Sequence[Sequence[Any]],
        heads: PosteriorHeads,
    ) -> None:
        self.levels, self.stages, self.heads, self.slots = levels, stages, heads, builder.slots

    def __call__(
        self, frames_BCTHW: torch.Tensor, stream: StreamState, heads: Sequence[ClipConv]
    ) -> list[torch.Tensor]:
        """`B 3 T H W` in at least float32 -> one `B t h w d` for each of `heads`."""
        flows = [level.conv(cells) for level, cells in self._cells(frames_BCTHW, first=stream.first)]
        h = flows[0]
        for number, stage in enumerate(self.stages):
            h = torch.cat([h, flows[number]], dim=-1) if number else h
            for block in stage:
                h = block(h, stream)
        return self.heads(h, stream, heads)

    def _cells(self, frames_BCTHW: torch.Tensor, *, first: bool) -> list[tuple[EncoderLevel, torch.Tensor]]:
        image, pairs = frames_BCTHW.permute(0, 2, 3, 4, 1), []
        for level in self.levels:
            cells = level.cells(image, first=first)
            pairs.append((level, cells))
            if len(pairs) < len(self.levels):
                image = level.low(cells)
        return pairs


def prepare_encoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Encoder:
    """Builds WF-VAE's encoder. `weights`: the whole network's, by published key; the Haar filters are read from them."""
    builder = LayerBuilder(device, dtype, frames_per_step=time_stride(config) // 2)
    levels = [
        EncoderLevel(builder, wavelets.filters_of(weights, f"encoder.wavelet_transform_{name}"), conv)
        for name, conv in (("in", published.down1[0]), ("l1", published.connect_l1), ("l2", published.connect_l2))
    ]
    down1, down2 = (
        [*(Residual(builder, block) for block in down[1:-1]), Downsample(builder, down[-1])]
        for down in (published.down1, published.down2)
    )
    stages: list[list[Any]] = [
        down1,
        [FrameBlock(builder, published.down2[0]), *down2],
        prepare_middle(builder, published.mid, mixes_frames=config["attention_type"] == "AttnBlock3D"),
    ]
    return Encoder(builder, levels, stages, PosteriorHeads(builder, published.norm_out, published.conv_out.conv))
