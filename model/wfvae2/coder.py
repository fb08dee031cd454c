"""WFVAE2's two directions prepared for running, built of the blocks of `model.wfvae`.

Enters: parameters. Leaves: an `Encoder` and a `Decoder` that step through videos as WF-VAE's do (spec section 12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.wfvae import wavelets
from model.wfvae.blocks import Bench, Causal, Norm, Residual, Shrink
from model.wfvae.decoder import Decoder, Image, Level, Screen, prepare_growth
from model.wfvae.encoder import Band, Encoder, Heads, prepare_middle
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
    """The encoder: at each level residual blocks and a downsampling, then the flow joins and one more block widens."""
    bench = Bench(device, dtype, pace=2 ** list(config["layer_type"]).count("thw"))
    levels = [Band(bench, wavelets.filters_of(weights, "encoder.wavelet_transform_in"), published.conv_in)]
    stages: list[list[Any]] = [[]]
    for number, level in enumerate(published.down_blocks):
        filters = wavelets.filters_of(weights, f"encoder.down_blocks.{number}.wavelet_transform")
        levels.append(Band(bench, filters, level.in_flow_conv))
        stages[-1] += [*(Residual(bench, block) for block in level.res_block), Shrink(bench, level.down)]
        stages.append([Residual(bench, level.out_res_block)])
    stages[-1] += prepare_middle(bench, published.mid, mixing="AttnBlock3D" in config["mid_layers_type"])
    return Encoder(bench, levels, stages, Heads(bench, published.norm_out, published.conv_out.conv))


def prepare_decoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """The decoder: at each level a block widens, the flow parts, then residual blocks, an upsampling and a narrowing block."""
    bench, nearest = Bench(device, dtype, pace=1), config["t_interpolation"] == "nearest"
    enter = Causal(bench, published.conv_in, wide=True)
    before: list[Any] = prepare_middle(bench, published.mid, mixing="AttnBlock3D" in config["mid_layers_type"])
    levels = []
    for number, (level, width) in enumerate(zip(published.up_blocks, decoder_widths(config)[:0:-1], strict=True)):
        before.append(Residual(bench, level.branch_conv))
        filters = wavelets.filters_of(weights, f"decoder.up_blocks.{number}.inverse_wavelet_transform")
        levels.append(Level(before, width, Image(bench, level.out_flow_conv, filters)))
        before = [
            *(Residual(bench, block) for block in level.res_block),
            prepare_growth(bench, level.up, nearest=nearest),
            Residual(bench, level.out_res_block),
        ]
    screen = Screen(bench, published.conv_out, wavelets.filters_of(weights, "decoder.inverse_wavelet_transform_out"))
    return Decoder(bench, enter, levels, before, Norm(bench, published.norm_out), screen)
