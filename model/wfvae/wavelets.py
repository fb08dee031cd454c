"""Haar transforms of WF-VAE, as cells of pixels and small matrices.

A cell holds the pixels of one 2x2x2 or 2x2 block as channels. The matrices between cells and bands are made from the filters in a
checkpoint and fold into the convolution next to them.

Cell channel = C * tap + c with taps in the order (frame, row, column); band channel = C * band + c, low band first.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        return PLANE_GAIN * torch.tensor([[signs]], device="cpu")
    times, rows, columns = (bool(VOLUME_BANDS.index(name) & bit) for bit in (4, 2, 1))
    taps = [(-1.0) ** (times * a + rows * b + columns * c) for a, b, c in product((0, 1), repeat=3)]
    return VOLUME_GAIN * torch.tensor(taps, device="cpu").view(1, 1, 2, 2, 2)


def filters_of(weights: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Filters of the transform, forward or inverse, published under `prefix`: `(bands, taps)` float64."""
    names = PLANE_BANDS if f"{prefix}.aa" in weights else VOLUME_BANDS
    keys = [key if (key := f"{prefix}.{name}") in weights else f"{key}_conv.conv.weight" for name in names]
    return torch.stack([weights[key].detach().double().cpu().flatten() for key in keys])


def per_colour(matrix: torch.Tensor) -> torch.Tensor:
    """Expands a matrix between bands and taps to one between `3 * band + rgb` and `3 * tap + rgb`."""
    return torch.kron(matrix.contiguous(), torch.eye(3, dtype=matrix.dtype))


def fold_analysis(weight_OIhw: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Weight of a convolution that reads bands -> weight of the same convolution on cells, float64."""
    return torch.einsum("oihw,ij->ojhw", weight_OIhw.detach().double(), per_colour(filters))


def fold_synthesis(weight: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Weight or bias that produces bands (first axis) -> one that produces cells, float64."""
    return torch.einsum("ij,i...->j...", per_colour(filters), weight.detach().double())


def volume_cells(x_BTHWC: torch.Tensor, *, first: bool) -> torch.Tensor:
    """`B T H W C` -> `B T/2 H/2 W/2 8C`; at the start of a video the first frame is repeated in front."""
    if first:
        x_BTHWC = torch.cat([x_BTHWC[:, :1], x_BTHWC], dim=1)
    B, T, H, W, C = x_BTHWC.shape
    cells = x_BTHWC.reshape(B, T // 2, 2, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return cells.reshape(B, T // 2, H // 2, W // 2, 8 * C)


def plane_cells(x_BTHWC: torch.Tensor) -> torch.Tensor:
    """`B T H W C` -> `B T H/2 W/2 4C`."""
    B, T, H, W, C = x_BTHWC.shape
    cells = x_BTHWC.reshape(B, T, H // 2, 2, W // 2, 2, C).permute(0, 1, 2, 4, 3, 5, 6)
    return cells.reshape(B, T, H // 2, W // 2, 4 * C)


def from_volume_cells(cells_BTHWC: torch.Tensor, *, first: bool) -> torch.Tensor:
    """`B T H W 8C` -> `B 2T 2H 2W C`; at the start of a video the first frame is dropped."""
    B, T, H, W, C = cells_BTHWC.shape
    x = cells_BTHWC.view(B, T, H, W, 2, 2, 2, C // 8).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, 2 * T, 2 * H, 2 * W, C // 8)[:, int(first) :]


def from_plane_cells(cells_BTHWC: torch.Tensor) -> torch.Tensor:
    """`B T H W 4C` -> `B T 2H 2W C`."""
    B, T, H, W, C = cells_BTHWC.shape
    x = cells_BTHWC.view(B, T, H, W, 2, 2, C // 4).permute(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(B, T, 2 * H, 2 * W, C // 4)
