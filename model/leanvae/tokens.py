"""NAF layers on channel-last token grids, prepared for speed: folded weights, one latent row at a time on a CPU.

Enters: a layer's published parameters. Leaves: callables on `B t h w C` grids whose first two rows are the past, or on single rows.

On a CPU every product works on (a fixed slice of) one latent row of one video, and every convolution on three rows of one video. The
shapes that reach the libraries then depend on the frame size alone, never on the chunk or the batch, so results are bit for bit the
same under any partition and any batch. It is also the faster way: what a layer leaves for the next one is still in cache.
On other devices whole grids are handled at once, and chunked results equal whole ones to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Rows = tuple[
        torch.Tensor | None, torch.Tensor | None, torch.Tensor
    ]  # oldest, older, present: `(h, w, C)` each; None is zeros
    Affine = tuple[torch.Tensor, torch.Tensor]  # weight, bias
    Span = tuple[slice, slice]  # videos, rows
    Step = tuple[slice, torch.Tensor, torch.Tensor]  # which tokens, they themselves, their hidden layer

PAST = 2  # rows of history a causal kernel of three needs
BLOCK = 1024  # tokens of a product on a CPU; part of the numerics


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the residual stream, norms and heads: at least float32. Only the big products run in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class Projection:
    """`x W^T + b` on `(N, in)` tokens, in the dtype of the prepared weight; also followed by GELU, or by a product with other tokens.

    On a CPU the weight is packed once for oneDNN, which is 10-20 % faster here than repacking or the default BLAS, and what follows the
    product runs on its float32 sums before they are rounded. Where this build of PyTorch lacks the packed product, `F.linear` gives the
    same values to rounding. `backend` says which is in use.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = weight.detach().to(device, dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(device, dtype).contiguous()
        self.dtype, self.width = dtype, weight.shape[0]
        self.backend = "onednn" if _packs(device, dtype) else "torch"
        if self.backend == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, BLOCK)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`(N, in)` -> `(N, out)`."""
        x_NC = x_NC.to(self.dtype)
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_NC, self.weight, self.bias, "none", [], "")
        return F.linear(x_NC, self.weight, self.bias)

    def into(self, x_NC: torch.Tensor, out_NC: torch.Tensor) -> None:
        """As calling it, into existing memory of the weight's dtype; for products without a bias."""
        if self.backend == "onednn" or self.bias is not None:
            out_NC.copy_(self(x_NC))
        else:
            torch.mm(x_NC, self.weight.T, out=out_NC)

    def gelu(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`gelu(x W^T + b)`, the exact GELU; `x` in the weight's dtype."""
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_NC, self.weight, self.bias, "gelu", [], "none")
        return F.gelu(F.linear(x_NC, self.weight, self.bias))

    def times(self, x_NC: torch.Tensor, factor_NC: torch.Tensor) -> torch.Tensor:
        """`(x W^T + b) * factor`; both in the weight's dtype."""
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise.binary(x_NC, factor_NC, self.weight, self.bias, "mul")
        return F.linear(x_NC, self.weight, self.bias).mul_(factor_NC)


