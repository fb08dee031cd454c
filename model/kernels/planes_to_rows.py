"""Kernel: uint8 YUV planes -> RGB pixel blocks, one row per token; colour matrix, gamut clamp and rearrangement in one pass over memory.

Takes planes `B T 3 H W` and the affine colour map of each video (`model.colour.rgb_map`). Returns rows `(B*t*h*w,
3*depth*side*side)` in the network's value range, block in C order (rgb, frame, row, column).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TOKENS = 4  # neighbouring tokens per program


def reference(
    planes_BT3HW: torch.Tensor,
    map_B34: torch.Tensor,
    value_range: tuple[float, float],
    depth: int,
    side: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same computation in plain PyTorch. `map_B34` is float32."""
    B, T, _, H, W = planes_BT3HW.shape
    rgb = torch.einsum("brc,btchw->brthw", map_B34[:, :, :3], planes_BT3HW.float()) + map_B34[:, :, 3, None, None, None]
    cells = rgb.clamp_(*value_range).reshape(B, 3, T // depth, depth, H // side, side, W // side, side)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, 3 * depth * side * side).to(dtype)


def fused(
    planes_BT3HW: torch.Tensor,
    map_B34: torch.Tensor,
    value_range: tuple[float, float],
    depth: int,
    side: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`reference` in one kernel; reads every byte once."""
    B, T, _, H, W = planes_BT3HW.shape
    t, h, w, block = T // depth, H // side, W // side, depth * side * side
    rows = torch.empty((B * t * h * w, 3 * block), dtype=dtype, device=planes_BT3HW.device)
    video, frame, plane, line, step = planes_BT3HW.stride()
    if step != 1:
        raise ValueError(f"expected planes whose pixels of a line are contiguous, got strides {planes_BT3HW.stride()}")
    _planes_to_rows[(B * t * h, triton.cdiv(w, TOKENS))](
        *(planes_BT3HW, map_B34.contiguous(), rows, *value_range, t, h, w, video, frame, plane, line),
        SIDE=side,
        PIXELS=block,
        TOKENS=TOKENS,
        BLOCK=triton.next_power_of_2(block),
        num_warps=4,
    )
    return rows


@triton.jit
def _planes_to_rows(  # type: ignore[no-untyped-def]
    planes_ptr,
    map_ptr,
    rows_ptr,
    low,
    high,
    t,
    h,
    w,
    stride_video,
    stride_frame,
    stride_plane,
    stride_line,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line = tl.program_id(0)  # one line of tokens of one group of frames of one video
    i, group, video = line % h, line // h % t, line // h // t
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    pixel = tl.arange(0, BLOCK)
    frame, up, across = pixel // (SIDE * SIDE), pixel // SIDE % SIDE, pixel % SIDE
    inside = (token < w)[:, None] & (pixel < PIXELS)[None, :]

    start = (
        planes_ptr + video.to(tl.int64) * stride_video + group.to(tl.int64) * (PIXELS // SIDE // SIDE) * stride_frame
    )
    offset = frame * stride_frame + (i * SIDE + up) * stride_line + across
    source = start + offset[None, :] + token[:, None] * SIDE
    y = tl.load(source, mask=inside, other=0).to(tl.float32)
    u = tl.load(source + stride_plane, mask=inside, other=0).to(tl.float32)
    v = tl.load(source + 2 * stride_plane, mask=inside, other=0).to(tl.float32)

    target = rows_ptr + (line.to(tl.int64) * w + token)[:, None] * (3 * PIXELS) + pixel[None, :]
    for colour in tl.static_range(3):
        gains = map_ptr + video * 12 + colour * 4
        value = y * tl.load(gains) + u * tl.load(gains + 1) + v * tl.load(gains + 2) + tl.load(gains + 3)
        value = tl.minimum(tl.maximum(value, low), high)
        tl.store(target + colour * PIXELS, value.to(rows_ptr.dtype.element_ty), mask=inside)
