"""Residual blocks and attention of IV-VAE, with weights prepared for speed, on channel-last frames `T B H W C` (spec section 2).

Each takes the residual stream (at least float32) and the `StreamState` with past frames, and returns the stream, changed in place if the
width stays the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from model.convolution import FrameConv
from model.ivvae.fast.pair_conv import PairConv, PointPair
from model.ivvae.fast.stream_state import stripes
from model.ivvae.layers import ConvPair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from model.ivvae import layers as published
    from model.ivvae.fast.stream_state import StreamState

TINY = 1e-12  # smallest length a feature is divided by


class NormSiLU:
    """Norm that scales each half to length `sqrt(c)` at every position and multiplies by gamma, then SiLU."""

    def __init__(self, gain: published.NormGain, device: torch.device, dtype: torch.dtype) -> None:
        gamma = gain.gamma.double().view(2, -1)
        full_dtype = torch.promote_types(dtype, torch.float32)
        self.gamma = (gamma * gamma.shape[1] ** 0.5).to(device, full_dtype)

    def __call__(self, x_TBHWC: torch.Tensor, out_TBHWC: torch.Tensor) -> None:
        """Reads features of any floating dtype, writes into `out` of the same shape, in its dtype."""
        halves = x_TBHWC.unflatten(-1, self.gamma.shape)
        y = halves * inverse_length(halves)
        out_TBHWC.copy_(F.silu(y.mul_(self.gamma), inplace=True).flatten(-2))


def inverse_length(x: torch.Tensor) -> torch.Tensor:
    """One divided by the length along the last axis."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(TINY).reciprocal_()


class Residual3d:
    """Two norms with convolution pairs, plus the input; `slots` number the past frames of the two pairs."""

    def __init__(
        self, block: published.Residual3d, group: int, slots: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> None:
        layers = block.residual
        self.norms = [NormSiLU(cast("published.NormGain", layers[index]), device, dtype) for index in (0, 3)]
        self.convs = [PairConv(cast("ConvPair", layers[index]), group, device, dtype) for index in (2, 6)]
        pair = getattr(block, "shortcut", None)
        self.shortcut = PointPair(pair, device, dtype) if isinstance(pair, ConvPair) else None
        self.slots = tuple(slots)

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2 c_in)` -> `(T, B, H, W, 2 c_out)`."""
        T, B, H, W, channels = x_TBHWC.shape
        rows = stripes(H, W, stream.device)
        first = stream.bordered("first", T + 1, B, H, W, channels)
        second = stream.bordered("second", T + 1, B, H, W, 2 * self.convs[0].width)
        for buffer, slot in zip((first, second), self.slots, strict=True):
            stream.restore(slot, buffer)
        for top, end in rows:
            self.norms[0](x_TBHWC[:, :, top:end], first[1:, :, top + 1 : end + 1])
        stream.save(self.slots[0], first)
        for top, end in rows:
            y = convolve(self.convs[0], first[:, :, top : end + 2], stream)
            self.norms[1](y, second[1:, :, top + 1 : end + 1])
        stream.save(self.slots[1], second)
        out = x_TBHWC if self.shortcut is None else x_TBHWC.new_empty((T, B, H, W, second.shape[-1]))
        for top, end in rows:
            y = convolve(self.convs[1], second[:, :, top : end + 2], stream)
            if self.shortcut is None:
                out[:, :, top:end] += y
            else:
                torch.add(self.shortcut(x_TBHWC[:, :, top:end]), y, out=out[:, :, top:end])
        return out


def convolve(pair: PairConv, window_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
    """Applies a pair to a window whose first frame is the past, by the rule of a clip's first frame or the rule of groups."""
    return pair.first_frame(window_TBHWC[1]) if stream.first else pair(window_TBHWC)


class Residual2d:
    """`Residual3d` with one convolution per frame instead of a pair."""

    def __init__(self, block: published.Residual2d, device: torch.device, dtype: torch.dtype) -> None:
        layers = block.residual
        self.norms = [NormSiLU(cast("published.NormGain", layers[index]), device, dtype) for index in (0, 3)]
        convs = [cast("published.FrameConv2d", layers[index]).conv for index in (2, 6)]
        self.convs = [FrameConv(conv.weight, conv.bias, device, dtype, padding=1) for conv in convs]

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2c)`, changed in place."""
        y = x_TBHWC
        for norm, conv in zip(self.norms, self.convs, strict=True):
            normed = torch.empty(x_TBHWC.shape, dtype=stream.dtype, device=stream.device)
            norm(y, normed)
            y = conv(normed.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(x_TBHWC.shape)
        return x_TBHWC.add_(y)


class Attention:
    """Attention of each half to itself within its frame: two heads that share no weights.

    Folded, exact up to rounding: gamma into the projections, and the value bias into the output projection (a query's weights sum to one).
    The key bias is dropped, because it adds the same to every score of a query.
    """

    def __init__(self, block: published.Attention, device: torch.device, dtype: torch.dtype) -> None:
        self.projections = [_folded(half, device, dtype) for half in (block.Attention_2d, block.Attention_3d)]

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2c)`, changed in place."""
        T, B, H, W, channels = x_TBHWC.shape
        tokens = x_TBHWC.view(T * B, H * W, 2, channels // 2)
        normed = (tokens * inverse_length(tokens)).to(stream.dtype)
        both = [F.linear(normed[:, :, half], *self.projections[half][:2]) for half in (0, 1)]
        q, k, v = torch.stack(both, dim=1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v)
        for half in (0, 1):
            tokens[:, :, half] += F.linear(mixed[:, half], *self.projections[half][2:])
        return x_TBHWC


def _folded(half: published.BranchAttention, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(joint weight, joint bias, output weight, output bias)."""
    if half.to_qkv.bias is None or half.proj.bias is None:
        raise ValueError("an attention projection has no bias; its published form has one")
    gamma, c = half.norm.gamma.double().flatten(), half.norm.gamma.numel()
    joint = half.to_qkv.weight.double().flatten(1) * (gamma * c**0.5)
    query_bias, _, value_bias = half.to_qkv.bias.double().chunk(3)
    joint_bias = torch.cat([query_bias, torch.zeros_like(query_bias), torch.zeros_like(query_bias)])
    out = half.proj.weight.double().flatten(1)
    out_bias = half.proj.bias.double() + out @ value_bias
    return tuple(tensor.to(device, dtype) for tensor in (joint, joint_bias, out, out_bias))
