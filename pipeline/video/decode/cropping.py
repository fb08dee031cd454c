"""Cropping that a container has for its frames: Matroska's PixelCrop, MP4's `clap`. Part of the decode package.

libav's decoders apply the cropping of the codec (H.264's SPS), but not that of the container. It applies to the stored frame, before sample
aspect ratio and rotation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.video.decode.description import stream_lines
from pipeline.video.decode.filtering import FilterChain

CROPPING_FORMATS = ("mov", "matroska")
CROPPING = re.compile(r" +Frame Cropping: (\d+)/(\d+)/(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Margins:
    """Pixels that are not shown on each side of the stored frame."""

    left: int
    right: int
    top: int
    bottom: int

    def window(self, frame: Any) -> Window | None:
        """The part of `frame` that is shown, rounded to its chroma samples as libav's `crop` does; None if nothing would be left."""
        step_x, step_y = 4 // frame.format.chroma_width(4), 4 // frame.format.chroma_height(4)
        left, width = self.left, frame.width - self.left - self.right
        top, height = self.top, frame.height - self.top - self.bottom
        if width < step_x or height < step_y:
            return None
        return Window(left - left % step_x, top - top % step_y, width - width % step_x, height - height % step_y)

    def __str__(self) -> str:
        return f"{self.left}/{self.right}/{self.top}/{self.bottom}"


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a frame, in pixels of the frame."""

    left: int
    top: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}+{self.left}+{self.top}"


def container_margins(container: Any, index: int) -> Margins | None:
    """The cropping that the container has for the frames of stream `index`; None if it has none. libav has checked it against the size in
    the header.
    """
    if not str(container.format.name).startswith(CROPPING_FORMATS):
        return None
    for line in stream_lines(container, index):
        if found := CROPPING.fullmatch(line):
            left, right, top, bottom = map(int, found.groups())
            return Margins(left, right, top, bottom)
    return None


class Cropper:
    """Crops the frames of a video. No pixel is copied."""

    def __init__(self, margins: Margins, first: Any) -> None:
        """`margins` are for frames of the size of `first`; they are scaled for frames of another size."""
        self._margins = margins
        self._size = first.width, first.height
        self._shape: tuple[int, int, str] | None = None
        self._chain: FilterChain | None = None

    def cut(self, frame: Any) -> Any:
        """The cropped frame. Raises libav's errors."""
        shape = frame.width, frame.height, frame.format.name
        if shape != self._shape:
            window = self._scaled(frame).window(frame)
            arguments = f"w={window.width}:h={window.height}:x={window.left}:y={window.top}" if window else ""
            self._chain = FilterChain(frame, [("crop", arguments)]) if window else None
            self._shape = shape
        return frame if self._chain is None else self._chain.apply(frame)

    def _scaled(self, frame: Any) -> Margins:
        x, y = frame.width / self._size[0], frame.height / self._size[1]
        margins = self._margins
        return Margins(
            round(margins.left * x), round(margins.right * x), round(margins.top * y), round(margins.bottom * y)
        )
