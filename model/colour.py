"""Conversion of limited-range uint8 YUV 4:4:4 planes `B T 3 H W`, as decoders give them, to float RGB video `B C T H W`, and back.

Frames reach the network as YUV because scaling in YUV is several times cheaper than through RGB; only the 3x3 matrix runs here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

# (Kr, Kb) of each standard; bt2020nc is the non-constant-luminance form
LUMA: dict[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020nc": (0.2627, 0.0593),
}


def _chroma_gains(matrix: str) -> tuple[float, float, float, float]:
    """Factors (V to red, U to green, V to green, U to blue) for components scaled to [0, 1] and [-0.5, 0.5].

    Raises:
        ValueError: unknown matrix.
    """
    if matrix not in LUMA:
        raise ValueError(f"colour matrix must be one of {', '.join(LUMA)}; got {matrix!r}")
    kr, kb = LUMA[matrix]
    kg = 1 - kr - kb
    return 2 * (1 - kr), -2 * (1 - kb) * kb / kg, -2 * (1 - kr) * kr / kg, 2 * (1 - kb)


def check_matrices(matrices: Sequence[str], batch: int) -> None:
    """Raises ValueError unless `matrices` names one known colour matrix per video of the batch."""
    if isinstance(matrices, str) or len(matrices) != batch:
        raise ValueError(f"expected one colour matrix per video ({batch}), got {matrices!r}")
    for matrix in matrices:
        _chroma_gains(matrix)


def rgb_map(matrices: Sequence[str], value_range: tuple[float, float]) -> torch.Tensor:
    """Colour conversion of each video as an affine map, before clamping: `(B, 3, 4)` float64.

    Rows: red, green, blue. Columns: factors of the code values Y, U, V, and the constant.
    """
    low, high = value_range
    luma, chroma = (high - low) / 219, (high - low) / 224
    maps = []
    for matrix in matrices:
        v_red, u_green, v_green, u_blue = _chroma_gains(matrix)
        gains = torch.tensor(
            [[luma, 0, v_red * chroma], [luma, u_green * chroma, v_green * chroma], [luma, u_blue * chroma, 0]],
            dtype=torch.float64,
        )
        constant = low - gains @ torch.tensor([16.0, 128.0, 128.0], dtype=torch.float64)
        maps.append(torch.cat([gains, constant[:, None]], dim=1))
    return torch.stack(maps)


def yuv_to_video(
    planes_BT3HW: torch.Tensor,
    matrices: Sequence[str],
    value_range: tuple[float, float] = (-0.5, 0.5),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Limited-range uint8 planes -> RGB `(B, 3, T, H, W)`, clamped to `value_range` = (black, white).

    `matrices` names the colour matrix of each video: bt601, bt709 or bt2020nc.

    Raises:
        ValueError: wrong shape or dtype, unknown matrix, or not one matrix per video.
    """
    if planes_BT3HW.ndim != 5 or planes_BT3HW.shape[2] != 3 or planes_BT3HW.dtype != torch.uint8:
        raise ValueError(f"expected uint8 planes (B, T, 3, H, W), got {planes_BT3HW.dtype} {tuple(planes_BT3HW.shape)}")
    B, T, _, H, W = planes_BT3HW.shape
    check_matrices(matrices, B)
    low, high = value_range
    luma, chroma = (high - low) / 219, (high - low) / 224
    video = torch.empty((B, 3, T, H, W), dtype=dtype, device=planes_BT3HW.device)
    for b, matrix in enumerate(matrices):
        v_red, u_green, v_green, u_blue = _chroma_gains(matrix)
        for t in range(T):  # frame by frame: one frame's planes stay in cache
            y, u, v = planes_BT3HW[b, t].to(dtype).unbind(0)
            y.mul_(luma).add_(low - 16 * luma)
            u.sub_(128).mul_(chroma)
            v.sub_(128).mul_(chroma)
            torch.add(y, v, alpha=v_red, out=video[b, 0, t])
            torch.add(y, u, alpha=u_green, out=video[b, 1, t]).add_(v, alpha=v_green)
            torch.add(y, u, alpha=u_blue, out=video[b, 2, t])
    return video.clamp_(low, high)


def rgb_to_yuv(
    video_BCTHW: torch.Tensor, matrices: Sequence[str], value_range: tuple[float, float] = (-0.5, 0.5)
) -> torch.Tensor:
    """Inverse of `yuv_to_video`: RGB in `value_range` -> limited-range uint8 planes `(B, T, 3, H, W)`, rounded to nearest."""
    low, high = value_range
    planes = []
    for rgb_CTHW, matrix in zip(video_BCTHW.double(), matrices, strict=True):
        _chroma_gains(matrix)  # raises for an unknown name
        kr, kb = LUMA[matrix]
        red, green, blue = ((rgb_CTHW - low) / (high - low)).unbind(0)
        y = kr * red + (1 - kr - kb) * green + kb * blue
        u, v = (blue - y) / (2 * (1 - kb)), (red - y) / (2 * (1 - kr))
        planes.append(torch.stack([16 + 219 * y, 128 + 224 * u, 128 + 224 * v], dim=1))
    return torch.stack(planes).round().clamp(0, 255).to(torch.uint8)
