"""Resampling of canvases into frames, float32 `(N, 3, H, W)`, by affine maps and bilinear interpolation.

Canvases have more pixels than the frame (`DENSITY`), so that a shift by half a pixel does not blur.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

DENSITY = 1.5
"""Canvas pixels per frame pixel without magnification."""


def still(maps_N33: np.ndarray) -> bool:
    """Whether all maps are equal."""
    return bool((maps_N33 == maps_N33[:1]).all())


def sample(
    canvas_CHW: torch.Tensor,
    maps_N33: np.ndarray,
    window: Sequence[int],
    frame: Sequence[int],
    *,
    beyond: str = "zeros",
    flow_N2HW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Window (top, bottom, left, right) of a frame of `frame` (height, width) pixels at N moments: `(N, C, h, w)`.

    `maps_N33` map canvas points (canvas pixels from its centre) to frame points. `beyond` is what lies outside the canvas: zeros or
    reflection. `flow_N2HW` displaces the sampled points by (x, y) frame pixels.
    """
    top, bottom, left, right = window
    size = np.array(canvas_CHW.shape[:0:-1], np.float64)  # grid_sample uses coordinates from -1 to 1 over the canvas
    back = torch.from_numpy((np.linalg.inv(maps_N33)[:, :2] * (2 / size)[:, None]).astype(np.float32))
    y = torch.arange(top, bottom, dtype=torch.float32).add_(0.5 - frame[0] / 2)[:, None]
    x = torch.arange(left, right, dtype=torch.float32).add_(0.5 - frame[1] / 2)[None, :]
    if flow_N2HW is not None:
        x = x + flow_N2HW[:, 0, top:bottom, left:right]
        y = y + flow_N2HW[:, 1, top:bottom, left:right]
    grid = torch.empty(len(back), bottom - top, right - left, 2)
    for axis in range(2):
        of_x, of_y, shift = back[:, axis, :, None, None].unbind(1)
        torch.add(x * of_x, y * of_y + shift, out=grid[..., axis])
    count = grid.shape[0]
    return F.grid_sample(
        canvas_CHW.expand(count, -1, -1, -1), grid, mode="bilinear", padding_mode=beyond, align_corners=False
    )


def bounds(maps_N33: np.ndarray, canvas: Sequence[int], frame: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Part of the frame (top, bottom, left, right) that a canvas touches at any moment; None if it stays outside."""
    half_y, half_x = canvas[0] / 2, canvas[1] / 2
    corners = np.array([[-half_x, -half_y, 1], [half_x, -half_y, 1], [-half_x, half_y, 1], [half_x, half_y, 1]]).T
    positions = maps_N33[:, :2] @ corners
    (left, top), (right, bottom) = positions.min((0, 2)), positions.max((0, 2))
    top, bottom = max(math.floor(top + frame[0] / 2), 0), min(math.ceil(bottom + frame[0] / 2), frame[0])
    left, right = max(math.floor(left + frame[1] / 2), 0), min(math.ceil(right + frame[1] / 2), frame[1])
    return (top, bottom, left, right) if top < bottom and left < right else None


def lay_over(
    frames_N3HW: torch.Tensor, canvas_4HW: torch.Tensor, maps_N33: np.ndarray, flow_N2HW: torch.Tensor | None = None
) -> None:
    """Composites a canvas (RGB times opacity, opacity) onto the frames, in place, at each moment."""
    frame = frames_N3HW.shape[-2:]
    window = bounds(maps_N33, canvas_4HW.shape[-2:], frame)
    if window is None:
        return
    top, bottom, left, right = window
    once = flow_N2HW is None and still(maps_N33)
    shown = sample(canvas_4HW, maps_N33[:1] if once else maps_N33, window, frame, flow_N2HW=flow_N2HW)
    part = frames_N3HW[:, :, top:bottom, left:right]
    part.mul_(1 - shown[:, 3:]).add_(shown[:, :3])


def ripple(field_N2hw: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Enlarges a coarse field of displacements to the frame: `(N, 2, h, w)` -> `(N, 2, H, W)`."""
    return F.interpolate(field_N2hw, size=tuple(size), mode="bicubic", align_corners=False)
