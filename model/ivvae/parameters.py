"""IV-VAE's parameters under their published names, and random ones for trials (spec sections 2, 3, 4, 7). No forward pass here.

"Width c" means channels per branch: features have 2c channels, the 2-D branch first.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

DILATIONS = (1, 3, 6, 9, 12)  # of the 3x3 convolutions in the encoder's head, which follow a 1x1


class NormGain(nn.Module):
    """Gain of a norm, one factor per channel, with `axes` trailing axes of size one."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))


class ConvPair(nn.Module):
    """2-D and 3-D convolution that both read every channel (published as `Sep_Conv3d`)."""

    def __init__(self, channels_in: int, width_out: int, size: int) -> None:
        super().__init__()
        self.conv_2d = nn.Conv2d(channels_in, width_out, size)
        self.conv_3d = nn.Conv3d(channels_in, width_out, size)


class FrameConv2d(nn.Module):
    """Convolution of single frames over both branches (published as `Sep_Conv2d`)."""

    def __init__(self, channels_in: int, channels_out: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size)


class Residual3d(nn.Module):
    """Norm, SiLU, pair, norm, SiLU, (dropout), pair; a 1x1 shortcut if the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.residual = _residual(
            2 * width_in, 2 * width_out, ConvPair(2 * width_in, width_out, 3), ConvPair(2 * width_out, width_out, 3)
        )
        if width_in != width_out:
            self.shortcut = ConvPair(2 * width_in, width_out, 1)


class Residual2d(nn.Module):
    """`Residual3d` with convolutions of single frames; the width does not change."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = 2 * width
        self.residual = _residual(
            channels, channels, FrameConv2d(channels, channels, 3), FrameConv2d(channels, channels, 3)
        )


def _residual(channels_in: int, channels_out: int, first: nn.Module, second: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        NormGain(channels_in, 3), nn.Identity(), first, NormGain(channels_out, 3), nn.Identity(), nn.Identity(), second
    )


class BranchAttention(nn.Module):
    """Attention of one branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = NormGain(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)


class Attention(nn.Module):
    """Attention of each branch to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Attention_2d = BranchAttention(width)
        self.Attention_3d = BranchAttention(width)


class Resample(nn.Module):
    """Downsampling or upsampling by 2 in space, and in time if there is a `time_conv`."""

    def __init__(self, width_in: int, width_out: int, time_conv: nn.Conv3d | None) -> None:
        super().__init__()
        # index 0 is the padding (down) or the nearest-neighbour doubling (up)
        self.resample_2d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.resample_3d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        if time_conv is not None:
            self.time_conv = time_conv


class PyramidHead(nn.Module):
    """Six parallel convolutions of one input, and a 1x1 over their outputs (published as `PAC`)."""

    def __init__(self, channels: int, z: int) -> None:
        super().__init__()
        self.PAC_0 = FrameConv2d(channels, 2 * z, 1)
        for dilation in DILATIONS:
            self.add_module(f"PAC_{dilation}", FrameConv2d(channels, 2 * z, 3))
        self.PAC_conv = FrameConv2d(12 * z, 2 * z, 1)


def widths(config: Mapping[str, Any]) -> list[int]:
    """Channels per branch at 1, 1/2, 1/4 and 1/8 of the frame size."""
    return [config["dim"] * factor for factor in config["dim_mult"]]


class Encoder(nn.Module):
    """Parameters of the encoder (spec section 3)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        full, half, quarter, eighth = widths(config)
        self.conv1 = ConvPair(3, config["dim"], 3)
        self.downsamples = nn.Sequential(
            *(Residual3d(config["dim"], full), Residual3d(full, full), Resample(full, full, None)),
            *(Residual3d(full, half), Residual3d(half, half), _down(half)),
            *(Residual3d(half, quarter), Residual3d(quarter, quarter), _down(quarter)),
            *(Attention(eighth), Residual2d(eighth), Attention(eighth), Residual2d(eighth), Attention(eighth)),
        )
        self.middle = nn.Sequential(Residual2d(eighth), Attention(eighth), Residual2d(eighth))
        self.head = nn.Sequential(NormGain(2 * eighth, 3), nn.Identity(), PyramidHead(2 * eighth, config["z_dim"]))


class Decoder(nn.Module):
    """Parameters of the decoder (spec section 4)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        full, half, quarter, eighth = widths(config)
        self.conv1 = FrameConv2d(config["z_dim"], 2 * eighth, 3)
        self.middle = nn.Sequential(Residual2d(eighth), Attention(eighth), Residual2d(eighth))
        self.upsamples = nn.Sequential(
            *(module for _ in range(3) for module in (Residual2d(eighth), Attention(eighth))),
            *(
                _up(eighth),
                Residual3d(eighth // 2, quarter),
                Residual3d(quarter, quarter),
                Residual3d(quarter, quarter),
            ),
            *(_up(quarter), Residual3d(quarter // 2, half), Residual3d(half, half), Residual3d(half, half)),
            Resample(half, half // 2, None),
            *(Residual3d(half // 2, full), Residual3d(full, full), Residual3d(full, full)),
        )
        self.head = nn.Sequential(NormGain(2 * full, 3), nn.Identity(), ConvPair(2 * full, 3, 3))


def _down(width: int) -> Resample:
    return Resample(width, width, nn.Conv3d(width, width, (2, 1, 1)))


def _up(width: int) -> Resample:
    return Resample(width, width // 2, nn.Conv3d(width, 2 * width, 1))


class Network(nn.Module):
    """All parameters; `state_dict()` has exactly the published keys."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        z = config["z_dim"]
        self.encoder = Encoder(config)
        self.conv1 = ConvPair(2 * z, z, 1)
        self.conv2 = ConvPair(z, z // 2, 1)
        self.decoder = Decoder(config)


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one. Their latents mean nothing.
    """
    return {
        key: _random_tensor(key, tuple(meta.shape), seed) for key, meta in empty_network(config).state_dict().items()
    }


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32))
    if key.endswith("gamma"):
        return 1 + 0.02 * noise
    if key.endswith("bias"):
        return 0.02 * noise
    gain = 0.4 if key.startswith("decoder.head") else 1.0  # keeps most of a decoded video within the value range
    return noise * (gain * float(np.prod(shape[1:])) ** -0.5)
