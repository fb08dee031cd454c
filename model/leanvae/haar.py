"""Haar wavelets of LeanVAE: coefficients +1/-1, stride 2, band-major channels 3 * band + rgb."""

from __future__ import annotations

import torch

from model.layers import no_autocast

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
    with no_autocast(cells):  # 8-bit pixels would lose bits in bfloat16
        out = torch.einsum("BCTaHbWc,nabc->BnCTHW", cells, signs.to(cells))
    return out.reshape(B, bands * C, T // frames, H // 2, W // 2)


def synthesise(coefficients: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Exact inverse of `analyse`."""
    B, bandsC, T, H, W = coefficients.shape
    bands, frames = signs.shape[:2]
    split = coefficients.reshape(B, bands, bandsC // bands, T, H, W)
    with no_autocast(split):
        out = torch.einsum("BnCTHW,nabc->BCTaHbWc", split, signs.to(split)) / bands
    return out.reshape(B, bandsC // bands, T * frames, 2 * H, 2 * W)
