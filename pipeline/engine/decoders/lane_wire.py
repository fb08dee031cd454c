"""Answers of a decoder process as messages on its pipe. Planes are sent as raw bytes after their header."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.records import FrameChunk

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from pipeline.engine.decoders.lanes import Answer


def send(pipe: Connection, ticket: int, answer: Answer) -> None:
    """Sends one answer. Raw bytes cost one copy less on either side than pickled planes."""
    if isinstance(answer, FrameChunk):
        planes = answer.planes_T3HW
        flags = answer.first, answer.last, answer.damaged, answer.first_frame, answer.member, answer.masks
        pipe.send((ticket, ("chunk", answer.clip, planes.shape, answer.pts_s, answer.color_matrix, *flags)))
        pipe.send_bytes(np.ascontiguousarray(planes).data.cast("B"))
    else:
        pipe.send((ticket, answer))


def receive(pipe: Connection) -> tuple[int, Answer]:
    """The next answer and its ticket. Raises what `Connection.recv` raises, EOFError where the process has ended."""
    ticket, answer = pipe.recv()
    if isinstance(answer, tuple):
        _, clip, shape, pts_s, matrix, *flags = answer
        planes_T3HW = np.empty(shape, np.uint8)
        pipe.recv_bytes_into(planes_T3HW.data.cast("B"))
        answer = FrameChunk(clip, planes_T3HW, pts_s, matrix, *flags)
    return ticket, answer
