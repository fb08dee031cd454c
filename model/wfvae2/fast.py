"""WFVAE2's encoder and decoder, built from the blocks of `model.wfvae` (spec section 12)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.wfvae import wavelets
from model.wfvae.fast.blocks import CausalConv, Downsample, LayerBuilder, Norm, Residual
from model.wfvae.fast.decoder import Decoder, DecoderLevel, FlowImage, OutputLayer, prepare_upsample
from model.wfvae.fast.encoder import Encoder, EncoderLevel, PosteriorHeads, prepare_middle
from model.wfvae2.facts import decoder_widths

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


def prepare_encoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Encoder:
    """Builds the encoder: at each level residual blocks and a downsampling, then the flow joins and one more block widens."""
    builder = LayerBuilder(device, dtype, frames_per_step=2 ** list(config["layer_type"]).count("thw"))
    levels = [EncoderLevel(builder, wavelets.filters_of(weights, "encoder.wavelet_transform_in"), published.conv_in)]
    stages: list[list[Any]] = [[]]
    for number, level in enumerate(published.down_blocks):
        filters = wavelets.filters_of(weights, f"encoder.down_blocks.{number}.wavelet_transform")
        levels.append(EncoderLevel(builder, filters, level.in_flow_conv))
        stages[-1] += [*(Residual(builder, block) for block in level.res_block), Downsample(builder, level.down)]
        stages.append([Residual(builder, level.out_res_block)])
    stages[-1] += prepare_middle(builder, published.mid, mixes_frames="AttnBlock3D" in config["mid_layers_type"])
    return Encoder(builder, levels, stages, PosteriorHeads(builder, published.norm_out, published.conv_out.conv))


def prepare_decoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """Builds the decoder: at each level a block widens, the flow splits off, then residual blocks, an upsampling and a narrowing block."""
    builder, nearest = LayerBuilder(device, dtype, frames_per_step=1), config["t_interpolation"] == "nearest"
    conv_in = CausalConv(builder, published.conv_in, full_precision=True)
    before: list[Any] = prepare_middle(builder, published.mid, mixes_frames="AttnBlock3D" in config["mid_layers_type"])
    levels = []
    for number, (level, width) in enumerate(zip(published.up_blocks, decoder_widths(config)[:0:-1], strict=True)):
        before.append(Residual(builder, level.branch_conv))
        filters = wavelets.filters_of(weights, f"decoder.up_blocks.{number}.inverse_wavelet_transform")
        levels.append(DecoderLevel(before, width, FlowImage(builder, level.out_flow_conv, filters)))
        before = [
            *(Residual(builder, block) for block in level.res_block),
            prepare_upsample(builder, level.up, nearest=nearest),
            Residual(builder, level.out_res_block),
        ]
    output = OutputLayer(
        builder, published.conv_out, wavelets.filters_of(weights, "decoder.inverse_wavelet_transform_out")
    )
    return Decoder(builder, conv_in, levels, before, Norm(builder, published.norm_out), output)
