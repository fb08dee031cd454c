"""Finder of black bars (letterbox, pillarbox): the smallest rectangle that holds the content of all frames of a clip.

Takes an open `Video` and the frames of its clips, in one pass, with four numbers a frame in memory. A bar is a run of rows or columns from
an edge that are black in every frame of the clip: if bars change within it, the smallest rectangle that has the content of all frames is
left. Nothing that is shown in any frame is cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import BadDataError
from pipeline.video.decode.cropping import Window
from pipeline.video.decode.planes import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.video.decode import Video
    from pipeline.video.images import Pictures

BLACK = 24  # greatest luma of black in limited range, where 16 is black: bars of compressed video are not clean
SPECKS = 1 / 64  # of the pixels of a row or column that may be brighter, for noise at the edge
LEAST = 4  # content of less than 1 / LEAST of a side is a dark clip, not one with bars
FRAMES_AT_ONCE = 32


class BlackBars:
    """Boxes of content of single frames, and what they have in common."""

    def __init__(self, frames: np.ndarray, height: int, width: int) -> None:
        """`frames`: int64, ascending, without repetition, indices of the video's frames. `height`, `width`: as displayed, pixels."""
        self._frames, self._size = frames, (height, width)
        nothing = (height, 0, width, 0)
        self._boxes_N4 = np.tile(np.array(nothing, np.int32), (len(frames), 1))  # top, bottom, left, right

    def look(self, video: Video | Pictures) -> Iterator[None]:
        """Finds the content of each frame. Yields after every `FRAMES_AT_ONCE` frames; frames that cannot be decoded are left out.

        Raises:
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        height, width = self._size
        geometry = Geometry(height, width, 0, 0, height, width)
        planes_3HW = np.empty((3, height, width), np.uint8)
        for number, index in enumerate(self._frames.tolist(), 1):
            try:
                video.show(index).write(planes_3HW, geometry)
            except BadDataError:  # a clip with this frame fails when it is cut, with the reason
                continue
            box = content_box(planes_3HW[0])
            if box is not None:
                self._boxes_N4[number - 1] = box
            if number % FRAMES_AT_ONCE == 0:
                yield

    def inside(self, frames: np.ndarray | None = None) -> Window | None:
        """What bars leave of these frames (by default of all), in pixels of the displayed frame; None without bars, or if all is black."""
        boxes_N4 = self._boxes_N4 if frames is None else self._boxes_N4[np.searchsorted(self._frames, frames)]
        top, left = boxes_N4[:, 0].min(), boxes_N4[:, 2].min()
        height, width = boxes_N4[:, 1].max() - top, boxes_N4[:, 3].max() - left
        if (height, width) == self._size or height * LEAST < self._size[0] or width * LEAST < self._size[1]:
            return None
        return Window(int(left), int(top), int(width), int(height))


def content_box(luma_HW: np.ndarray) -> tuple[int, int, int, int] | None:
    """First row, row after the last, first column, column after the last that are not black (uint8, limited range); None if all are."""
    bright_HW = luma_HW > BLACK
    rows = np.flatnonzero(bright_HW.sum(axis=1, dtype=np.int32) > SPECKS * luma_HW.shape[1])
    columns = np.flatnonzero(bright_HW.sum(axis=0, dtype=np.int32) > SPECKS * luma_HW.shape[0])
    if not len(rows) or not len(columns):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
