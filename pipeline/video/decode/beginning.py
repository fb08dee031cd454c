"""Where a video begins: its first good frame, whether it is interlaced and has transparency. Part of the decode package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DamagedInput
from pipeline.video.decode.frame_stream import FrameStream

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.video.decode.packet_table import PacketTable

FIELD_ORDERS = range(2, 6)  # libav's tt, bb, tb, bt


def begin(
    video: bytes | str, limits: DecodeConfig, table: PacketTable, *, deinterlace: bool
) -> tuple[FrameStream, tuple[int, Any], tuple[str, ...]]:
    """A stream, its first good frame with its index, and warnings. If a strict decoder gives no frame, it is opened again to conceal."""
    # Opened again instead of rewound: not every format can seek to its beginning, and opening takes 2 ms.
    stream = FrameStream(video, limits, table, deinterlace=deinterlace)
    warnings: tuple[str, ...] = ()
    try:
        first = _first(stream, table, limits)
    except DamagedInput as error:
        strict = stream.strict
        stream.close()
        if not strict or error.reason != "undecodable":
            raise
        stream = FrameStream(video, limits, table, deinterlace=deinterlace, lenient=True)
        try:
            first, warnings = _first(stream, table, limits), ("decoder_errors",)
        except BaseException:
            stream.close()
            raise
    except BaseException:
        stream.close()
        raise
    lost = (f"undecodable_start:{first[0]}",) if first[0] else ()
    alpha = ("alpha:ignored",) if _has_alpha(stream, first[1]) else ()
    return stream, first, (*warnings, *lost, *alpha)


def _first(stream: FrameStream, table: PacketTable, limits: DecodeConfig) -> tuple[int, Any]:
    """The index at which the video begins, and its first undamaged frame (with `decode.damage` "warn": its first frame).

    A video begins at its first keyframe, even if frames behind that are damaged. A stream that begins inside a group of pictures begins
    at its first undamaged frame.
    """
    why, begins_at, begin_is_damaged = "no packet of the video stream gives a frame", table.begins_at, False
    try:
        while (first := stream.next()) is not None:
            begin_is_damaged |= begins_at is not None and stream.damaged.why(begins_at) is not None
            damaged = stream.damaged.why(first[0])
            if damaged is None or limits.damage == "warn":
                return (begins_at if begins_at is not None and begin_is_damaged else first[0]), first[1]
            why = f"no frame is whole: {damaged}"
            stream.jump(stream.damaged.end_of(first[0]))
    except DamagedInput as error:
        if error.reason == "corrupt_stream":
            raise DamagedInput("undecodable", f"no frame can be decoded: {error.message}", stage="decode") from None
        raise
    refused = stream.damaged.first
    raise DamagedInput("undecodable", why if refused is None or stream.position >= 0 else refused, stage="decode")


def is_interlaced(stream: FrameStream, frame: Any) -> bool:
    """Whether a frame of the stream, or its header, is tagged as interlaced."""
    return bool(frame.interlaced_frame) or stream.opened.stream.codec_context.field_order in FIELD_ORDERS


def _has_alpha(stream: FrameStream, first: Any) -> bool:
    """Whether a video has an alpha channel. libav gives one to every GIF: there pixels of the first frame decide."""
    video = stream.opened.stream
    if video.codec_context.codec.canonical_name == "gif":
        plane = first.planes[0]  # bgra
        rows_HN = np.frombuffer(plane, np.uint8).reshape(first.height, plane.line_size)
        return bool(rows_HN[:, 3 : 4 * first.width : 4].min() < 255)
    # Of VP8 and VP9 it is a stream beside the video's, which libav does not decode.
    return any(component.is_alpha for component in first.format.components) or video.metadata.get("alpha_mode") == "1"
