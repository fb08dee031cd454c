"""Reading of all packets of an open container into a `PacketTable`; no frame is decoded. Part of the decode package."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline.errors import DamagedInput, PolicyReject
from pipeline.records import video_counts
from pipeline.video.decode.bitstream import Point, hidden_test, point_test
from pipeline.video.decode.clock import NO_TIME
from pipeline.video.decode.container import OpenContainer, damage
from pipeline.video.decode.h264_pictures import Pictures
from pipeline.video.decode.packet_table import PacketTable, Tabled

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig


class Packets:
    """Properties of packets in flat arrays, about 40 bytes per frame: a video may have millions."""

    def __init__(self) -> None:
        self.pts, self.dts = array("q"), array("q")
        self.durations, self.sizes = array("q"), array("i")
        self.shown = array("b")
        self.starts_with_key = False  # by the container's flag
        self.gaps: list[int] = []  # packets predicted from missing pictures
        self.pictureless: list[int] = []  # packets without a picture
        self.flagged: list[
            int
        ] = []  # as corrupt by the demuxer: transport packets are missing, or the file ends inside
        self.points, self.pos = array("q"), array("q")  # of points: packet and position in the file
        self.kinds = array("b")
        self.of_others: Counter[int] = Counter()  # packets of the other video streams, by index

    def __len__(self) -> int:
        return len(self.pts)

    def read(self, opened: OpenContainer, limits: DecodeConfig) -> None:
        """Reads to the end. Raises as libav does."""
        stream = opened.stream
        is_hidden, point_of, pictures = hidden_test(stream), point_test(stream), None
        codec = stream.codec_context.codec.canonical_name
        if codec == "h264":
            pictures = Pictures(stream.codec_context.extradata or b"")
            is_hidden = pictures.shows_none
        for packet in opened.container.demux(stream, *opened.others):
            if packet.size == 0:
                continue
            if packet.stream_index != stream.index:
                self.of_others[packet.stream_index] += 1
                continue
            _check_frames(len(self) + 1, stream, limits)
            pts, dts = packet.pts, packet.dts
            # A packet that an edit list cuts away has the flag "discard"; decoding may still begin with it.
            hidden = (is_hidden is not None and is_hidden(packet)) or packet.is_discard
            if pictures is not None and pictures.is_second_field and self.durations:
                self.durations[-1] = 0  # it was the duration of a field
            if pictures is not None and pictures.follows_gap:
                self.gaps.append(len(self))
            if hidden and not packet.is_discard and (codec == "hevc" or (pictures and not pictures.is_second_field)):
                self.pictureless.append(len(self))
            if packet.is_corrupt:
                self.flagged.append(len(self))
            self.pts.append(NO_TIME if pts is None else pts)
            self.dts.append(NO_TIME if dts is None else dts)
            self.durations.append(packet.duration or 0)
            self.sizes.append(packet.size)
            self.shown.append(not hidden)
            self.starts_with_key |= packet.is_keyframe and len(self) == 1
            if packet.is_keyframe and (point := point_of(packet)) is not Point.NONE:
                self.points.append(len(self) - 1)
                self.pos.append(-1 if packet.pos is None else packet.pos)
                self.kinds.append(point)


def read_packets(opened: OpenContainer, limits: DecodeConfig) -> PacketTable:
    """Reads all packets of the stream; decodes none.

    Raises:
        DamagedInput: `truncated` if the header promises frames and there is none; `corrupt_stream` if the container breaks before its
            first packet.
        PolicyReject: `no_frames`, `too_many_frames`, `too_long`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    stream = opened.stream
    # The index of mp4 and mov lists all packets, also those behind the end of a cut file. `stream.frames` also counts what an edit list
    # leaves out. Other formats guess their number of frames, and index what was read.
    is_mov = "mov" in opened.format_name
    listed = len(stream.index_entries) if is_mov else 0
    _check_frames(listed, stream, limits)
    packets, missing = Packets(), ""
    try:
        with damage("corrupt_stream", "reading packets", file=opened.file):
            packets.read(opened, limits)
    except DamagedInput as error:
        if not any(packets.shown):
            raise
        missing = f"the container breaks after {len(packets)} frames: {error.message}"
    if not any(packets.shown):
        if is_mov and (promised := max(listed, stream.frames)):
            message = f"the file lacks its end: its header promises {promised} frames, it holds none"
            raise DamagedInput("truncated", message, stage="decode")
        raise PolicyReject("no_frames", "the video stream holds no frames (is it only a header?)", stage="decode")
    if len(packets) < listed and len(packets) < (promised := _not_empty(stream.index_entries[:listed])):
        missing = f"the file lacks its end: its header promises {promised} frames, it holds {len(packets)}"
    elif is_mov and listed < stream.frames and (known := opened.listed_without_edits()) < stream.frames:
        # libav leaves out samples of a second codec, as of a recording that was joined from two.
        missing = (
            f"its header promises {stream.frames} frames, of which libav reads {known}: the track has several codecs"
        )
    table = Tabled(opened, packets, missing).table()
    _check_duration(table.end_s - float(table.times_s[0]), stream, limits)  # the last frame's duration may be anything
    return table


def _not_empty(entries: list[Any]) -> int:
    """Number of entries of an index that are packets: libav gives none of size 0, a frame that repeats the one before."""
    return sum(entry.size > 0 for entry in entries)


def _check_frames(count: int, stream: Any, limits: DecodeConfig) -> None:
    if count > limits.max_frames:
        message = f"more frames ({count}) than decode.max_frames {limits.max_frames}"
        video = video_counts(stream.codec_context.width, stream.codec_context.height)
        raise PolicyReject("too_many_frames", message, stage="decode", video=video)


def _check_duration(seconds: float, stream: Any, limits: DecodeConfig) -> None:
    if seconds > limits.max_duration_s:
        message = f"video of {seconds:.1f} s is longer than decode.max_duration_s {limits.max_duration_s:g}"
        video = video_counts(stream.codec_context.width, stream.codec_context.height, seconds)
        raise PolicyReject("too_long", message, stage="decode", video=video)
