"""When each frame is shown, from the packets of an open container; no frame is decoded. Part of the decode package.

Takes an `OpenContainer` and the job's limits. Gives a `PacketTable`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.decode.container import OpenContainer, damage
from pipeline.errors import DamagedInput, PolicyReject

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

INTRA_ONLY = {"mjpeg", "prores", "ffv1", "rawvideo", "dnxhd", "jpeg2000", "huffyuv", "ffvhuff", "png", "utvideo"}
EXACT_KEYFRAMES = {"vp8", "vp9", "av1"} | INTRA_ONLY
IDR_SLICE = 5  # H.264 NAL unit type
HEVC_IRAP = range(16, 22)  # HEVC NAL unit types: BLA, IDR, CRA


@dataclass(frozen=True, slots=True)
class PacketTable:
    """When each frame is shown, from packets alone.

    `ticks` are presentation times in stream time-base units, ascending and unique, or None when packets carry none and
    frames are counted instead. `times_s` float64 are seconds on the container's clock. `starts` are (frame index, pts,
    dts) of packets where decoding may start with exactly the pixels of a decode from the beginning.
    """

    ticks: np.ndarray | None
    times_s: np.ndarray
    end_s: float
    starts_N3: np.ndarray
    missing: str  # what the container lacks of its frames, in words; empty: nothing known
    warnings: tuple[str, ...]


class _Packets:
    """What is remembered of the packets: flat arrays, 16 bytes a frame, since a video may have millions."""

    def __init__(self) -> None:
        self.pts = array("q")
        self.durations = array("q")
        self.starts = array("q")  # pts, dts, pts, dts, …
        self.count = 0  # hidden and discarded ones too
        self.timeless = 0

    def read(self, opened: OpenContainer, limits: DecodeConfig) -> None:
        stream = opened.stream
        time_base = float(stream.time_base or 0)
        is_vp8 = stream.codec_context.name == "vp8"
        is_start = _start_test(stream)
        earliest, latest = None, 0
        for packet in opened.container.demux(stream):
            if packet.size == 0:
                continue
            self.count += 1
            _check_frames(self.count, limits)
            if packet.is_discard or (is_vp8 and not bytes(packet)[0] >> 4 & 1):
                continue  # cut away by an edit list, or an invisible VP8 reference frame
            pts = packet.pts
            self.timeless += pts is None
            self.pts.append(pts or 0)
            self.durations.append(packet.duration or 0)
            if pts is None:
                continue
            earliest, latest = (pts, pts) if earliest is None else (min(earliest, pts), max(latest, pts))
            _check_duration((latest - earliest) * time_base, limits)
            if packet.is_keyframe and packet.dts is not None and is_start(packet):
                self.starts.extend((pts, packet.dts))


def read_packets(opened: OpenContainer, limits: DecodeConfig) -> PacketTable:
    """Reads all packets of the stream; decodes none.

    Raises:
        DamagedInput: `truncated` when no frame of those promised is there;
            `corrupt_stream` when the container breaks before its first packet.
        PolicyReject: `no_frames`, `too_many_frames`, `too_long`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    stream = opened.stream
    promised = stream.frames if "mov" in opened.format_name else 0  # others guess it from rate and duration
    _check_frames(promised, limits)
    packets, missing = _Packets(), ""
    try:
        with damage("corrupt_stream", "reading packets", file=opened.file):
            packets.read(opened, limits)
    except DamagedInput as error:
        if not packets.pts:
            raise
        missing = f"the container breaks after {packets.count} frames: {error.message}"
    if not packets.pts:
        if promised:
            message = f"the file lacks its end: its header promises {promised} frames, it holds none"
            raise DamagedInput("truncated", message, stage="decode")
        raise PolicyReject("no_frames", "the video stream holds no frames (a header alone?)", stage="decode")
    if packets.count < promised:
        missing = f"the file lacks its end: its header promises {promised} frames, it holds {packets.count}"
    # AVI has decode times only; with reordering what libav passes on as presentation times is a guess, wrong for H.264.
    reordered = opened.format_name == "avi" and stream.codec_context.has_b_frames
    if reordered or packets.timeless or not stream.time_base:
        table = _counted(stream, len(packets.pts), missing)
    else:
        table = _timed(packets, float(stream.time_base), missing)
    _check_duration(table.end_s - float(table.times_s[0]), limits)  # the last frame's duration may be anything
    return replace(table, warnings=(*table.warnings, *_early_end(opened.container, table)))


