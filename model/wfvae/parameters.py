"""WF-VAE's parameters under their published names, and random ones for trials. No forward pass here."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from model.wfvae.facts import GROUPS, time_stride
from model.wfvae.wavelets import PLANE_BANDS, VOLUME_BANDS, default_filter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EPS = 1e-6


class LayerNorm(nn.Module):
    """LayerNorm over the channels of a position; its published keys have the prefix `norm.`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)


def normaliser(kind: str, channels: int) -> nn.Module:
    """Norm of kind `layernorm` or `groupnorm`."""
    return LayerNorm(channels) if kind == "layernorm" else nn.GroupNorm(GROUPS, channels, eps=EPS)


class CausalConv3d(nn.Module):
    """Causal convolution over frames; its published keys have the prefix `conv.`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, bias=bias)


class Resample(nn.Module):
    """Convolution of a resampling block, of single frames or over frames."""

    def __init__(self, channels: int, *, causal: bool) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels) if causal else nn.Conv2d(channels, channels, 3)


class Residual(nn.Module):
    """Residual block of two convolutions, of single frames or over frames."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, causal: bool = True) -> None:
        super().__init__()
        conv: Callable[..., nn.Module] = CausalConv3d if causal else nn.Conv2d
        self.norm1, self.conv1 = normaliser(norm, in_channels), conv(in_channels, out_channels, 3)
        self.norm2, self.conv2 = normaliser(norm, out_channels), conv(out_channels, out_channels, 3)
        if in_channels != out_channels:
            self.nin_shortcut = conv(in_channels, out_channels, 1)


class Attention(nn.Module):
    """Single-head attention."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.norm = normaliser(norm, channels)
        for name in ("q", "k", "v", "proj_out"):
            self.add_module(name, CausalConv3d(channels, channels, 1))


class Analysis(nn.Module):
    """Filters of a forward Haar transform: frozen convolutions (over frames) or buffers (single frames)."""

    def __init__(self, *, volume: bool) -> None:
        super().__init__()
        if volume:
            for name in VOLUME_BANDS:
                self.add_module(f"{name}_conv", CausalConv3d(1, 1, 2, bias=False))
        else:
            for name in PLANE_BANDS:
                self.register_buffer(name, torch.empty(1, 1, 2, 2))


class Synthesis(nn.Module):
    """Filters of an inverse Haar transform."""

    def __init__(self, *, volume: bool) -> None:
        super().__init__()
        for name in VOLUME_BANDS if volume else PLANE_BANDS:
            self.register_buffer(name, torch.empty((1, 1, 2, 2, 2) if volume else (1, 1, 2, 2)))


def middle(channels: int, before: int, after: int, config: Mapping[str, Any]) -> nn.Sequential:
    """Residual block, attention if configured, residual block; `before` and `after` are the input and output widths."""
    norm = config["norm_type"]
    attention = [Attention(channels, norm)] if config["use_attention"] else []
    return nn.Sequential(Residual(before, channels, norm), *attention, Residual(channels, after, norm))


class Encoder(nn.Module):
    """Parameters of the encoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        c, e = config["base_channels"], config["encoder_energy_flow_hidden_size"]
        n, norm, fast = config["encoder_num_resblocks"], config["norm_type"], time_stride(config) == 8
        self.down1 = nn.Sequential(
            nn.Conv2d(24, c, 3), *(Residual(c, c, norm, causal=False) for _ in range(n)), Resample(c, causal=fast)
        )
        self.down2 = nn.Sequential(
            nn.Conv2d(c + e, 2 * c, 3), *(Residual(2 * c, 2 * c, norm) for _ in range(n)), Resample(2 * c, causal=True)
        )
        self.connect_l1 = nn.Conv2d(24 if fast else 12, e, 3)
        self.connect_l2 = nn.Conv2d(24, e, 3)
        self.mid = middle(4 * c, 2 * c + e, 4 * c, config)
        self.norm_out = normaliser(norm, 4 * c)
        self.conv_out = CausalConv3d(4 * c, 2 * config["latent_dim"])
        self.wavelet_transform_in = Analysis(volume=True)
        self.wavelet_transform_l1 = Analysis(volume=fast)
        self.wavelet_transform_l2 = Analysis(volume=True)


class Decoder(nn.Module):
    """Parameters of the decoder."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        c, e, m = config["base_channels"], config["decoder_energy_flow_hidden_size"], config["connect_res_layer_num"]
        n, norm, fast = config["decoder_num_resblocks"], config["norm_type"], time_stride(config) == 8
        self.conv_in = CausalConv3d(config["latent_dim"], 4 * c)
        self.mid = middle(4 * c, 4 * c, 4 * c + e, config)
        self.up2 = nn.Sequential(
            *(Residual(4 * c, 4 * c, norm) for _ in range(n)),
            Resample(4 * c, causal=True),
            Residual(4 * c, 4 * c + e, norm),
        )
        self.up1 = nn.Sequential(
            *(Residual((2 if index else 4) * c, 2 * c, norm) for index in range(n)),
            Resample(2 * c, causal=fast),
            Residual(2 * c, 2 * c, norm),
        )
        self.layer = nn.Sequential(Residual(2 * c, c, norm), Residual(c, c, norm))
        self.connect_l1 = nn.Sequential(*(Residual(e, e, norm) for _ in range(m)), nn.Conv2d(e, 24 if fast else 12, 3))
        self.connect_l2 = nn.Sequential(*(Residual(e, e, norm) for _ in range(m)), nn.Conv2d(e, 24, 3))
        self.norm_out = normaliser(norm, c)
        self.conv_out = nn.Conv2d(c, 24, 3)
        self.inverse_wavelet_transform_out = Synthesis(volume=True)
        self.inverse_wavelet_transform_l1 = Synthesis(volume=fast)
        self.inverse_wavelet_transform_l2 = Synthesis(volume=True)


class Network(nn.Module):
    """All parameters; `state_dict()` has exactly the published keys."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)


def is_filter(key: str) -> bool:
    """Whether a published key names a Haar filter, which training does not change."""
    return "wavelet_transform" in key


def with_filters(expected: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights`, with default Haar filters where they are missing.

    The one exception to strict keys: averaged (EMA) weights cover trained tensors only, so they lack the filters.
    """
    absent = (key for key in expected if is_filter(key) and key not in weights)
    return {**weights, **{key: default_filter(key) for key in absent}}


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one; Haar filters are the real ones. Latents of random weights are meaningless.
    """
    return random_tensors(empty_network(config), seed)


def random_tensors(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """`random_weights` of any network made of these blocks."""
    return {key: _random_tensor(key, tuple(meta.shape), seed) for key, meta in network.state_dict().items()}


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if is_filter(key):
        return default_filter(key)
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32).reshape(shape))
    if key.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:  # a norm
        return 1 + 0.02 * noise
    if ".conv2." in key or ".proj_out." in key:
        noise = 0.5 * noise  # branches added to the residual stream
    elif key.startswith("decoder.conv_out") or "decoder.connect" in key or "flow_conv" in key:
        noise = 0.25 * noise  # keeps most of a decoded video within the value range
    return noise * int(np.prod(shape[1:])) ** -0.5
