"""Winograd convolutions F(2x2, 3x3): 16 products per 2x2 pixels instead of 36, over space and optionally time, float32 on a CPU.

Takes a weight `O I t 3 3` (float64 gives the most exact results) and channel-last frames; returns channel-last frames of the same size,
equal to a convolution with stride 1 and zero padding 1 in space up to rounding. The error is two or three times that of a direct sum.

Frames are processed in strips of rows, so that intermediate values stay in cache.
"""

from __future__ import annotations

import torch

STRIP_VALUES = 1 << 17  # tiles x depth of a strip's products: 16 such matrices are 8 MB
LEAST_TILES = 512  # least tiles of a strip: fewer would read the weights and wake the threads too often

# Maps a kernel of three taps to the interpolation points 0, 1, -1 and infinity; exact in binary.
_POINTS = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_CENTRE = 5  # index of the point (1, 1): a bias added there reaches each of the four pixels once


class Winograd:
    """Prepared 3x3 convolution that also sums over `taps` frames; needs oneDNN's packed products (`model.convolution.can_pack`).

    `paired` (three taps only) transforms time too: two frames cost four products instead of six. It pays off if most calls bring an even
    number of frames, and takes a third more memory.
    """

    def __init__(self, weight_OIthw: torch.Tensor, bias_O: torch.Tensor | None, *, paired: bool = False) -> None:
        self.out_channels, self.in_channels, self.taps = weight_OIthw.shape[:3]
        self.paired = paired
        taps = weight_OIthw.detach().double().cpu().permute(3, 4, 2, 0, 1).reshape(9, -1)
        transformed = (torch.kron(_POINTS, _POINTS) @ taps).view(16, self.taps, self.out_channels, self.in_channels)
        if paired:
            transformed = (_POINTS @ transformed.transpose(0, 1).flatten(1)).view(
                4, 16, self.out_channels, self.in_channels
            )
        else:  # taps concatenated along the depth
            transformed = transformed.transpose(1, 2).reshape(1, 16, self.out_channels, self.taps * self.in_channels)
        self.depth = transformed.shape[-1]
        self.tiles = max(LEAST_TILES, STRIP_VALUES // self.depth)
        self.weights = [
            [torch.ops.mkldnn._reorder_linear_weight(matrix.float(), None) for matrix in points]
            for points in transformed
        ]
        self.bias = None if bias_O is None else bias_O.detach().float().cpu().contiguous()

    def __call__(self, frames: list[torch.Tensor], *, bordered: bool = False) -> torch.Tensor:
        """`T + taps - 1` frames `(H, W, C)` float32 -> `(T, H, W, O)` in fresh memory.

        With `bordered` the frames include the rows above and below, `(H + 2, W, C)`; zeros are added left and right only.
        """
        H, W, C = frames[0].shape
        H -= 2 * bordered
        down, across = -(-H // 2), -(-W // 2)
        out = frames[0].new_empty((len(frames) - self.taps + 1, down, 2, across, 2, self.out_channels))
        step = min(down, max(1, self.tiles // across))
        strip = frames[0].new_zeros((len(frames), 2 * step + 2, 2 * across + 2, C))
        run = self._by_pairs if self.paired else self._by_frames
        for start in range(0, down, step):
            stop = min(start + step, down)
            _fill(strip, frames, 2 * start - 1 + bordered, 2 * stop + 1 + bordered)
            run(strip[:, : 2 * (stop - start) + 2], out[:, start:stop])
        whole = out.view(out.shape[0], 2 * down, 2 * across, self.out_channels)
        return whole if whole.shape[1:3] == (H, W) else whole[:, :H, :W].contiguous()

    def _by_frames(self, strip_FHWC: torch.Tensor, out_TrkcsO: torch.Tensor) -> None:
        """Computes one strip frame by frame."""
        transformed = _transform_windows(strip_FHWC, side_by_side=True)
        for t, out in enumerate(out_TrkcsO):
            self._pixels(
                transformed[:, :, t * self.in_channels : t * self.in_channels + self.depth], 0, out, bias=self.bias
            )

    def _by_pairs(self, strip_FHWC: torch.Tensor, out_TrkcsO: torch.Tensor) -> None:
        """Computes one strip two output frames at a time, from four input frames; a last odd frame is computed alone."""
        mixed = strip_FHWC.new_empty((4, *strip_FHWC.shape[1:]))
        parts = strip_FHWC.new_empty((2, *out_TrkcsO.shape[1:]))
        for t in range(0, len(out_TrkcsO), 2):
            even, odd = out_TrkcsO[t], out_TrkcsO[t + 1] if t + 1 < len(out_TrkcsO) else None
            _to_points(*(strip_FHWC[min(t + k, len(strip_FHWC) - 1)] for k in range(4)), out=mixed)
            transformed = _transform_windows(mixed, side_by_side=False)
            self._pixels(transformed[:, 0], 0, even)
            self._pixels(transformed[:, 1], 1, parts[0], bias=self.bias)
            self._pixels(transformed[:, 2], 2, parts[1])
            even.add_(parts[0]).add_(parts[1])
            if odd is not None:
                self._pixels(transformed[:, 3], 3, odd)
                torch.sub(parts[0].sub_(parts[1]), odd, out=odd)

    def _pixels(
        self, transformed: torch.Tensor, moment: int, out_rkcsO: torch.Tensor, *, bias: torch.Tensor | None = None
    ) -> None:
        """Multiplies windows `(16, tiles, depth)` by the weights and transforms the products back to pixels `(rows, 2, columns, 2, O)`."""
        shape = (out_rkcsO.shape[0], out_rkcsO.shape[2], self.out_channels)
        products = [
            torch.ops.mkldnn._linear_pointwise(
                windows, weight, bias if point == _CENTRE else None, "none", [], ""
            ).view(shape)
            for point, (windows, weight) in enumerate(zip(transformed, self.weights[moment], strict=True))
        ]
        for row in (0, 1):
            a, b, c, d = (_from_points(products[column::4], row) for column in range(4))
            torch.add(a.add_(b), c, out=out_rkcsO[:, row, :, 0])
            torch.sub(b.sub_(c), d, out=out_rkcsO[:, row, :, 1])


def _fill(strip: torch.Tensor, frames: list[torch.Tensor], first: int, stop: int) -> None:
    """Copies rows `first` to `stop` of all frames into `strip`, zeros beyond their edges; its outer columns stay zero."""
    H, W, _ = frames[0].shape
    low, high = max(first, 0), min(stop, H)
    strip[:, : low - first].zero_()
    strip[:, high - first : stop - first].zero_()
    for target, frame in zip(strip, frames, strict=True):
        target[low - first : high - first, 1 : W + 1].copy_(frame[low:high])


def _transform_windows(strip_FHWC: torch.Tensor, *, side_by_side: bool) -> torch.Tensor:
    """Padded rows -> every 4x4 window at the 16 points: `(16, tiles, frames * C)` if `side_by_side`, else `(16, frames, tiles, C)`."""
    F, height, W, C = strip_FHWC.shape
    down, across = (height - 2) // 2, (W - 2) // 2
    half = strip_FHWC.new_empty((4, F, down, W, C))
    _to_points(*(strip_FHWC[:, i : i + 2 * down - 1 : 2] for i in range(4)), out=half)
    layout = (down, across, F, C) if side_by_side else (F, down, across, C)
    transformed = strip_FHWC.new_empty((4, 4, *layout))  # row point, column point
    windows = transformed.permute(1, 0, 4, 2, 3, 5) if side_by_side else transformed.transpose(0, 1)
    _to_points(*(half[:, :, :, j : j + 2 * across - 1 : 2] for j in range(4)), out=windows)
    return transformed.view(16, down * across, F * C) if side_by_side else transformed.view(16, F, down * across, C)


def _to_points(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, *, out: torch.Tensor) -> None:
    """Transforms four samples along one axis to the four points."""
    torch.sub(a, c, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(b, d, out=out[3])


def _from_points(points: list[torch.Tensor], row: int) -> torch.Tensor:
    """Transforms four products at the points back to the first (row 0) or second result."""
    a, b, c, d = points
    return torch.add(b, c).add_(a) if row == 0 else torch.sub(b, c).sub_(d)
