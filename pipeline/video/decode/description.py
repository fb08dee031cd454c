"""libav's description of an open container, as ffprobe prints it. Part of the decode package.

PyAV 18.1 has no access to a stream's side data, nor to streams that libav adds while it reads.
"""

from __future__ import annotations

import re
from threading import Lock
from typing import Any

from av import logging as libav_log

MAX_TAG_BYTES = 1 << 20  # the description lists all tags; that of a container with more is not read
STREAM = re.compile(r"  Stream #0:(\d+)(.*)")
DOLBY_VISION = re.compile(r" +DOVI configuration record: .*\bprofile: (\d+),.*\bcompatibility id: (\d+)")
_logging = Lock()  # libav has one log level for all threads


def stream_lines(container: Any, index: int) -> list[str]:
    """The lines about stream `index`: its side data, among others. Empty for a container with too many tags."""
    stream, lines = None, []
    for line in _described(container):
        if found := STREAM.match(line):
            stream = int(found[1])
        elif stream == index:
            lines.append(line)
    return lines


def dolby_vision(container: Any, index: int) -> tuple[int, int] | None:
    """Profile and compatibility id of the Dolby Vision of stream `index`; None if it has none."""
    found = (DOLBY_VISION.match(line) for line in stream_lines(container, index))
    return next(((int(match[1]), int(match[2])) for match in found if match), None)


def count_videos(container: Any) -> int:
    """Number of video streams that libav knows by now; 0 for a container with too many tags."""
    found = (STREAM.match(line) for line in _described(container))
    return sum(match is not None and ": Video: " in match[2] for match in found)


def _described(container: Any) -> list[str]:
    tags = [container.metadata, *(stream.metadata for stream in container.streams)]
    if sum(len(name) + len(value) for group in tags for name, value in group.items()) > MAX_TAG_BYTES:
        return []
    with _logging:
        level = libav_log.get_level()
        libav_log.set_level(libav_log.INFO)
        try:
            return str(container.dumps_format()).splitlines()
        finally:
            libav_log.set_level(level)
