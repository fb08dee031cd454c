"""NAF layers on fused GPU kernels, over token grids `B t h w C`: convolution with norm, one product for value and gate, GEGLU.

Large products run in 16 bits; the residual stream stays float32. A layer's input has its two past rows in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.leanvae.depthwise import HISTORY_ROWS
from model.leanvae.network import padded_geglu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from model.kernels import Kernels

    HiddenBlock = tuple[slice, torch.Tensor, torch.Tensor]  # indices of tokens, the tokens, their hidden layer

# Tokens of a product. Its packed output, at most 5.6 kB a token, should stay in the level-2 cache of a large GPU (50 MB) until the
# gate reads it, while the products still fill every multiprocessor several times.
BLOCK = 8192


class Projection:
    """`x W^T + b` on tokens `(N, in)`, in `dtype`."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = weight.detach().to(device, dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(device, dtype).contiguous()
        self.dtype, self.width = dtype, weight.shape[0]

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`(N, in)` -> `(N, out)`."""
        return F.linear(x_NC.to(self.dtype), self.weight, self.bias)


class FusedLayer:
    """NAF layer: `y = x + ds(x); y + ffd(y)`, without the two sums if `residual` is false.

    Folded, exact up to rounding: the first sum into the depthwise kernel (plus one on its present-centre tap), and the affine part of the
    LayerNorm into the widening product.
    """

    def __init__(
        self,
        ds_conv: nn.Conv3d,
        ffd: nn.Sequential,
        slot: int,
        residual: bool,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        norm, widen, narrow = cast("nn.LayerNorm", ffd[0]), cast("nn.Linear", ffd[1]), cast("nn.Linear", ffd[4])
        self.slot, self.residual, self.eps, self._kernels = slot, residual, norm.eps, kernels
        self.channels, full = ds_conv.out_channels, torch.promote_types(dtype, torch.float32)

        taps = ds_conv.weight.detach().double().clone()
        taps[:, 0, 2, 1, 1] += int(residual)
        self._taps_KC = taps.to(device, full).reshape(self.channels, 27).T.contiguous()
        self._bias_C = cast("nn.Parameter", ds_conv.bias).detach().to(device, full).contiguous()

        wide, self.narrow_weight = padded_geglu(widen.weight.detach().double(), narrow.weight.detach().double())
        bias = wide @ norm.bias.detach().double()
        self._packed = Projection(wide * norm.weight.detach().double(), bias, device, dtype)
        self._narrow_CI = self.narrow_weight.to(device, dtype).contiguous()

    def hidden_blocks(self, padded_BthwC: torch.Tensor) -> Iterator[HiddenBlock]:
        """Runs a grid up to the narrowing product, in blocks of `BLOCK` tokens: their indices, the tokens, their hidden layer."""
        y, normed = self._convolved_and_normed(padded_BthwC)
        y_NC = y.view(-1, self.channels)
        for block, hidden in self._gated_blocks(normed):
            yield block, y_NC[block], hidden

    def __call__(self, padded_BthwC: torch.Tensor, out_BthwC: torch.Tensor) -> None:
        """Reads `rows + 2` rows, writes `rows` rows into `out_BthwC`, which may be a channel slice of a wider tensor."""
        y, normed = self._convolved_and_normed(padded_BthwC)
        branch = torch.empty_like(normed)
        for block, hidden in self._gated_blocks(normed):
            torch.mm(hidden, self._narrow_CI.T, out=branch.view(-1, self.channels)[block])
        if self.residual:
            torch.add(y, branch, out=out_BthwC)
        else:
            out_BthwC.copy_(branch)

    def _convolved_and_normed(self, padded_BthwC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.convolve_norm(padded_BthwC, self._taps_KC, self._bias_C, self.eps, self._packed.dtype)

    def _gated_blocks(self, normed_BthwC: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        normed_NC = normed_BthwC.view(-1, self.channels)
        for start in range(0, normed_NC.shape[0], BLOCK):
            block = slice(start, min(start + BLOCK, normed_NC.shape[0]))
            yield block, self._kernels.geglu(self._packed(normed_NC[block]))


class LayerHistory:
    """Two past rows of every layer: reads them from the previous state, collects those of the next state.

    Unlike `model.history.History` it has layers write their output behind the past rows of the next one, which saves a copy a layer.
    """

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int) -> None:
        self._past = past
        self._saved: list[torch.Tensor | None] = [None] * slots

    def padded_input(
        self, slot: int, batch: int, rows: int, grid: tuple[int, int], channels: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Uninitialised layer input `(batch, 2 + rows, h, w, channels)` whose first two rows are the past, zeros at a video's start."""
        padded = like.new_empty((batch, HISTORY_ROWS + rows, *grid, channels))
        if self._past is None:
            padded[:, :HISTORY_ROWS].zero_()
        else:
            padded[:, :HISTORY_ROWS].copy_(self._past[slot])
        return padded

    def save(self, slot: int, padded_BthwC: torch.Tensor) -> None:
        """Saves the last two rows of a layer's input."""
        self._saved[slot] = padded_BthwC[:, -HISTORY_ROWS:].clone()

    def new_state(self) -> tuple[torch.Tensor, ...]:
        """The next state's tensors. Raises RuntimeError if a layer has not run."""
        done = tuple(tensor for tensor in self._saved if tensor is not None)
        if len(done) != len(self._saved):
            raise RuntimeError(f"{len(self._saved) - len(done)} of {len(self._saved)} layers saved no history")
        return done


def run_stack(
    layers: Sequence[FusedLayer], padded_BthwC: torch.Tensor, history: LayerHistory, out_BthwC: torch.Tensor
) -> None:
    """Runs layers in order; the last one writes into `out_BthwC`."""
    batch, rows, grid = padded_BthwC.shape[0], padded_BthwC.shape[1] - HISTORY_ROWS, tuple(padded_BthwC.shape[2:4])
    for index, layer in enumerate(layers):
        history.save(layer.slot, padded_BthwC)
        if index + 1 == len(layers):
            layer(padded_BthwC, out_BthwC)
            return
        following = history.padded_input(
            layers[index + 1].slot, batch, rows, (grid[0], grid[1]), layer.channels, padded_BthwC
        )
        layer(padded_BthwC, following[:, HISTORY_ROWS:])
        padded_BthwC = following
