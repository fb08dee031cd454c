"""NAF layer on fused GPU kernels: convolution with norm, one product for value and gate, and GEGLU.

Same interface as `model.leanvae.fast.tokens.NAFLayer` on whole grids; equal to it up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.leanvae.fast.tokens import NAFLayer, Projection

if TYPE_CHECKING:
    from collections.abc import Iterator

    from model.kernels import Kernels
    from model.leanvae.fast.tokens import Affine, HiddenBlock

# Tokens of a product. Its packed output, at most 5.6 kB a token, should stay in the level-2 cache of a large GPU (50 MB) until the
# gate reads it, while the products still fill every multiprocessor several times.
BLOCK = 8192


class FusedLayer(NAFLayer):
    """`NAFLayer` for 16-bit arithmetic on a GPU; the residual stream stays float32."""

    inner_multiple = 64  # fills whole tiles of a GPU's matrix units

    def __init__(self, *layer: Any) -> None:
        *plain, kernels = layer
        super().__init__(*plain)
        self._kernels: Kernels = kernels
        bias = self.taps_bias if self.taps_bias is not None else self.taps.new_zeros(self.channels)
        self._taps_KC, self._bias_C = self.taps.reshape(self.channels, 27).T.contiguous(), bias.contiguous()

    def _prepare_widening(self, value: Affine, gate: Affine, dtype: torch.dtype) -> None:
        weight, bias = (torch.cat(parts) for parts in zip(value, gate, strict=True))
        self._packed = Projection(weight, bias, self.device, dtype)

    def _convolved_and_normed(self, padded_BthwC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.convolve_norm(padded_BthwC, self._taps_KC, self._bias_C, self.eps, self._packed.dtype)

    def _gated_blocks(self, normed_BthwC: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        normed_NC = normed_BthwC.view(-1, self.channels)
        for start in range(0, normed_NC.shape[0], BLOCK):
            block = slice(start, min(start + BLOCK, normed_NC.shape[0]))
            yield block, self._kernels.geglu(self._packed(normed_NC[block]))

    def hidden_blocks(self, padded_BthwC: torch.Tensor) -> Iterator[HiddenBlock]:
        """`NAFLayer.hidden_blocks`, in blocks of `BLOCK` tokens over the whole grid."""
        y, normed = self._convolved_and_normed(padded_BthwC)
        y_NC = y.view(-1, self.channels)
        for block, hidden in self._gated_blocks(normed):
            yield block, y_NC[block], hidden

    def __call__(self, padded_BthwC: torch.Tensor, out_BthwC: torch.Tensor) -> None:
        """`NAFLayer.__call__` on a whole grid."""
        y, normed = self._convolved_and_normed(padded_BthwC)
        branch = torch.empty_like(normed)
        for block, hidden in self._gated_blocks(normed):
            self.narrow.write_to(hidden, branch.view(-1, self.channels)[block])
        if self.residual:
            torch.add(y, branch, out=out_BthwC)
        else:
            out_BthwC.copy_(branch)
