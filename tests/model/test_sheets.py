"""Picture sheets: every frame is in its place, pixel for pixel."""

import numpy as np
import pytest
import torch
from PIL import Image

from model.sheets import FRAME_GAP, GAP, LINE, sheet, shown_frames, write_sheet


def clip(seed, frames=5, height=16, width=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, frames, height, width), dtype=torch.uint8, generator=generator)


def piece(picture, left, top, clip_CHW):
    rows = picture[top : top + clip_CHW.shape[1], left : left + clip_CHW.shape[2]]
    return torch.from_numpy(rows.copy()).permute(2, 0, 1)


def test_originals_stand_above_their_reconstructions_pixel_for_pixel(tmp_path):
    pairs = [(clip(0), clip(1)), (clip(2), clip(3))]
    write_sheet(tmp_path / "sheet.png", pairs, titles=["first", "second"])
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    block = 3 * (24 + FRAME_GAP) - FRAME_GAP
    assert picture.shape == (GAP + LINE + 16 + FRAME_GAP + 16 + GAP, GAP + block + GAP + block + GAP, 3)
    for number, pair in enumerate(pairs):
        for column, frame in enumerate((0, 2, 4)):
            left = GAP + number * (block + GAP) + column * (24 + FRAME_GAP)
            for row, video in enumerate(pair):
                top = GAP + LINE + row * (16 + FRAME_GAP)
                assert torch.equal(piece(picture, left, top, video[:, frame]), video[:, frame])


def test_titles_are_drawn_and_never_run_into_the_next_block():
    pair = (clip(0), clip(1))
    plain, short, long = (np.asarray(sheet([pair], titles=[text])) for text in ("", "abc", "a title " * 40))
    assert plain.shape == short.shape == long.shape
    text = slice(GAP, GAP + LINE)
    assert (plain[text] == 255).all()
    assert (short[text] < 128).any()
    assert (long[text, -GAP:] == 255).all()
    assert sheet([pair]).height == plain.shape[0] - LINE


def test_blocks_wrap_to_the_next_row_and_large_frames_are_reduced():
    pairs = [(clip(i, 1), clip(i + 1, 1)) for i in range(3)]
    assert sheet(pairs, width=3 * (24 + GAP) + GAP).size == (3 * 24 + 4 * GAP, 32 + FRAME_GAP + 2 * GAP)
    assert sheet(pairs, width=3 * (24 + GAP) + GAP - 1).size == (2 * 24 + 3 * GAP, 2 * (32 + FRAME_GAP) + 3 * GAP)
    big = torch.full((3, 1, 40, 80), 7, dtype=torch.uint8)
    small = np.asarray(sheet([(big, big)], largest=40))
    assert small.shape == (20 + FRAME_GAP + 20 + 2 * GAP, 40 + 2 * GAP, 3)
    assert (small[GAP : GAP + 20, GAP : GAP + 40] == 7).all()


@pytest.mark.parametrize(
    ("total", "frames", "shown"),
    [(17, 3, [0, 8, 16]), (1, 3, [0]), (2, 3, [0, 1]), (17, 1, [0]), (5, 2, [0, 4]), (9, 5, [0, 2, 4, 6, 8])],
)
def test_frames_are_spread_from_the_first_to_the_last(total, frames, shown):
    assert shown_frames(total, frames) == shown


@pytest.mark.parametrize(
    ("columns", "titles", "message"),
    [
        ([], None, "at least one pair"),
        ([(clip(0), clip(1))], ["a", "b"], "expected 1 titles, one per pair; got 2"),
        ([(clip(0), clip(1).float())], None, "expected uint8 clips .*float32"),
        ([(clip(0)[0], clip(1)[0])], None, "expected uint8 clips"),
        ([(clip(0), clip(1, frames=4))], None, "differ in shape"),
    ],
)
def test_invalid_pairs_are_refused(columns, titles, message):
    with pytest.raises(ValueError, match=message):
        sheet(columns, titles)
