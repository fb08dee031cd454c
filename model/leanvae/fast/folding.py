"""Haar transform and patch projection of LeanVAE as one matrix between pixels and tokens: both are linear."""

from __future__ import annotations

import torch


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
