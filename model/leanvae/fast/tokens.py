"""NAF layers on channel-last token grids, prepared for speed: folded weights, on a CPU one latent row at a time.

A prepared layer takes `B t h w C` grids whose first two rows are the past, or single rows with their past.

On a CPU every product works on (a fixed slice of) one latent row of one video, and every convolution on three rows of one video. The shapes
passed to the libraries then depend on the frame size alone, so results have the same bits for any chunking and any batch. It is also
faster, because a layer's output is still in cache when the next layer reads it.
On other devices whole grids are processed at once, and chunked results equal whole ones up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.leanvae.depthwise import HISTORY_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Rows = tuple[
        torch.Tensor | None, torch.Tensor | None, torch.Tensor
    ]  # two rows back, one back, present: `(h, w, C)`; None: zeros
    Affine = tuple[torch.Tensor, torch.Tensor]  # weight, bias
    Span = tuple[slice, slice]  # videos, rows
    HiddenBlock = tuple[slice, torch.Tensor, torch.Tensor]  # indices of tokens, the tokens, their hidden layer

BLOCK = 1024  # tokens of a product on a CPU; changing it changes bits of latents


def full_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the residual stream, norms and heads: at least float32. Only the large products run in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class Projection:
    """`x W^T + b` on tokens `(N, in)` in the dtype of the prepared weight; optionally followed by GELU or an elementwise product.

    On a CPU the weight is packed once for oneDNN, which is 10-20 % faster here than repacking or the default BLAS; GELU or elementwise
    product then run on the float32 sums before rounding. If this PyTorch build lacks the packed product, `F.linear` gives the same
    values up to rounding. `backend` names the one in use.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.weight = weight.detach().to(device, dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(device, dtype).contiguous()
        self.dtype, self.width = dtype, weight.shape[0]
        self.backend = "onednn" if _can_pack(device, dtype) else "torch"
        if self.backend == "onednn":
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, BLOCK)

    def __call__(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`(N, in)` -> `(N, out)`."""
        x_NC = x_NC.to(self.dtype)
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_NC, self.weight, self.bias, "none", [], "")
        return F.linear(x_NC, self.weight, self.bias)

    def write_to(self, x_NC: torch.Tensor, out_NC: torch.Tensor) -> None:
        """Writes the result of a call into existing memory of the weight's dtype; saves a copy for products without bias."""
        if self.backend == "onednn" or self.bias is not None:
            out_NC.copy_(self(x_NC))
        else:
            torch.mm(x_NC, self.weight.T, out=out_NC)

    def gelu(self, x_NC: torch.Tensor) -> torch.Tensor:
        """`gelu(x W^T + b)`, exact GELU; `x` in the weight's dtype."""
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise(x_NC, self.weight, self.bias, "gelu", [], "none")
        return F.gelu(F.linear(x_NC, self.weight, self.bias))

    def multiplied(self, x_NC: torch.Tensor, factor_NC: torch.Tensor) -> torch.Tensor:
        """`(x W^T + b) * factor`; both in the weight's dtype."""
        if self.backend == "onednn":
            return torch.ops.mkldnn._linear_pointwise.binary(x_NC, factor_NC, self.weight, self.bias, "mul")
        return F.linear(x_NC, self.weight, self.bias).mul_(factor_NC)


def _can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _can_accumulate_convolutions(device: torch.device, dtype: torch.dtype) -> bool:
    return _can_pack(device, dtype) and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_convolution_pointwise_")


def by_rows(device: torch.device) -> bool:
    """Whether layers on this device process one row of one video at a time instead of whole grids."""
    return device.type == "cpu"


def blocks(tokens: int) -> Iterator[slice]:
    """Slices of a row's tokens, one per product."""
    for start in range(0, tokens, BLOCK):
        yield slice(start, min(start + BLOCK, tokens))


def spans(batch: int, rows: int, device: torch.device) -> Iterator[Span]:
    """(videos, rows) processed at a time: one row of one video, or everything."""
    if not by_rows(device):
        yield slice(0, batch), slice(0, rows)
        return
    for b in range(batch):
        for r in range(rows):
            yield slice(b, b + 1), slice(r, r + 1)


class NAFLayer:
    """NAF layer: `y = x + ds(x); y + ffd(y)`, without the two sums if `residual` is false.

    Folded, exact up to rounding: the first sum into the depthwise kernel (plus one on its present-centre tap), and the affine part of the
    LayerNorm into the widening product. The hidden layer is padded with zeros, which stay zero through `a * gelu(g)`.
    """

    hidden_multiple = 16  # odd hidden widths (341, 1365) cost up to half the speed of a matrix product

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
        full = full_dtype(dtype)

        taps = ds_conv.weight.detach().double()
        if residual:
            taps = taps.clone()
            taps[:, 0, 2, 1, 1] += 1
        self.taps = taps.to(device, full).contiguous(memory_format=torch.channels_last_3d)
        rows = (self.taps[:, :, row] for row in range(HISTORY_ROWS + 1))
        self._row_taps = tuple(row.contiguous(memory_format=torch.channels_last) for row in rows)
        self._accumulates_in_place = _can_accumulate_convolutions(device, full)
        self.taps_bias = None if ds_conv.bias is None else ds_conv.bias.detach().to(device, full)

        weight = widen.weight.detach().double()
        hidden = weight.shape[0] // 2
        fill = -hidden % self.hidden_multiple
        bias = weight @ norm.bias.detach().double()
        weight = weight * norm.weight.detach().double()
        value, gate = (F.pad(half, (0, 0, 0, fill)) for half in weight.split(hidden))
        value_bias, gate_bias = (F.pad(half, (0, fill)) for half in bias.split(hidden))
        self._prepare_widening((value, value_bias), (gate, gate_bias), dtype)
        self._narrow, self._fill = narrow.weight, fill
        self.narrow = Projection(self.narrow_weight(), None, device, dtype)

    def _prepare_widening(self, value: Affine, gate: Affine, dtype: torch.dtype) -> None:
        self.value = Projection(*value, self.device, dtype)
        self.gate = Projection(*gate, self.device, dtype)

    def narrow_weight(self) -> torch.Tensor:
        """Weight of the narrowing product `(C, padded hidden)` in float64, for folding into the next linear map."""
        return F.pad(self._narrow.detach().double(), (0, self._fill))

    def convolved(self, padded_BthwC: torch.Tensor) -> torch.Tensor:
        """Convolved tokens of a whole grid, `(B, rows, h, w, C)`, in fresh memory."""
        x = padded_BthwC.permute(0, 4, 1, 2, 3)
        y = F.conv3d(x, self.taps, self.taps_bias, padding=(0, 1, 1), groups=self.channels)
        return y.permute(0, 2, 3, 4, 1).contiguous()

    def convolved_row(self, rows: Rows) -> torch.Tensor:
        """Convolved tokens of one row, `(h, w, C)`, in fresh memory.

        The sum of three 2-D convolutions: a third faster here than one 3-D convolution, and the rows need not be contiguous.
        """
        oldest, older, present_hwC = rows
        present = _as_image(present_hwC)
        pairs = (older, self._row_taps[1]), (oldest, self._row_taps[0])
        earlier = [(_as_image(row), taps) for row, taps in pairs if row is not None]
        if self._accumulates_in_place:
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
        """`(N, C)` -> gated hidden layer `(N, hidden)`, before the narrowing product."""
        normed = F.layer_norm(y_NC, (self.channels,), eps=self.eps).to(self.value.dtype)
        return self.value.multiplied(normed, self.gate.gelu(normed))

    def hidden_blocks(self, padded_BthwC: torch.Tensor) -> Iterator[HiddenBlock]:
        """Runs a whole grid up to the narrowing product, in blocks: indices of tokens, the tokens, their hidden layer."""
        y_NC = self.convolved(padded_BthwC).view(-1, self.channels)
        yield slice(0, y_NC.shape[0]), y_NC, self.hidden(y_NC)

    def row_hidden_blocks(self, rows: Rows) -> Iterator[HiddenBlock]:
        """`hidden_blocks` for one row."""
        y_NC = self.convolved_row(rows).view(-1, self.channels)
        for block in blocks(y_NC.shape[0]):
            yield block, y_NC[block], self.hidden(y_NC[block])

    def row(self, rows: Rows) -> torch.Tensor:
        """Runs the layer on one row; `(h, w, C)` in fresh memory."""
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
        """Reads `rows + 2` rows, writes `rows` rows into `out_BthwC`, which may be a channel slice of a wider tensor."""
        if by_rows(self.device):
            for padded_thwC, out_thwC in zip(padded_BthwC, out_BthwC, strict=True):
                for row, out_hwC in enumerate(out_thwC):
                    oldest, older, present = padded_thwC[row : row + HISTORY_ROWS + 1].unbind()
                    out_hwC.copy_(self.row((oldest, older, present)))
            return
        y = self.convolved(padded_BthwC)
        branch = self.narrow(self.hidden(y.view(-1, self.channels))).view(y.shape)
        if self.residual:
            torch.add(y, branch, out=out_BthwC)
        else:
            out_BthwC.copy_(branch)


def _as_image(row_hwC: torch.Tensor) -> torch.Tensor:
    """View of the row as channels-last `(1, C, h, w)`."""
    return row_hwC.permute(2, 0, 1).unsqueeze(0)


class RowHistory:
    """Last two input rows of every layer, for one video processed row by row; None before the start."""

    def __init__(self, past: Sequence[torch.Tensor] | None, slots: int, video: int) -> None:
        self._rows: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * slots
        if past is not None:
            self._rows = [(tensor[video, 0], tensor[video, 1]) for tensor in past]

    def window(self, slot: int, row_hwC: torch.Tensor) -> Rows:
        """The rows that a layer sees at `row_hwC`, which is kept as history; do not modify it in place."""
        oldest, older = self._rows[slot]
        self._rows[slot] = (older, row_hwC)
        return oldest, older, row_hwC

    def last(self, slot: int) -> torch.Tensor:
        """Last two rows, `(2, h, w, C)` in fresh memory."""
        oldest, older = self._rows[slot]
        if older is None:
            raise RuntimeError(f"layer {slot} has processed no row; run every layer before reading the state")
        return torch.stack([torch.zeros_like(older) if oldest is None else oldest, older])


def run_row(layers: Sequence[NAFLayer], row_hwC: torch.Tensor, history: RowHistory) -> torch.Tensor:
    """Runs layers in order on one row."""
    for layer in layers:
        row_hwC = layer.row(history.window(layer.slot, row_hwC))
    return row_hwC


class LayerHistory:
    """Two past rows of every layer: reads them from the previous state, collects those of the next state."""

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
    layers: Sequence[NAFLayer], padded_BthwC: torch.Tensor, history: LayerHistory, out_BthwC: torch.Tensor
) -> None:
    """Runs layers in order on a whole grid; the last one writes into `out_BthwC`."""
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
