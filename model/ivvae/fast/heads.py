"""IV-VAE's last layers, in at least float32: the dilated head of the posterior, and the head that gives pixels (spec sections 3, 4, 8).

The encoder's head is six convolutions, a 1x1 over their outputs and the top-level 1x1 pair, all linear: mean and log-variance are each one
kernel of 41 taps, run as five dilated 3x3 kernels with few outputs. In the decoder's head each frame needs one half of the pair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from model.convolution import FrameConv
from model.ivvae.fast.blocks import NormSiLU
from model.ivvae.fast.stream_state import stripes
from model.ivvae.layers import DILATIONS

if TYPE_CHECKING:
    from model.ivvae import layers as published
    from model.ivvae.fast.stream_state import StreamState
    from model.ivvae.network import Network

GROUP = 4  # frames of a latent


class PosteriorHead:
    """Norm, SiLU, and the folded kernels of mean and log-variance."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        full_dtype = torch.promote_types(dtype, torch.float32)
        self.norm = NormSiLU(cast("published.NormGain", network.encoder.head[0]), device, full_dtype)
        weight, bias = _top(network)
        half = weight.shape[0] // 4  # rows are [mean 2-D | logvar 2-D | mean 3-D | logvar 3-D], a quarter each
        mean = [*range(half), *range(2 * half, 3 * half)]
        logvar = [row + half for row in mean]
        pyramid = cast("published.PyramidHead", network.encoder.head[2])
        self.mean, self.logvar = (
            _dilated(pyramid, weight[rows], bias[rows], device, full_dtype) for rows in (mean, logvar)
        )

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState, *, moments: bool) -> list[torch.Tensor]:
        """`(T, B, h, w, 2c)` -> mean `(T, B, h, w, z)`, and with `moments` the log-variance."""
        normed = torch.empty_like(x_TBHWC)
        self.norm(x_TBHWC, normed)
        x_NCHW = normed.flatten(0, 1).permute(0, 3, 1, 2)
        outputs = []
        for convs in (self.mean, self.logvar)[: 1 + moments]:
            first, *others = convs
            y = first(x_NCHW)
            for conv in others:
                y += conv(x_NCHW)
            outputs.append(y.permute(0, 2, 3, 1).unflatten(0, x_TBHWC.shape[:2]))
        return outputs


def _top(network: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Folds the top-level pair and the head's 1x1 into one matrix on the six outputs: `(2z, 12z)`, bias `(2z,)`, float64."""
    pair, last = network.conv1, cast("published.PyramidHead", network.encoder.head[2]).PAC_conv.conv
    weight = torch.cat([pair.conv_2d.weight.double().flatten(1), pair.conv_3d.weight.double().flatten(1)])
    bias = torch.cat([cast("torch.Tensor", conv.bias).double() for conv in (pair.conv_2d, pair.conv_3d)])
    last_bias = cast("torch.Tensor", last.bias).double()
    return weight @ last.weight.double().flatten(1), weight @ last_bias + bias


def _dilated(
    pyramid: published.PyramidHead, top: torch.Tensor, bias: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> list[FrameConv]:
    """One 3x3 kernel per dilation; the 1x1 kernel is added to the centre of the first."""
    names = ["PAC_0", *(f"PAC_{dilation}" for dilation in DILATIONS)]
    convs = [cast("published.FrameConv2d", getattr(pyramid, name)).conv for name in names]
    z = convs[0].weight.shape[0] // 2
    kernels = []
    for index, conv in enumerate(convs):
        # the first halves of all outputs come before all second halves
        rows = torch.cat([top[:, index * z : (index + 1) * z], top[:, (6 + index) * z : (7 + index) * z]], dim=1)
        kernels.append(torch.einsum("om,mikl->oikl", rows, conv.weight.double()))
        bias = bias + rows @ cast("torch.Tensor", conv.bias).double()
    point, *dilated = kernels
    dilated[0][:, :, 1:2, 1:2] += point
    return [
        FrameConv(kernel, bias if dilation == 1 else None, device, dtype, padding=dilation, dilation=dilation)
        for kernel, dilation in zip(dilated, DILATIONS, strict=True)
    ]


class PixelHead:
    """Norm, SiLU, and one convolution per frame whose outputs are those of the 2-D kernel and of each tap of the 3-D kernel.

    Frame 0 of a group (and of the clip) is the 2-D branch's output, the others the 3-D branch's, so no past frame is needed.
    """

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        self.full_dtype = torch.promote_types(dtype, torch.float32)
        self.norm = NormSiLU(cast("published.NormGain", network.decoder.head[0]), device, self.full_dtype)
        pair = cast("published.ConvPair", network.decoder.head[2])
        spatial, taps = pair.conv_2d.weight.double(), pair.conv_3d.weight.double()
        previous, present, following = taps.unbind(2)
        self.spatial = FrameConv(spatial, pair.conv_2d.bias, device, self.full_dtype, padding=(0, 1))
        bias = torch.zeros(12, dtype=torch.float64)
        bias[:3], bias[6:9] = cast("torch.Tensor", pair.conv_2d.bias), cast("torch.Tensor", pair.conv_3d.bias)
        self.all = FrameConv(
            torch.cat([spatial, previous, present, following]), bias, device, self.full_dtype, padding=(0, 1)
        )

    def __call__(self, x_TBHWC: torch.Tensor, stream: StreamState) -> torch.Tensor:
        """`(T, B, H, W, 2c)` -> frames `(T, B, H, W, 3)`."""
        T, B, H, W, channels = x_TBHWC.shape
        buffer = stream.bordered("head", T, B, H, W, channels, self.full_dtype)
        out = x_TBHWC.new_empty((T, B, H, W, 3))
        rows = stripes(H, W, stream.device)
        for top, end in rows:
            self.norm(x_TBHWC[:, :, top:end], buffer[:, :, top + 1 : end + 1])
        for top, end in rows:
            window = buffer[:, :, top : end + 2].flatten(0, 1).permute(0, 3, 1, 2)
            y = (self.spatial if stream.first else self.all)(window).permute(0, 2, 3, 1).unflatten(0, (T, B))
            out[:, :, top:end] = y if stream.first else _frames_from_taps(y)
        return out


def _frames_from_taps(y_TBHWC: torch.Tensor) -> torch.Tensor:
    """Twelve outputs per frame (2-D; taps for the next, this and the previous frame) -> the three colours of each frame."""
    y = y_TBHWC.unflatten(0, (-1, GROUP))
    spatial, to_next, present, to_previous = y.split(3, dim=-1)
    out = torch.empty_like(spatial)
    out[:, 0] = spatial[:, 0]
    out[:, 1:] = present[:, 1:] + to_next[:, :-1]
    out[:, 1:-1] += to_previous[:, 2:]
    return out.flatten(0, 1)
