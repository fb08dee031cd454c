"""WF-VAE's decoder, prepared for speed and run step by step; each step returns all frames that are final.

Interpolation in time delays the main path by one frame per doubling. The images of the energy-flow path are not delayed, so they wait in
short queues. No latent is computed twice, and any split of a video gives the same frames (spec section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from model.wfvae import wavelets
from model.wfvae.fast.blocks import CausalConv, FrameBlock, LayerBuilder, Norm, Residual, Upsample, UpsampleClip
from model.wfvae.fast.encoder import prepare_middle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from model.wfvae.fast.stream_state import StreamState


class FlowImage:
    """Image of one level from the energy flow: residual blocks, Haar bands, smaller image added to the low band, inverse transform."""

    def __init__(self, builder: LayerBuilder, published: Any, filters: torch.Tensor) -> None:
        self.blocks = [Residual(builder, block) for block in published[:-1]]
        self.bands = FrameBlock(builder, published[-1], full_precision=True)
        self.volume, self.slot = filters.shape[0] == 8, builder.new_slot()
        self.synthesis = wavelets.per_colour(filters).T.contiguous().to(builder.device, builder.full_dtype)

    def __call__(
        self, flow_BTHWC: torch.Tensor, stream: StreamState, smaller_BTHWC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Flow `B T H W e` -> image `B T' 2H 2W 3` (T' = 2T, at the start 2T - 1, for a 2-D transform T)."""
        for block in self.blocks:
            flow_BTHWC = block(flow_BTHWC, stream)
        bands = self.bands(flow_BTHWC)
        stream.save(self.slot, bands.new_empty((bands.shape[0], 0)))
        if smaller_BTHWC is not None:
            bands[..., :3] += stream.dequeue(self.slot, smaller_BTHWC, bands.shape[1])
        cells = F.linear(bands, self.synthesis)
        if self.volume:
            return wavelets.from_volume_cells(cells, first=stream.first)
        return wavelets.from_plane_cells(cells)


class OutputLayer:
    """Last convolution with the last inverse transform folded in, plus the image of the energy flow."""

    def __init__(self, builder: LayerBuilder, conv: nn.Conv2d, filters: torch.Tensor) -> None:
        weight = wavelets.fold_synthesis(conv.weight, filters)
        bias = wavelets.fold_synthesis(_bias(conv), filters)
        self.conv, self.slot = builder.frame_conv(weight, bias, full_precision=True, padding=1), builder.new_slot()
        self.to_pixels = wavelets.per_colour(filters)[:3].T.contiguous().to(builder.device, builder.full_dtype)

    def __call__(self, h_BTHWC: torch.Tensor, image_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B T H W C` and image frames `B T' H W 3` -> video `B 3 2T 2H 2W` (2T - 1 at the start)."""
        B, T, H, W, _ = h_BTHWC.shape
        pixels = self.conv(h_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(B, T, H, W, -1)
        pixels = pixels + F.linear(stream.dequeue(self.slot, image_BTHWC, T), self.to_pixels)
        return wavelets.from_volume_cells(pixels, first=stream.first).permute(0, 4, 1, 2, 3)


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    if conv.bias is None:
        raise ValueError("the last convolution has no bias; its published form has one")
    return conv.bias


class DecoderLevel:
    """Blocks of the main path whose last channels split off as the flow of one image."""

    def __init__(self, blocks: Sequence[Any], width: int, image: FlowImage) -> None:
        self.blocks, self.width, self.image = blocks, width, image


class Decoder:
    """Decoder ready to run, latents -> pixels: levels from the deepest to the finest, then the last blocks (spec section 5)."""

    def __init__(
        self,
        builder: LayerBuilder,
        conv_in: CausalConv,
        levels: Sequence[DecoderLevel],
        last_blocks: Sequence[Any],
        activate: Callable[[torch.Tensor], torch.Tensor],
        output: OutputLayer,
    ) -> None:
        self.conv_in, self.levels, self.last_blocks = conv_in, levels, last_blocks
        self.activate, self.output = activate, output
        self.slots = builder.slots

    def __call__(self, latent_BTHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`B t h w d` in at least float32 -> video `B 3 T H W`."""
        h = self.conv_in(latent_BTHWC, stream)
        image: Any = None  # of the previous level; the deepest has none
        for level in self.levels:
            for block in level.blocks:
                h = block(h, stream)
            image = level.image(h[..., level.width :], stream, image)
            h = h[..., : level.width]
        for block in self.last_blocks:
            h = block(h, stream)
        return self.output(self.activate(h), image, stream)


def prepare_decoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """Builds WF-VAE's decoder. `weights`: the whole network's, by published key; the Haar filters are read from them."""
    builder = LayerBuilder(device, dtype, frames_per_step=1)
    width, nearest = 4 * config["base_channels"], config["t_interpolation"] == "nearest"
    out, l1, l2 = (
        wavelets.filters_of(weights, f"decoder.inverse_wavelet_transform_{name}") for name in ("out", "l1", "l2")
    )
    conv_in = CausalConv(builder, published.conv_in, full_precision=True)
    middle = prepare_middle(builder, published.mid, mixes_frames=config["attention_type"] == "AttnBlock3D")
    levels = [
        DecoderLevel(middle, width, FlowImage(builder, published.connect_l2, l2)),
        DecoderLevel(
            _upsampling_blocks(builder, published.up2, nearest=nearest),
            width,
            FlowImage(builder, published.connect_l1, l1),
        ),
    ]
    last_blocks = [
        *_upsampling_blocks(builder, published.up1, nearest=nearest),
        *(Residual(builder, block) for block in published.layer),
    ]
    output = OutputLayer(builder, published.conv_out, out)
    return Decoder(builder, conv_in, levels, last_blocks, Norm(builder, published.norm_out).activated, output)


def prepare_upsample(builder: LayerBuilder, published: Any, *, nearest: bool) -> Upsample | UpsampleClip:
    """Builds the upsampling of single frames, or of frames and time."""
    per_frame = isinstance(published.conv, nn.Conv2d)
    return Upsample(builder, published) if per_frame else UpsampleClip(builder, published, nearest=nearest)


def _upsampling_blocks(builder: LayerBuilder, published: Any, *, nearest: bool) -> list[Any]:
    """Builds residual blocks, an upsampling and a residual block."""
    before = [Residual(builder, block) for block in published[:-2]]
    return [*before, prepare_upsample(builder, published[-2], nearest=nearest), Residual(builder, published[-1])]
