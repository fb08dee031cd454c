"""Answers of a decoder process as messages on its pipe. Planes are sent as raw bytes after their header."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from pipeline.records import FrameChunk

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pipeline.engine.decoders.lanes import Answer


def send(pipe: Connection, ticket: int, answer: Answer) -> None:
    """Sends one answer. Raises OSError where the owner has closed the pipe.

    Planes go through the pipe's descriptor, not through `Connection`, which reads into a buffer that grows and copies it: 0.03 ms of the
    owner's CPU for a frame of 256x256 instead of 0.12. All lanes of an encoder share the thread that reads.
    """
    if isinstance(answer, FrameChunk):
        planes = answer.planes_T3HW
        flags = answer.first, answer.last, answer.damaged, answer.first_frame, answer.member, answer.masks
        pipe.send((ticket, ("chunk", answer.clip, planes.shape, answer.pts_s, answer.color_matrix, *flags)))
        left = np.ascontiguousarray(planes).data.cast("B")
        while left:
            left = left[os.write(pipe.fileno(), left) :]
    else:
        pipe.send((ticket, answer))


def receive(pipe: Connection) -> tuple[int, Answer]:
    """The next answer and its ticket. Raises what `Connection.recv` raises, EOFError where the process has ended."""
    ticket, answer = pipe.recv()
    if isinstance(answer, tuple):
        _, clip, shape, pts_s, matrix, *flags = answer
        planes_T3HW = np.empty(shape, np.uint8)
        left = planes_T3HW.data.cast("B")
        while left:
            if not (count := os.readv(pipe.fileno(), [left])):
                raise EOFError
            left = left[count:]
        answer = FrameChunk(clip, planes_T3HW, pts_s, matrix, *flags)
    return ticket, answer
