"""Haar wavelets of LeanVAE (coefficients +1/-1, stride 2), and their folding into the patch projections next to them.

Coefficients have band-major channels: 3 * band + rgb. The transform and the projection are both linear, so each pair becomes one matrix
between pixels and tokens.
"""

from __future__ import annotations

import torch

# Nominal filters are +-1/sqrt2 and the published code rescales them to +-1; using +-1 avoids rounding the filters in low precision.


def image_signs() -> torch.Tensor:
    """`(4, 1, 2, 2)`: sign by band, frame, row, column of a 2x2 cell. In the band index the *width* bit is the more significant one."""
    low_high = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.einsum("wc,hb->whbc", low_high, low_high).reshape(4, 1, 2, 2)


def video_signs() -> torch.Tensor:
    """`(8, 2, 2, 2)`: sign by band, frame, row, column of a 2x2x2 cell. Bits of the band index are time, height, width."""
    low_high = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.einsum("ta,hb,wc->thwabc", low_high, low_high, low_high).reshape(8, 2, 2, 2)


def analyse(video_BCTHW: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Pixels -> coefficients `B, bands*C, T/ft, H/2, W/2`; `signs` is `(bands, ft, 2, 2)`."""
    B, C, T, H, W = video_BCTHW.shape
    bands, frames = signs.shape[:2]
    cells = video_BCTHW.reshape(B, C, T // frames, frames, H // 2, 2, W // 2, 2)
    out = torch.einsum("BCTaHbWc,nabc->BnCTHW", cells, signs.to(cells))
    return out.reshape(B, bands * C, T // frames, H // 2, W // 2)


def synthesise(coefficients: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Exact inverse of `analyse`."""
    B, bandsC, T, H, W = coefficients.shape
    bands, frames = signs.shape[:2]
    split = coefficients.reshape(B, bands, bandsC // bands, T, H, W)
    out = torch.einsum("BnCTHW,nabc->BCTaHbWc", split, signs.to(split)) / bands
    return out.reshape(B, bandsC // bands, T * frames, 2 * H, 2 * W)


def fold_patch(low: torch.Tensor, high: torch.Tensor, signs: torch.Tensor, patch: int) -> torch.Tensor:
    """Folds the Haar transform and two patch projections into one projection from pixels.

    `low` `(l, 3*pt*patch^2)` reads band 0, `high` `(h, (bands-1)*3*pt*patch^2)` the others. Returns float64
    `(l+h, 3 * pt*ft * (2*patch)^2)`; the input vector is the pixel block in C order (rgb, frame, row, column).
    """
    kernels = []
    for weight, part in ((low, signs[:1]), (high, signs[1:])):
        split = weight.double().reshape(weight.shape[0], part.shape[0], 3, -1, patch, patch)
        kernels.append(torch.einsum("oncijk,nabd->ociajbkd", split, part).reshape(weight.shape[0], -1))
    return torch.cat(kernels)


def fold_unpatch(low: torch.Tensor, high: torch.Tensor, signs: torch.Tensor, patch: int) -> torch.Tensor:
    """Folds two un-patch projections and the inverse Haar transform into one projection to pixels, laid out as in `fold_patch`.

    `low` `(3*pt*patch^2, l)`, `high` `((bands-1)*3*pt*patch^2, h)`; a bias is folded by passing it as a column.
    Returns float64 `(pixels, l+h)`.
    """
    kernels = []
    for weight, part in ((low, signs[:1]), (high, signs[1:])):
        split = weight.double().reshape(part.shape[0], 3, -1, patch, patch, weight.shape[1])
        pixels = torch.einsum("ncijko,nabd->ciajbkdo", split, part) / signs.shape[0]
        kernels.append(pixels.reshape(-1, weight.shape[1]))
    return torch.cat(kernels, dim=1)
