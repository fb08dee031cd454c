"""3x3 convolutions with 16 products per 2x2 pixels instead of 36 (Winograd's F(2x2, 3x3)), of frames and over frames, in float32 on a CPU.

Enters: a kernel `O I t 3 3` (float64 welcome) and, per call, channel-last frames. Leaves: channel-last frames of the same size, as a
convolution with stride 1 and zero padding 1 in space gives them, to rounding: the error is about twice that of a direct sum.

Frames are worked on in strips of rows, so that what is between the transforms stays in cache. Time is summed inside the products.
"""

from __future__ import annotations

import torch

STRIP_VALUES = 1 << 17  # tiles times depth of a product: 16 such matrices are 8 MB
LEAST_TILES = 512  # of a strip: fewer would read the weights too often, and wake the threads too often

# Kernel, seen at the points 0, 1, -1 and infinity; exact in binary.
_POINTS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


class Winograd:
    """A prepared 3x3 convolution that also sums over `taps` frames; needs the packed products of oneDNN (`model.convolution.packs`)."""

    def __init__(self, weight_OIthw: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        self.outside, self.inside, self.taps = weight_OIthw.shape[:3]
        depth = self.taps * self.inside
        flat = weight_OIthw.detach().double().cpu().transpose(1, 2).reshape(self.outside * depth, 9)
        seen = torch.kron(_POINTS, _POINTS) @ flat.T
        self.rows_of_tiles = max(LEAST_TILES, STRIP_VALUES // depth)
        self.weights = [
            torch.ops.mkldnn._reorder_linear_weight(matrix.float(), None)
            for matrix in seen.view(16, self.outside, depth)
        ]
        # what is added at the point (1, 1) reaches all four pixels once
        self.bias = None if bias_O is None else bias_O.detach().float().cpu().contiguous()

    def __call__(self, frames: list[torch.Tensor], *, bordered: bool = False) -> torch.Tensor:
        """`T + taps - 1` frames `(H, W, C)` float32 -> `(T, H, W, O)` in fresh memory.

        With `bordered` the frames bring the rows above and below themselves, `(H + 2, W, C)`; zeros are added at the sides alone.
        """
        H, W, C = frames[0].shape
        H -= 2 * bordered
        down, across = -(-H // 2), -(-W // 2)
        out = frames[0].new_empty((len(frames) - self.taps + 1, down, 2, across, 2, self.outside))
        step = min(down, max(1, self.rows_of_tiles // across))
        room = frames[0].new_zeros((len(frames), 2 * step + 2, 2 * across + 2, C))
        for start in range(0, down, step):
            stop = min(start + step, down)
            self._fill(room, frames, 2 * start - 1 + bordered, 2 * stop + 1 + bordered)
            seen = _seen(room[:, : 2 * (stop - start) + 2], stop - start, across)
            for t in range(out.shape[0]):
                self._strip(seen, t, out[t, start:stop])
        whole = out.view(out.shape[0], 2 * down, 2 * across, self.outside)
        return whole if whole.shape[1:3] == (H, W) else whole[:, :H, :W].contiguous()

    def _fill(self, room: torch.Tensor, frames: list[torch.Tensor], first: int, stop: int) -> None:
        """Rows `first` to `stop` of all frames, zeros beyond their edges; the columns at both sides stay zero."""
        H, W, _ = frames[0].shape
        low, high = max(first, 0), min(stop, H)
        room[:, : low - first].zero_()
        room[:, high - first : stop - first].zero_()
        for place, frame in zip(room, frames, strict=True):
            place[low - first : high - first, 1 : W + 1].copy_(frame[low:high])

    def _strip(self, seen: torch.Tensor, t: int, out_rkcsO: torch.Tensor) -> None:
        """The products of one strip of one frame, brought back to pixels `(rows, 2, columns, 2, O)`."""
        depth, shape = self.taps * self.inside, (out_rkcsO.shape[0], out_rkcsO.shape[2], self.outside)
        products = [
            torch.ops.mkldnn._linear_pointwise(
                seen[point, :, t * self.inside : t * self.inside + depth],
                self.weights[point],
                self.bias if point == 5 else None,
                "none",
                [],
                "",
            ).view(shape)
            for point in range(16)
        ]
        for row in (0, 1):
            a, b, c, d = (_back(products[column::4], row) for column in range(4))
            _put(a, b, c, d, out_rkcsO[:, row])


def _back(points: list[torch.Tensor], row: int) -> torch.Tensor:
    a, b, c, d = points
    return torch.add(b, c).add_(a) if row == 0 else torch.sub(b, c).sub_(d)


def _put(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, out_rcsO: torch.Tensor) -> None:
    torch.add(a.add_(b), c, out=out_rcsO[:, :, 0])
    torch.sub(b.sub_(c), d, out=out_rcsO[:, :, 1])


def _seen(room_FHWC: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Padded rows -> every 4x4 window at the points, `(16, tiles, frames * C)`."""
    F, _, W, C = room_FHWC.shape
    half = room_FHWC.new_empty((4, F, down, W, C))
    _four(*(room_FHWC[:, i : i + 2 * down - 1 : 2] for i in range(4)), out=half)
    seen = room_FHWC.new_empty((4, 4, down, across, F, C))
    windows = seen.permute(1, 0, 4, 2, 3, 5)  # column point first, then as `half`
    _four(*(half[:, :, :, j : j + 2 * across - 1 : 2] for j in range(4)), out=windows)
    return seen.view(16, down * across, F * C)


def _four(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, *, out: torch.Tensor) -> None:
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])
