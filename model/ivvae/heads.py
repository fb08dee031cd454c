"""IV-VAE's last layers of both directions: the dilated head of the posterior, and the head that gives pixels.

Enters: published parameters, then the residual stream `T B H W 2c`. Leaves: mean or log-variance, or frames. Always in at least
float32. Source: spec sections 3, 4 and 8.

The six convolutions of the encoder's head, the 1x1 over their outputs and the top-level 1x1 pair are linear in a row: each of mean and
log-variance is one kernel of 41 taps, run as five dilated 3x3 kernels with few outputs. Of the decoder's last pair each frame needs
one half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from model.convolution import FrameConv
from model.ivvae.blocks import NormSiLU
from model.ivvae.memory import stripes
from model.ivvae.parameters import DILATIONS

if TYPE_CHECKING:
    from model.ivvae import parameters
    from model.ivvae.memory import Run

GROUP = 4  # frames of a latent


class PosteriorHead:
    """Norm, SiLU, and the folded kernels of the mean and of the log-variance."""

    def __init__(self, network: parameters.Network, device: torch.device, dtype: torch.dtype) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.norm = NormSiLU(cast("parameters.Gain", network.encoder.head[0]), device, wide)
        weight, bias = _top(network)
        half = weight.shape[0] // 4  # rows are [mean 2-D | logvar 2-D | mean 3-D | logvar 3-D], a quarter each
        mean = [*range(half), *range(2 * half, 3 * half)]
        logvar = [row + half for row in mean]
        pyramid = cast("parameters.PyramidHead", network.encoder.head[2])
        self.mean, self.logvar = (_dilated(pyramid, weight[rows], bias[rows], device, wide) for rows in (mean, logvar))

    def __call__(self, x_TBHWC: torch.Tensor, run: Run, *, moments: bool) -> list[torch.Tensor]:
        """`(T, B, h, w, 2c)` -> mean `(T, B, h, w, z)`, and the log-variance where asked for."""
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


def _top(network: parameters.Network) -> tuple[torch.Tensor, torch.Tensor]:
    """The top-level pair and the head's 1x1 as one matrix on the six outputs: `(2z, 12z)`, bias `(2z,)`, float64."""
    pair, last = network.conv1, cast("parameters.PyramidHead", network.encoder.head[2]).PAC_conv.conv
    weight = torch.cat([pair.conv_2d.weight.double().flatten(1), pair.conv_3d.weight.double().flatten(1)])
    bias = torch.cat([cast("torch.Tensor", conv.bias).double() for conv in (pair.conv_2d, pair.conv_3d)])
    inner_bias = cast("torch.Tensor", last.bias).double()
    return weight @ last.weight.double().flatten(1), weight @ inner_bias + bias


def _dilated(
    pyramid: parameters.PyramidHead, top: torch.Tensor, bias: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> list[FrameConv]:
    """One 3x3 kernel per dilation; the 1x1 is added to the first one's centre."""
    names = ["PAC_0", *(f"PAC_{dilation}" for dilation in DILATIONS)]
    convs = [cast("parameters.FrameConv2d", getattr(pyramid, name)).conv for name in names]
    z = convs[0].weight.shape[0] // 2
    kernels = []
    for index, conv in enumerate(convs):
        # the outputs' first halves stand before all second halves
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
    """Norm, SiLU, and one convolution per frame that gives what the 2-D kernel and each tap of the 3-D kernel make of it.

    Frame 0 of a group (and of the clip) shows the 2-D branch, the others the 3-D branch, so nothing of the past is needed.
    """

    def __init__(self, network: parameters.Network, device: torch.device, dtype: torch.dtype) -> None:
        self.wide = torch.promote_types(dtype, torch.float32)
        self.norm = NormSiLU(cast("parameters.Gain", network.decoder.head[0]), device, self.wide)
        pair = cast("parameters.ConvPair", network.decoder.head[2])
        flat, taps = pair.conv_2d.weight.double(), pair.conv_3d.weight.double()
        before, here, behind = taps.unbind(2)
        self.flat = FrameConv(flat, pair.conv_2d.bias, device, self.wide, padding=(0, 1))
        bias = torch.zeros(12, dtype=torch.float64)
        bias[:3], bias[6:9] = cast("torch.Tensor", pair.conv_2d.bias), cast("torch.Tensor", pair.conv_3d.bias)
        self.all = FrameConv(torch.cat([flat, before, here, behind]), bias, device, self.wide, padding=(0, 1))

    def __call__(self, x_TBHWC: torch.Tensor, run: Run) -> torch.Tensor:
        """`(T, B, H, W, 2c)` -> frames `(T, B, H, W, 3)`."""
        T, B, H, W, channels = x_TBHWC.shape
        room = run.bordered("head", T, B, H, W, channels, self.wide)
        out = x_TBHWC.new_empty((T, B, H, W, 3))
        rows = stripes(H, W, run.device)
        for top, end in rows:
            self.norm(x_TBHWC[:, :, top:end], room[:, :, top + 1 : end + 1])
        for top, end in rows:
            window = room[:, :, top : end + 2].flatten(0, 1).permute(0, 3, 1, 2)
            y = (self.flat if run.lead else self.all)(window).permute(0, 2, 3, 1).unflatten(0, (T, B))
            out[:, :, top:end] = y if run.lead else _shown(y)
        return out


def _shown(y_TBHWC: torch.Tensor) -> torch.Tensor:
    """Twelve outputs of every frame (2-D; taps for the next, this and the previous frame) -> the three that are shown."""
    y = y_TBHWC.unflatten(0, (-1, GROUP))
    flat, to_next, here, to_previous = y.split(3, dim=-1)
    out = torch.empty_like(flat)
    out[:, 0] = flat[:, 0]
    out[:, 1:] = here[:, 1:] + to_next[:, :-1]
    out[:, 1:-1] += to_previous[:, 2:]
    return out.flatten(0, 1)
