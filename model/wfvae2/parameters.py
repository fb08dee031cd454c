"""WFVAE2's parameters under their published names, and random ones for trials."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.wfvae.parameters import (
    Analysis,
    Attention,
    CausalConv3d,
    Resample,
    Residual,
    Synthesis,
    normaliser,
    random_tensors,
)
from model.wfvae2.facts import decoder_widths

if TYPE_CHECKING:
    from collections.abc import Mapping


def middle(channels: int, config: Mapping[str, Any]) -> nn.Sequential:
    """Configured blocks at the deepest width."""
    norm = config["norm_type"]
    return nn.Sequential(
        *(
            Residual(channels, channels, norm) if kind == "ResnetBlock3D" else Attention(channels, norm)
            for kind in config["mid_layers_type"]
        )
    )


class Down(nn.Module):
    """DecoderLevel of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, layer: str, block: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        flow, norm, volume = config["encoder_energy_flow_size"], config["norm_type"], layer == "thw"
        causal = block == "ResnetBlock3D"
        self.res_block = nn.ModuleList(
            Residual(in_channels, in_channels, norm, causal=causal) for _ in range(config["encoder_num_resblocks"] - 1)
        )
        self.down = Resample(in_channels, causal=volume)
        self.wavelet_transform = Analysis(volume=volume)
        self.in_flow_conv = nn.Conv2d(24 if volume else 12, flow, 3)
        self.out_res_block = Residual(in_channels + flow, out_channels, norm, causal=causal)


class Up(nn.Module):
    """DecoderLevel of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, layer: str, block: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        flow, norm, volume = config["decoder_energy_flow_size"], config["norm_type"], layer == "thw"
        causal = block == "ResnetBlock3D"
        self.branch_conv = Residual(in_channels, in_channels + flow, norm, causal=causal)
        self.out_flow_conv = nn.Sequential(
            Residual(flow, flow, norm, causal=causal), nn.Conv2d(flow, 24 if volume else 12, 3)
        )
        self.inverse_wavelet_transform = Synthesis(volume=volume)
        self.res_block = nn.ModuleList(
            Residual(in_channels, in_channels, norm, causal=causal) for _ in range(config["decoder_num_resblocks"] - 2)
        )
        self.up = Resample(in_channels, causal=volume)
        self.out_res_block = Residual(in_channels, out_channels, norm, causal=causal)


class Encoder(nn.Module):
    """Parameters of the encoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = config["base_channels"]
        self.wavelet_transform_in = Analysis(volume=True)
        self.conv_in = nn.Conv2d(24, widths[0], 3)
        self.down_blocks = nn.ModuleList(
            Down(*pair, layer, block, config)
            for pair, layer, block in zip(pairwise(widths), config["layer_type"], config["layer_res_type"], strict=True)
        )
        self.mid = middle(widths[-1], config)
        self.norm_out = normaliser(config["norm_type"], widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config["latent_dim"])


class Decoder(nn.Module):
    """Parameters of the decoder; levels from the deepest to the finest."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths = decoder_widths(config)[::-1]
        self.conv_in = CausalConv3d(config["latent_dim"], widths[0])
        self.mid = middle(widths[0], config)
        self.up_blocks = nn.ModuleList(
            Up(*pair, layer, block, config)
            for pair, layer, block in zip(
                pairwise(widths), config["layer_type"][::-1], config["layer_res_type"][::-1], strict=True
            )
        )
        self.norm_out = normaliser(config["norm_type"], widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 24, 3)
        self.inverse_wavelet_transform_out = Synthesis(volume=True)


class Network(nn.Module):
    """All parameters; `state_dict()` has exactly the published keys."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; see `model.wfvae.parameters.random_weights`."""
    return random_tensors(empty_network(config), seed)
