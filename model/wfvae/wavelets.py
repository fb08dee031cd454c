"""Haar transforms of WF-VAE, as published: filters of the bands, forward transform, inverse transform; in at least float32.

Filters are buffers, so that `parameters()` are the trained ones, as in the published EMA files. Channel of bands = 3 * band + colour, low
band first.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, at_least_float32, no_autocast

VOLUME_BANDS = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")  # band = 4 time + 2 row + column
PLANE_BANDS = ("aa", "ad", "da", "dd")  # low, rows, columns, both
VOLUME_GAIN = 0.3536  # not 1 / sqrt(8): the networks were trained with this rounded constant
PLANE_GAIN = 0.5


def default_filter(key: str) -> torch.Tensor:
    """Haar filter that a published key names, `(1, 1, 2, 2, 2)` or `(1, 1, 2, 2)` float32."""
    name = key.split("wavelet_transform", 1)[1].split(".")[1].removesuffix("_conv")
    if name in PLANE_BANDS:
        rows, columns = name[1] == "d", name[0] == "d"
        signs = [[(-1.0) ** (rows * b + columns * c) for c in (0, 1)] for b in (0, 1)]
        return PLANE_GAIN * torch.tensor([[signs]], dtype=torch.float32, device="cpu")
    times, rows, columns = (bool(VOLUME_BANDS.index(name) & bit) for bit in (4, 2, 1))
    taps = [(-1.0) ** (times * a + rows * b + columns * c) for a, b, c in product((0, 1), repeat=3)]
    return VOLUME_GAIN * torch.tensor(taps, dtype=torch.float32, device="cpu").view(1, 1, 2, 2, 2)


class Analysis(nn.Module):
    """Forward transform, over frames if `over_time`, else of each frame."""

    def __init__(self, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        for name in VOLUME_BANDS if over_time else PLANE_BANDS:
            if over_time:
                self.add_module(f"{name}_conv", _Filter(name))
            else:
                self.register_buffer(name, default_filter(f"wavelet_transform.{name}"))

    def forward(self, x_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B 3 T H W` -> bands `B 24 (T+1)/2 H/2 W/2` of frame 0 twice and the others (later steps T/2); of each frame `B 12 T H/2 W/2`."""
        if self.over_time:
            kernel = torch.cat([self.get_buffer(f"{name}_conv.conv.weight") for name in VOLUME_BANDS])
            x_BCTHW = repeat_first(x_BCTHW, int(history.first))  # frames are then read in pairs: none is kept
        else:
            kernel = torch.cat([self.get_buffer(name) for name in PLANE_BANDS])[:, :, None]
        with no_autocast(x_BCTHW):
            x_BCTHW = at_least_float32(x_BCTHW)
            bands = F.conv3d(x_BCTHW.flatten(0, 1)[:, None], kernel.to(x_BCTHW.dtype), stride=kernel.shape[2:])
        return bands.unflatten(0, (-1, COLOURS)).transpose(1, 2).flatten(1, 2)


class _Filter(nn.Module):
    """Filter of one band; published as the kernel of a causal convolution."""

    def __init__(self, band: str) -> None:
        super().__init__()
        self.conv = nn.Module()
        self.conv.register_buffer("weight", default_filter(f"wavelet_transform.{band}"))


class Synthesis(nn.Module):
    """Inverse transform; over frames it drops the first frame of a video."""

    def __init__(self, *, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        for name in VOLUME_BANDS if over_time else PLANE_BANDS:
            self.register_buffer(name, default_filter(f"wavelet_transform.{name}"))

    def forward(self, bands_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """Bands -> `B 3 T H W`."""
        kernel = torch.cat([self.get_buffer(name) for name in (VOLUME_BANDS if self.over_time else PLANE_BANDS)])
        kernel = kernel if self.over_time else kernel[:, :, None]
        colours = at_least_float32(bands_BCTHW).unflatten(1, (-1, COLOURS)).transpose(1, 2).flatten(0, 1)
        with no_autocast(bands_BCTHW):
            image = F.conv_transpose3d(colours, kernel.to(colours), stride=kernel.shape[2:])
        return image.unflatten(0, (-1, COLOURS)).squeeze(2)[:, :, int(self.over_time and history.first) :]


def repeat_first(x_BCTHW: torch.Tensor, copies: int) -> torch.Tensor:
    """Repeats the first frame in front."""
    return torch.cat([x_BCTHW[:, :, :1]] * copies + [x_BCTHW], dim=2) if copies else x_BCTHW
