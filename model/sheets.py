"""PNG sheets that show originals above their reconstructions.

Takes pairs of uint8 clips `3 T H W` with a line of text each. A pair becomes a block that shows some of its frames side by side; blocks
fill rows from left to right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Pair = tuple[torch.Tensor, torch.Tensor]

GAP = 8  # pixels between blocks and around them
FRAME_GAP = 2  # pixels between the frames of a block
LINE = 16  # height of a line of text
BACKGROUND, TEXT_COLOUR = (255, 255, 255), (32, 32, 32)


def write_sheet(
    path: str | Path,
    columns: Sequence[Pair],
    titles: Sequence[str] | None = None,
    frames: int = 3,
    *,
    largest: int = 384,
    width: int = 2400,
) -> None:
    """Draws `sheet` and writes it to `path` as PNG; the folder must exist."""
    sheet(columns, titles, frames, largest=largest, width=width).save(path, format="PNG")


def sheet(
    columns: Sequence[Pair],
    titles: Sequence[str] | None = None,
    frames: int = 3,
    *,
    largest: int = 384,
    width: int = 2400,
) -> Image.Image:
    """One picture of all pairs (original, reconstruction).

    Args:
        columns: uint8 RGB clips `3 T H W`, both of a pair of the same shape; pairs may differ.
        titles: a line above each pair, cut to the width of its block. None: no lines.
        frames: number of frames shown of a clip, spread from first to last; all of a clip that has fewer.
        largest: frames with a longer side are reduced to this many pixels; smaller ones are not resized.
        width: row width in pixels after which the next row starts; a single block may be wider.

    Raises:
        ValueError: no pairs, not one title per pair, clips of another shape or dtype, a count below one.
    """
    if not columns:
        raise ValueError("a sheet needs at least one pair of clips, got none")
    if titles is not None and len(titles) != len(columns):
        raise ValueError(f"expected {len(columns)} titles, one per pair; got {len(titles)}")
    if frames < 1 or largest < 1:
        raise ValueError(f"frames and largest must be at least 1, got {frames} and {largest}")
    blocks = [
        _block(pair, "" if titles is None else titles[i], titles is not None, frames, largest)
        for i, pair in enumerate(columns)
    ]
    rows: list[list[Image.Image]] = [[]]
    for block in blocks:
        if rows[-1] and sum(one.width + GAP for one in [*rows[-1], block]) + GAP > width:
            rows.append([])
        rows[-1].append(block)
    heights = [max(block.height for block in row) for row in rows]
    whole = Image.new(
        "RGB",
        (max(sum(b.width + GAP for b in row) for row in rows) + GAP, sum(heights) + GAP * (len(rows) + 1)),
        BACKGROUND,
    )
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for block in row:
            whole.paste(block, (left, top))
            left += block.width + GAP
        top += height + GAP
    return whole


def shown_frames(total: int, frames: int) -> list[int]:
    """Indices of the frames a block shows: at most `frames` of `total`, evenly from first to last."""
    if total == 1 or frames == 1:
        return [0]
    count = min(total, frames)
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _block(pair: Pair, title: str, titled: bool, frames: int, largest: int) -> Image.Image:
    """Frames of the original above those of the reconstruction, under a line of text."""
    original, other = pair
    for clip in pair:
        if clip.ndim != 4 or clip.shape[0] != 3 or clip.dtype != torch.uint8 or 0 in clip.shape:
            raise ValueError(f"expected uint8 clips (3, T, H, W), got {clip.dtype} {tuple(clip.shape)}")
    if original.shape != other.shape:
        raise ValueError(f"original and reconstruction differ in shape: {tuple(original.shape)}, {tuple(other.shape)}")
    _, total, height, width = original.shape
    scale = min(1.0, largest / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = shown_frames(total, frames)
    head = LINE if titled else 0
    block = Image.new(
        "RGB", (len(shown) * (size[0] + FRAME_GAP) - FRAME_GAP, head + 2 * size[1] + FRAME_GAP), BACKGROUND
    )
    if titled:
        font = ImageFont.load_default()
        ImageDraw.Draw(block).text((0, 1), _fitting(title, font, block.width), fill=TEXT_COLOUR, font=font)
    for row, clip in enumerate(pair):
        for column, t in enumerate(shown):
            picture = Image.fromarray(clip[:, t].permute(1, 2, 0).contiguous().cpu().numpy())
            if picture.size != size:
                picture = picture.resize(size, Image.Resampling.LANCZOS)
            block.paste(picture, (column * (size[0] + FRAME_GAP), head + row * (size[1] + FRAME_GAP)))
    return block


def _fitting(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or its beginning and an ellipsis, within `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
