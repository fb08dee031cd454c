"""3x3 convolutions with 16 products per 2x2 pixels instead of 36 (Winograd's F(2x2, 3x3)), of frames and over frames, in float32 on a CPU.

Enters: a kernel `O I t 3 3` (float64 welcome) and, per call, channel-last frames. Leaves: channel-last frames of the same size, as a
convolution with stride 1 and zero padding 1 in space gives them, to rounding: the error is two or three times that of a direct sum.

Frames are worked on in strips of rows, so that what is between the transforms stays in cache.
"""

from __future__ import annotations

import torch

STRIP_VALUES = 1 << 17  # tiles times depth of a product: 16 such matrices are 8 MB
LEAST_TILES = 512  # of a strip: fewer would read the weights too often, and wake the threads too often

# Kernel, seen at the points 0, 1, -1 and infinity; exact in binary.
_POINTS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_CENTRE = 5  # the point (1, 1): what is added there reaches all four pixels once


class Winograd:
    """A prepared 3x3 convolution that also sums over `taps` frames; needs the packed products of oneDNN (`model.convolution.packs`).

    `paired` (three taps only) transforms time as well: two frames of a call cost four products instead of six. It pays where calls mostly
    bring an even number of frames, and takes a third more memory.
    """

    def __init__(self, weight_OIthw: torch.Tensor, bias_O: torch.Tensor | None, *, paired: bool = False) -> None:
        self.outside, self.inside, self.taps = weight_OIthw.shape[:3]
        self.paired = paired
        taps = weight_OIthw.detach().double().cpu().permute(3, 4, 2, 0, 1).reshape(9, -1)
        seen = (torch.kron(_POINTS, _POINTS) @ taps).view(16, self.taps, self.outside, self.inside)
        if paired:
            seen = (_POINTS @ seen.transpose(0, 1).flatten(1)).view(4, 16, self.outside, self.inside)
        else:  # taps side by side
            seen = seen.transpose(1, 2).reshape(1, 16, self.outside, self.taps * self.inside)
        self.depth = seen.shape[-1]
        self.tiles = max(LEAST_TILES, STRIP_VALUES // self.depth)
        self.weights = [
            [torch.ops.mkldnn._reorder_linear_weight(matrix.float(), None) for matrix in points] for points in seen
        ]
        self.bias = None if bias_O is None else bias_O.detach().float().cpu().contiguous()

    def __call__(self, frames: list[torch.Tensor], *, bordered: bool = False) -> torch.Tensor:
        """`T + taps - 1` frames `(H, W, C)` float32 -> `(T, H, W, O)` in fresh memory.

        With `bordered` the frames bring the rows above and below themselves, `(H + 2, W, C)`; zeros are added at the sides alone.
        """
        H, W, C = frames[0].shape
        H -= 2 * bordered
        down, across = -(-H // 2), -(-W // 2)
        out = frames[0].new_empty((len(frames) - self.taps + 1, down, 2, across, 2, self.outside))
        step = min(down, max(1, self.tiles // across))
        room = frames[0].new_zeros((len(frames), 2 * step + 2, 2 * across + 2, C))
        run = self._by_pairs if self.paired else self._by_frames
        for start in range(0, down, step):
            stop = min(start + step, down)
            _fill(room, frames, 2 * start - 1 + bordered, 2 * stop + 1 + bordered)
            run(room[:, : 2 * (stop - start) + 2], out[:, start:stop])
        whole = out.view(out.shape[0], 2 * down, 2 * across, self.outside)
        return whole if whole.shape[1:3] == (H, W) else whole[:, :H, :W].contiguous()

    def _by_frames(self, room_FHWC: torch.Tensor, out_TrkcsO: torch.Tensor) -> None:
        """One strip, every frame by itself."""
        seen = _seen(room_FHWC, side_by_side=True)
        for t, out in enumerate(out_TrkcsO):
            self._pixels(seen[:, :, t * self.inside : t * self.inside + self.depth], 0, out, bias=self.bias)

    def _by_pairs(self, room_FHWC: torch.Tensor, out_TrkcsO: torch.Tensor) -> None:
        """One strip, two frames of four at a time; of a last odd frame only its own half is made."""
        mixed = room_FHWC.new_empty((4, *room_FHWC.shape[1:]))
        parts = room_FHWC.new_empty((2, *out_TrkcsO.shape[1:]))
        for t in range(0, len(out_TrkcsO), 2):
            even, odd = out_TrkcsO[t], out_TrkcsO[t + 1] if t + 1 < len(out_TrkcsO) else None
            _four(*(room_FHWC[min(t + k, len(room_FHWC) - 1)] for k in range(4)), out=mixed)
            seen = _seen(mixed, side_by_side=False)
            self._pixels(seen[:, 0], 0, even)
            self._pixels(seen[:, 1], 1, parts[0], bias=self.bias)
            self._pixels(seen[:, 2], 2, parts[1])
            even.add_(parts[0]).add_(parts[1])
            if odd is not None:
                self._pixels(seen[:, 3], 3, odd)
                torch.sub(parts[0].sub_(parts[1]), odd, out=odd)

    def _pixels(
        self, seen: torch.Tensor, moment: int, out_rkcsO: torch.Tensor, *, bias: torch.Tensor | None = None
    ) -> None:
        """Windows `(16, tiles, depth)` -> their products, brought back to pixels `(rows, 2, columns, 2, O)`."""
        shape = (out_rkcsO.shape[0], out_rkcsO.shape[2], self.outside)
        products = [
            torch.ops.mkldnn._linear_pointwise(
                windows, weight, bias if point == _CENTRE else None, "none", [], ""
            ).view(shape)
            for point, (windows, weight) in enumerate(zip(seen, self.weights[moment], strict=True))
        ]
        for row in (0, 1):
            a, b, c, d = (_back(products[column::4], row) for column in range(4))
            torch.add(a.add_(b), c, out=out_rkcsO[:, row, :, 0])
            torch.sub(b.sub_(c), d, out=out_rkcsO[:, row, :, 1])


def _fill(room: torch.Tensor, frames: list[torch.Tensor], first: int, stop: int) -> None:
    """Rows `first` to `stop` of all frames, zeros beyond their edges; the columns at both sides stay zero."""
    H, W, _ = frames[0].shape
    low, high = max(first, 0), min(stop, H)
    room[:, : low - first].zero_()
    room[:, high - first : stop - first].zero_()
    for place, frame in zip(room, frames, strict=True):
        place[low - first : high - first, 1 : W + 1].copy_(frame[low:high])


def _seen(room_FHWC: torch.Tensor, *, side_by_side: bool) -> torch.Tensor:
    """Padded rows -> every 4x4 window at the points: `(16, tiles, frames * C)` side by side, else `(16, frames, tiles, C)`."""
    F, height, W, C = room_FHWC.shape
    down, across = (height - 2) // 2, (W - 2) // 2
    half = room_FHWC.new_empty((4, F, down, W, C))
    _four(*(room_FHWC[:, i : i + 2 * down - 1 : 2] for i in range(4)), out=half)
    inner = (down, across, F, C) if side_by_side else (F, down, across, C)
    seen = room_FHWC.new_empty((4, 4, *inner))  # row point, column point
    windows = seen.permute(1, 0, 4, 2, 3, 5) if side_by_side else seen.transpose(0, 1)
    _four(*(half[:, :, :, j : j + 2 * across - 1 : 2] for j in range(4)), out=windows)
    return seen.view(16, down * across, F * C) if side_by_side else seen.view(16, F, down * across, C)


def _four(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, *, out: torch.Tensor) -> None:
    """Four samples -> the values that meet the kernel's at the points."""
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _back(points: list[torch.Tensor], row: int) -> torch.Tensor:
    """Four products at the points -> the first or the second result."""
    a, b, c, d = points
    return torch.add(b, c).add_(a) if row == 0 else torch.sub(b, c).sub_(d)