def _early_end(container: Any, table: PacketTable) -> tuple[str, ...]:
    """A warning when the container is longer than its video: sound that goes on, or a file that was cut off."""
    if not container.duration:
        return ()
    header_s = container.duration / 1e6
    video_s = table.end_s - (container.start_time or 0) / 1e6
    return (f"video_ends_early:{video_s:.2f}/{header_s:.2f}s",) if header_s - video_s > max(0.5, 0.1 * header_s) else ()


def _check_frames(count: int, limits: DecodeConfig) -> None:
    if count > limits.max_frames:
        raise PolicyReject(
            "too_many_frames", f"more frames ({count}) than decode.max_frames {limits.max_frames}", stage="decode"
        )


def _check_duration(seconds: float, limits: DecodeConfig) -> None:
    if seconds > limits.max_duration_s:
        raise PolicyReject(
            "too_long",
            f"video of {seconds:.1f} s is longer than decode.max_duration_s {limits.max_duration_s:g}",
            stage="decode",
        )


def _counted(stream: Any, count: int, missing: str) -> PacketTable:
    # Raw streams and some AVI files carry no presentation times: frames in order of display, at the stream's rate.
    rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 25)
    times_s = np.arange(count, dtype=np.float64) / rate
    no_starts = np.empty((0, 3), dtype=np.int64)
    return PacketTable(None, times_s, count / rate, no_starts, missing, (f"no_timestamps:{rate:g}fps",))


def _timed(packets: _Packets, time_base: float, missing: str) -> PacketTable:
    pts = np.array(packets.pts, dtype=np.int64)
    ticks = np.unique(pts)
    warnings = (f"repeated_timestamps:{len(pts) - len(ticks)}",) if len(ticks) < len(pts) else ()
    last_duration = int(np.array(packets.durations, dtype=np.int64)[pts == ticks[-1]].max())
    if last_duration <= 0:
        last_duration = int(np.median(np.diff(ticks))) if len(ticks) > 1 else max(1, round(0.04 / time_base))
    starts_N2 = np.array(packets.starts, dtype=np.int64).reshape(-1, 2)
    starts_N3 = np.column_stack([np.searchsorted(ticks, starts_N2[:, 0]), starts_N2])
    return PacketTable(
        ticks=ticks,
        times_s=ticks * time_base,
        end_s=(int(ticks[-1]) + last_duration) * time_base,
        starts_N3=starts_N3[np.argsort(starts_N3[:, 0], kind="stable")],
        missing=missing,
        warnings=warnings,
    )


def _start_test(stream: Any) -> Any:
    """Whether decoding from this keyframe packet is exact: by codec, and for H.264 and HEVC by its NAL units.

    An H.264 "keyframe" may be a recovery point (intra refresh, open GOP with references across); only IDR is certain.
    """
    codec = stream.codec_context.codec.canonical_name
    if codec in EXACT_KEYFRAMES:
        return lambda packet: True
    if codec not in ("h264", "hevc"):
        return lambda packet: False
    extradata = stream.codec_context.extradata or b""
    configured = len(extradata) > 22 if codec == "hevc" else len(extradata) > 6
    length_size = (extradata[21 if codec == "hevc" else 4] & 3) + 1 if configured and extradata[0] == 1 else 0

    def holds_start(packet: Any) -> bool:
        headers = _nal_headers(bytes(packet), length_size)
        if codec == "h264":
            return any(header & 0x1F == IDR_SLICE for header in headers)
        return any(header >> 1 & 0x3F in HEVC_IRAP for header in headers)

    return holds_start


def _nal_headers(data: bytes, length_size: int) -> Iterator[int]:
    """First byte of each NAL unit; `length_size` 0 means start codes."""
    position = 0
    while length_size and position + length_size < len(data):
        yield data[position + length_size]
        position += length_size + int.from_bytes(data[position : position + length_size], "big")
    while not length_size and 0 <= (position := data.find(b"\0\0\1", position)) < len(data) - 3:
        yield data[position + 3]
        position += 3
