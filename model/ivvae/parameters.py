"""IV-VAE's parameters under their published names, and reproducible random ones for trials.

Enters: a configuration in its published keys. Leaves: the parameter tree (`state_dict()` has exactly the published keys), or tensors.
There is no forward pass here; `model.ivvae.coder` prepares these parameters for running. Source: spec sections 2, 3, 4 and 7.

"Width c" is channels per branch: features have 2c channels, the 2-D branch first.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

DILATIONS = (1, 3, 6, 9, 12)  # of the encoder head's 3x3 convolutions; a 1x1 stands before them


class Gain(nn.Module):
    """One factor per channel of a norm; `axes` trailing axes of one."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * axes))


class ConvPair(nn.Module):
    """A 2-D and a 3-D convolution that both read every channel (`Sep_Conv3d`)."""

    def __init__(self, channels_in: int, width_out: int, size: int) -> None:
        super().__init__()
        self.conv_2d = nn.Conv2d(channels_in, width_out, size)
        self.conv_3d = nn.Conv3d(channels_in, width_out, size)


class FrameConv2d(nn.Module):
    """One convolution per frame over both branches (`Sep_Conv2d`)."""

    def __init__(self, channels_in: int, channels_out: int, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size)


class Residual3d(nn.Module):
    """Norm, SiLU, pair, norm, SiLU, (dropout), pair; a 1x1 shortcut where the width changes."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.residual = _residual(
            2 * width_in, 2 * width_out, ConvPair(2 * width_in, width_out, 3), ConvPair(2 * width_out, width_out, 3)
        )
        if width_in != width_out:
            self.shortcut = ConvPair(2 * width_in, width_out, 1)


class Residual2d(nn.Module):
    """The same with a convolution per frame; the width never changes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = 2 * width
        self.residual = _residual(
            channels, channels, FrameConv2d(channels, channels, 3), FrameConv2d(channels, channels, 3)
        )


def _residual(channels_in: int, channels_out: int, first: nn.Module, second: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        Gain(channels_in, 3), nn.Identity(), first, Gain(channels_out, 3), nn.Identity(), nn.Identity(), second
    )


class HalfAttention(nn.Module):
    """Attention of one branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Gain(width, 2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)


class Attention(nn.Module):
    """Each branch attends to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.Attention_2d = HalfAttention(width)
        self.Attention_3d = HalfAttention(width)


class Resample(nn.Module):
    """Halving or doubling of space, and of time where `time_conv` is there."""

    def __init__(self, width_in: int, width_out: int, time_conv: nn.Conv3d | None) -> None:
        super().__init__()
        # index 0 is the padding (down) or the nearest-neighbour doubling (up)
        self.resample_2d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        self.resample_3d = nn.Sequential(nn.Identity(), nn.Conv2d(width_in, width_out, 3))
        if time_conv is not None:
            self.time_conv = time_conv


class PyramidHead(nn.Module):
    """Six convolutions of one input side by side, and a 1x1 over their outputs (`PAC`)."""

    def __init__(self, channels: int, z: int) -> None:
        super().__init__()
        self.PAC_0 = FrameConv2d(channels, 2 * z, 1)
        for dilation in DILATIONS:
            self.add_module(f"PAC_{dilation}", FrameConv2d(channels, 2 * z, 3))
        self.PAC_conv = FrameConv2d(12 * z, 2 * z, 1)


def widths(config: Mapping[str, Any]) -> list[int]:
    """Channels per branch at 1, 1/2, 1/4 and 1/8 of the picture's size."""
    return [config["dim"] * factor for factor in config["dim_mult"]]


class Encoder(nn.Module):
    """Spec section 3."""

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
        self.head = nn.Sequential(Gain(2 * eighth, 3), nn.Identity(), PyramidHead(2 * eighth, config["z_dim"]))


class Decoder(nn.Module):
    """Spec section 4."""

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
        self.head = nn.Sequential(Gain(2 * full, 3), nn.Identity(), ConvPair(2 * full, 3, 3))


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
    """The network on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Network(config)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible float32 weights by published key; each tensor depends on the seed and its own name alone.

    Scaled so that activations stay of order one. Latents made with them mean nothing.
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
    gain = 0.4 if key.startswith("decoder.head") else 1.0  # so that videos come out within the value range, mostly
    return noise * (gain * float(np.prod(shape[1:])) ** -0.5)