def _packs(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _adds_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
    return _packs(device, dtype) and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def by_rows(device: torch.device) -> bool:
    """Whether layers handle one row of one video at a time there, rather than whole grids."""
    return device.type == "cpu"


def blocks(tokens: int) -> Iterator[slice]:
    """Slices of a row's tokens that one product handles at a time."""
    for start in range(0, tokens, BLOCK):
        yield slice(start, min(start + BLOCK, tokens))


def spans(batch: int, rows: int, device: torch.device) -> Iterator[Span]:
    """(videos, rows) handled at a time: one row of one video, or everything."""
    if not by_rows(device):
        yield slice(0, batch), slice(0, rows)
        return
    for b in range(batch):
        for r in range(rows):
            yield slice(b, b + 1), slice(r, r + 1)


class NAFLayer:
    """`y = x + ds(x); y + ffd(y)`, or without the two sums where `residual` is false.

    Folded, exactly up to rounding: the first sum into the depthwise kernel (one more on its present-centre tap), the LayerNorm's affine
    part into the widening product. The hidden width is padded with zeros, which stay zero through `a * gelu(g)`.
    """

    inner_multiple = 16  # odd hidden widths (341, 1365) cost up to half the speed of a matrix product

    def __init__(
        self,
        ds_conv: nn.Conv3d,
        ffd: nn.Sequential,
        slot: int,
        residual: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        norm, widen, narrow = cast("nn.LayerNorm", ffd[0]), cast("nn.Linear", ffd[1]), cast("nn.Linear", ffd[4])
        self.slot, self.residual, self.device, self.eps = slot, residual, device, norm.eps
        self.channels = int(ds_conv.weight.shape[0])
        wide = wide_dtype(dtype)

        taps = ds_conv.weight.detach().double()
        if residual:
            taps = taps.clone()
            taps[:, 0, 2, 1, 1] += 1
        self.taps = taps.to(device, wide).contiguous(memory_format=torch.channels_last_3d)
        rows = (self.taps[:, :, row] for row in range(PAST + 1))
        self._row_taps = tuple(row.contiguous(memory_format=torch.channels_last) for row in rows)
        self._adds_in_place = _adds_convolutions(device, wide)
        self.taps_bias = None if ds_conv.bias is None else ds_conv.bias.detach().to(device, wide)

        weight = widen.weight.detach().double()
        inner = weight.shape[0] // 2
        fill = -inner % self.inner_multiple
        bias = weight @ norm.bias.detach().double()
        weight = weight * norm.weight.detach().double()
        value, gate = (F.pad(half, (0, 0, 0, fill)) for half in weight.split(inner))
        value_bias, gate_bias = (F.pad(half, (0, fill)) for half in bias.split(inner))
        self._prepare_widening((value, value_bias), (gate, gate_bias), dtype)
        self._narrow, self._fill = narrow.weight, fill
        self.narrow = Projection(self.narrow_weight(), None, device, dtype)

    def _prepare_widening(self, value: Affine, gate: Affine, dtype: torch.dtype) -> None:
        self.value = Projection(*value, self.device, dtype)
        self.gate = Projection(*gate, self.device, dtype)

    def narrow_weight(self) -> torch.Tensor:
        """The narrowing product `(C, padded inner)` in float64, for folding into what follows it."""
        return F.pad(self._narrow.detach().double(), (0, self._fill))

    def convolved(self, padded_BthwC: torch.Tensor) -> torch.Tensor:
        """The convolved tokens of a whole grid, `(B, rows, h, w, C)`, in fresh memory."""
        x = padded_BthwC.permute(0, 4, 1, 2, 3)
        y = F.conv3d(x, self.taps, self.taps_bias, padding=(0, 1, 1), groups=self.channels)
        return y.permute(0, 2, 3, 4, 1).contiguous()

    def convolved_row(self, rows: Rows) -> torch.Tensor:
        """The convolved tokens of one row, `(h, w, C)`, in fresh memory.

        Three two-dimensional convolutions that add up: a third faster here than one of three dimensions, and rows need not lie together.
        """
        oldest, older, present_hwC = rows
        present = _as_image(present_hwC)
        pairs = (older, self._row_taps[1]), (oldest, self._row_taps[0])
        earlier = [(_as_image(row), taps) for row, taps in pairs if row is not None]
        if self._adds_in_place:
            sides = [1, 1], [1, 1], [1, 1], self.channels
            convolve = torch.ops.mkldnn._convolution_pointwise
            y = convolve(present, self._row_taps[2], self.taps_bias, *sides, "none", [], "")
            add = torch.ops.mkldnn._convolution_pointwise_.binary
            for row, taps in earlier:
                y = add(y, row, taps, None, *sides, "add", 1.0, None, [], None)
        else:
            y = F.conv2d(present, self._row_taps[2], self.taps_bias, padding=1, groups=self.channels)
            for row, taps in earlier:
                y += F.conv2d(row, taps, padding=1, groups=self.channels)
        return y.squeeze(0).permute(1, 2, 0).contiguous()

    def hidden(self, y_NC: torch.Tensor) -> torch.Tensor:
        """`(N, C)` -> the gated hidden layer `(N, inner)`, before the narrowing product."""
        normed = F.layer_norm(y_NC, (self.channels,), eps=self.eps).to(self.value.dtype)
        return self.value.times(normed, self.gate.gelu(normed))

    def steps(self, padded_BthwC: torch.Tensor) -> Iterator[Step]:
        """A whole grid up to the narrowing product, a block at a time: which tokens, they themselves, their hidden layer."""
        y_NC = self.convolved(padded_BthwC).view(-1, self.channels)
        yield slice(0, y_NC.shape[0]), y_NC, self.hidden(y_NC)

    def row_steps(self, rows: Rows) -> Iterator[Step]:
        """As `steps`, of one row."""
        y_NC = self.convolved_row(rows).view(-1, self.channels)
        for block in blocks(y_NC.shape[0]):
            yield block, y_NC[block], self.hidden(y_NC[block])

    def row(self, rows: Rows) -> torch.Tensor:
        """One row through the layer, `(h, w, C)` in fresh memory."""
        y_hwC = self.convolved_row(rows)
        y_NC = y_hwC.view(-1, self.channels)
        for block in blocks(y_NC.shape[0]):
            branch = self.narrow(self.hidden(y_NC[block])).to(y_NC.dtype)
            if self.residual:
                y_NC[block] += branch
            else:
                y_NC[block] = branch
        return y_hwC

    def __call__(self, padded_BthwC: torch.Tensor, out_BthwC: torch.Tensor) -> None:
        """Reads `rows + 2` rows, writes `rows` rows into `out_BthwC` (which may be a slice of the channels of something wider)."""
        if by_rows(self.device):
            for padded_thwC, out_thwC in zip(padded_BthwC, out_BthwC, strict=True):
                for row, out_hwC in enumerate(out_thwC):
                    oldest, older, present = padded_thwC[row : row + PAST + 1].unbind()
                    out_hwC.copy_(self.row((oldest, older, present)))
            return
        y = self.convolved(padded_BthwC)
        branch = self.narrow(self.hidden(y.view(-1, self.channels))).view(y.shape)
        if self.residual:
            torch.add(y, branch, out=out_BthwC)
        else:
            out_BthwC.copy_(branch)


def _as_image(row_hwC: torch.Tensor) -> torch.Tensor:
    """The row as a channels-last `(1, C, h, w)`, sharing memory."""
    return row_hwC.permute(2, 0, 1).unsqueeze(0)


class RowMemory:
    """What every layer remembers of one video that goes through row by row: its last two input rows, None before the start."""

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int, video: int) -> None:
        self._rows: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * slots
        if past is not None:
            self._rows = [(tensor[video, 0], tensor[video, 1]) for tensor in past]

    def window(self, slot: int, row_hwC: torch.Tensor) -> Rows:
        """The rows a layer sees when `row_hwC` is the present; it will be remembered, so nobody may write to it."""
        oldest, older = self._rows[slot]
        self._rows[slot] = (older, row_hwC)
        return oldest, older, row_hwC

    def last(self, slot: int) -> torch.Tensor:
        """The last two rows, `(2, h, w, C)` in fresh memory."""
        oldest, older = self._rows[slot]
        if older is None:
            raise RuntimeError(f"layer {slot} saw no row")
        return torch.stack([torch.zeros_like(older) if oldest is None else oldest, older])


def through(layers: Sequence[NAFLayer], row_hwC: torch.Tensor, memory: RowMemory) -> torch.Tensor:
    """One row through layers in order."""
    for layer in layers:
        row_hwC = layer.row(memory.window(layer.slot, row_hwC))
    return row_hwC


class Carry:
    """The two past rows of every layer: read from the state that came in, kept for the one that goes out."""

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int) -> None:
        self._past = past
        self._kept: list[torch.Tensor | None] = [None] * slots

    def room(
        self, slot: int, batch: int, rows: int, grid: tuple[int, int], channels: int, like: torch.Tensor
    ) -> torch.Tensor:
        """Memory for a layer's input `(batch, 2 + rows, h, w, channels)` with the past (zeros at the start of a video) in front."""
        padded = like.new_empty((batch, PAST + rows, *grid, channels))
        if self._past is None:
            padded[:, :PAST].zero_()
        else:
            padded[:, :PAST].copy_(self._past[slot])
        return padded

    def keep(self, slot: int, padded_BthwC: torch.Tensor) -> None:
        """Remembers the last two rows a layer saw."""
        self._kept[slot] = padded_BthwC[:, -PAST:].clone()

    def kept(self) -> tuple[torch.Tensor, ...]:
        """The new state's tensors; every layer must have been run."""
        done = tuple(tensor for tensor in self._kept if tensor is not None)
        if len(done) != len(self._kept):
            raise RuntimeError(f"{len(self._kept) - len(done)} of {len(self._kept)} layers left no state")
        return done


def run_stack(layers: Sequence[NAFLayer], padded_BthwC: torch.Tensor, carry: Carry, out_BthwC: torch.Tensor) -> None:
    """Layers in order; the last one writes into `out_BthwC`."""
    batch, rows, grid = padded_BthwC.shape[0], padded_BthwC.shape[1] - PAST, tuple(padded_BthwC.shape[2:4])
    for index, layer in enumerate(layers):
        carry.keep(layer.slot, padded_BthwC)
        if index + 1 == len(layers):
            layer(padded_BthwC, out_BthwC)
            return
        following = carry.room(layers[index + 1].slot, batch, rows, (grid[0], grid[1]), layer.channels, padded_BthwC)
        layer(padded_BthwC, following[:, PAST:])
        padded_BthwC = following
