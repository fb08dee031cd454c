"""Table of a stream's packets: which frame each one shows, and when; with its construction. Part of the decode package."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.video.decode.bitstream import INTRA_ONLY, Point
from pipeline.video.decode.clock import (
    LEAP_S,
    MOST_REORDERED,
    NO_TIME,
    Order,
    continue_clock,
    fill_gaps,
    spread,
    usual_gap,
    wild_times,
)

if TYPE_CHECKING:
    from pipeline.video.decode.container import OpenContainer
    from pipeline.video.decode.packets import Packets

HIDDEN = -1  # frame of a packet that shows none of its own
NO_PICTURE = -2  # frame of a packet that holds only parameters or messages
MOST_TIMELESS = 0.1  # of the packets; if more have no time, frames are counted
# Codecs whose frames may be shown in another order than decoded.
REORDERING = {
    "h264", "hevc", "vvc", "evc", "mpeg1video", "mpeg2video", "mpeg4", "vc1", "wmv3", "rv30", "rv40", "svq3", "cavs",
    "dirac", "avs2", "avs3",
}  # fmt: skip
RAW_FORMATS = {
    "h264",
    "hevc",
    "vvc",
    "mpegvideo",
    "m4v",
    "h263",
    "vc1",
    "cavsvideo",
    "dirac",
}  # their 25 fps are a guess
MPEG_FORMATS = {"mpegts", "mpeg"}
FLV_LEAP = 1 << 31  # ms: libav takes a time that falls far back for one that wrapped around 32 bits
DECODE_TIMES = MPEG_FORMATS | {"flv"}
FLAG_EARLY = 3  # packets
ABSURD_LAST = 10  # usual gaps; a longer duration of the last frame counts only up to the end in the header


@dataclass(frozen=True, slots=True, repr=False)
class Points:
    """Packets where decoding may begin, or where damage ends: arrays with one entry each, ascending."""

    packets: np.ndarray  # place in the stream, counted in packets
    frames: np.ndarray  # the first intact frame from here on
    exact: np.ndarray  # bool: decoding may begin here
    closed: np.ndarray  # bool: also, no packet before it shows a later frame, and none after it an earlier one
    pts: np.ndarray
    dts: np.ndarray
    pos: np.ndarray


@dataclass(frozen=True, slots=True, repr=False)
class PacketTable:
    """The frame that each packet shows, and the time of each frame.

    A frame is an index into `times_s`. `frames_N` has one for each packet in the order of reading, `HIDDEN` or `NO_PICTURE` for packets
    that show no frame of their own. If `counted`, it is right only at points: between them, frames are in the order of the decoder.
    """

    frames_N: np.ndarray  # int32
    sizes_N: np.ndarray  # int32, bytes
    counted: bool
    times_s: np.ndarray  # float64, seconds on the container's clock, ascending
    end_s: float
    points: Points
    begins_at: int | None  # first frame of a stream that begins with a keyframe; frames shown before it are cut away
    breaks: tuple[int, ...]  # packets where the clock breaks
    joins: tuple[int, ...]  # those before which another recording may lie
    gaps: tuple[int, ...]  # packets predicted from pictures that the stream does not hold
    seekable: bool  # whether a time leads to one place
    missing: str  # which frames the container lacks, as text; empty if none is known to be missing
    warnings: tuple[str, ...]


class Tabled:
    """Construction of a `PacketTable` from the packets of a stream."""

    def __init__(self, opened: OpenContainer, packets: Packets, missing: str) -> None:
        self._opened, self._missing = opened, missing
        self._stream, self._format = opened.stream, opened.format_name
        self._codec = self._stream.codec_context.codec.canonical_name
        self._pts, self._dts = np.array(packets.pts, np.int64), np.array(packets.dts, np.int64)
        self._durations = np.array(packets.durations, np.int64)
        self._sizes = np.array(packets.sizes, np.int32)
        self._shown = np.array(packets.shown, bool)
        self._points = np.array(packets.points, np.int64)
        self._pos, self._kinds = np.array(packets.pos, np.int64), np.array(packets.kinds, np.int8)
        self._time_base = float(self._stream.time_base or 0)
        self._starts_with_key = packets.starts_with_key
        self._pictureless, self._flagged = packets.pictureless, packets.flagged
        self._gaps = tuple(gap for gap in packets.gaps if gap not in set(packets.points))
        extra = opened.extra_streams(packets.of_others)
        self._warnings: list[str] = [f"extra_streams:{extra}"] if extra else []

    def table(self) -> PacketTable:
        """The table, by presentation times if the stream has them, else by counting frames."""
        reordered = bool(self._stream.codec_context.has_b_frames)
        if self._time_base:
            known = np.flatnonzero(self._shown & (self._pts != NO_TIME))
            self._pts[known[wild_times(self._pts[known], int(LEAP_S / self._time_base))]] = NO_TIME
        timeless = int(np.count_nonzero(self._pts[self._shown] == NO_TIME))
        # AVI has only decode times. For reordered frames libav guesses presentation times, wrongly for H.264.
        guessed = self._format == "avi" and reordered
        if guessed or not self._time_base or timeless > MOST_TIMELESS * np.count_nonzero(self._shown):
            return self._counted()
        if timeless:
            self._place_timeless(reordered, timeless)
        return self._timed()

    def _place_timeless(self, reordered: bool, timeless: int) -> None:
        """Puts frames without a time between their neighbours. If frames are reordered, their place is unknown, and they are not shown."""
        self._warnings.append(f"untimed_frames:{timeless}")
        if reordered:
            self._shown &= self._pts != NO_TIME
        else:
            self._pts[self._shown] = fill_gaps(self._pts[self._shown])

    def _counted(self) -> PacketTable:
        # Raw streams and some AVI files have no presentation times: frames in order of display, at the stream's rate.
        rate = self._rate()
        count = int(np.count_nonzero(self._shown))
        self._warnings.append(f"no_timestamps:{rate:g}fps")
        frames_N = np.where(self._shown, np.cumsum(self._shown) - 1, HIDDEN)
        times_s = np.arange(count, dtype=np.float64) / rate
        return self._finish(frames_N, times_s, count / rate, counted=True, seekable=False)

    def _rate(self) -> float:
        stream = self._stream
        own = stream.codec_context.framerate if self._format in RAW_FORMATS else None
        rate = float(own or stream.average_rate or stream.guessed_rate or stream.base_rate or 25)
        return rate if 0 < rate <= 1000 else 25.0

    def _timed(self) -> PacketTable:
        pts, dts = self._pts[self._shown], self._dts[self._shown]
        mpeg = self._format in MPEG_FORMATS
        order = Order(
            reorders=self._codec in REORDERING,
            decode_times=self._format in DECODE_TIMES,
            leap=int(LEAP_S / self._time_base) if mpeg else FLV_LEAP if self._format == "flv" else None,
        )
        continued = continue_clock(pts, dts, self._is_point()[self._shown], order)
        if continued is None:
            self._warnings.append("unusable_timestamps")
            return self._counted()
        shown_ticks, breaks = continued
        if breaks:
            self._warnings.append(f"clock_restarts:{len(breaks)}")
        ticks = np.unique(shown_ticks)
        end = int(ticks[-1]) + self._last_duration(ticks, shown_ticks, breaks)
        frames, times = np.searchsorted(ticks, shown_ticks), ticks.astype(np.float64)
        in_order = bool((np.diff(shown_ticks) >= 0).all())
        if len(ticks) < len(shown_ticks):
            self._warnings.append(f"repeated_timestamps:{len(shown_ticks) - len(ticks)}")
            if in_order:  # all are shown, spread up to the next time; else their order is unknown
                frames, times = np.arange(len(shown_ticks)), spread(shown_ticks, end)
        frames_N = np.full(len(self._pts), HIDDEN, np.int64)
        frames_N[self._shown] = frames
        return self._finish(
            frames_N,
            times * self._time_base,
            end * self._time_base,
            counted=False,
            seekable=not breaks,
            breaks=tuple(np.flatnonzero(self._shown)[breaks].tolist()),
        )

    def _is_point(self) -> np.ndarray:
        """Packets that are keyframes. Flags on most packets of a codec that predicts are ignored, but for verified points."""
        is_point = np.zeros(len(self._pts), bool)
        believed = self._points
        if self._codec not in INTRA_ONLY and len(self._points) > len(self._pts) / 2:
            believed = self._points[self._kinds >= Point.EXACT]
        is_point[believed] = True
        return is_point

    def _last_duration(self, ticks: np.ndarray, shown_ticks: np.ndarray, breaks: list[int]) -> int:
        """Ticks that the last frame is shown: the packet's duration, up to the end in the header."""
        last = int(self._durations[self._shown][shown_ticks == ticks[-1]].max())
        gap = usual_gap(ticks) if len(ticks) > 1 else max(1, round(0.04 / self._time_base))
        until_end = 0 if breaks else self._header_end() - int(ticks[-1])
        if last <= 0:
            return gap
        if until_end > 0:
            return min(last, until_end)
        absurd = len(ticks) > 1 and last > max(ABSURD_LAST * gap, int(np.diff(ticks).max()))
        return gap if absurd else last

    def _header_end(self) -> int:
        """End of the stream in its header, in ticks; 0 if there is none."""
        stream, container = self._stream, self._opened.container
        if stream.duration:
            return int((stream.start_time or 0) + stream.duration)
        if container.duration:
            return round(((container.start_time or 0) + container.duration) / 1e6 / self._time_base)
        return 0

    def _finish(
        self,
        frames_N: np.ndarray,
        times_s: np.ndarray,
        end_s: float,
        *,
        counted: bool,
        seekable: bool,
        breaks: tuple[int, ...] = (),
    ) -> PacketTable:
        frames_N[self._pictureless] = NO_PICTURE
        if seekable:
            self._warnings += _early_end(self._opened, float(times_s[0]), end_s)
        if flagged := [packet for packet in self._flagged if not near(packet, breaks)]:
            self._warnings.append(f"transport_errors:{len(flagged)}")
        begins_at = int(frames_N[0]) if self._starts_with_key and not counted and frames_N[0] >= 0 else None
        return PacketTable(
            frames_N=frames_N.astype(np.int32),
            sizes_N=self._sizes,
            counted=counted,
            times_s=times_s,
            end_s=end_s,
            points=self._tabled_points(frames_N, counted),
            begins_at=begins_at,
            # H.264 numbers its pictures: the numbers show more reliably than a clock whether some are missing.
            joins=breaks if self._format in MPEG_FORMATS and self._codec in REORDERING - {"h264"} else (),
            breaks=breaks,
            gaps=self._gaps,
            seekable=seekable,
            missing=self._missing,
            warnings=tuple(self._warnings),
        )

    def _tabled_points(self, frames_N: np.ndarray, counted: bool) -> Points:
        frames = np.maximum(frames_N[self._points], HIDDEN)
        exact = self._kinds >= (Point.CLOSED if counted else Point.EXACT)
        for n in np.flatnonzero(frames == HIDDEN).tolist():  # decoding may begin at a frame that an edit list cuts away
            begin, end = self._points[n], self._points[n + 1] if n + 1 < len(self._points) else len(frames_N)
            following = frames_N[begin:end][frames_N[begin:end] >= 0]
            frames[n] = following.min() if len(following) else HIDDEN
        if counted:  # up to this many frames behind it may be shown before it
            frames = np.where(exact | (frames == HIDDEN), frames, frames + MOST_REORDERED)
        # Only ascending ones, for binary search.
        keep = frames > np.maximum.accumulate(np.concatenate([[HIDDEN], frames]))[:-1]
        packets = self._points[keep]
        closed = self._kinds[keep] == Point.CLOSED
        return Points(
            packets, frames[keep], exact[keep], closed, self._pts[packets], self._dts[packets], self._pos[keep]
        )


def near(packet: int, breaks: tuple[int, ...]) -> bool:
    """Whether the clock breaks just behind a packet. The counters of a transport stream break there too, and libav flags that as a loss,
    a packet or two early.
    """
    at = bisect_left(breaks, packet)
    return at < len(breaks) and breaks[at] - packet <= FLAG_EARLY


def _early_end(opened: OpenContainer, first_s: float, end_s: float) -> tuple[str, ...]:
    """A warning if the container is longer than its video: the sound goes on, or the file was cut off."""
    container = opened.container
    if not container.duration:
        return ()
    header_s = container.duration / 1e6
    # Matroska counts from zero.
    begin_s = 0.0 if "matroska" in opened.format_name else (container.start_time or 0) / 1e6
    video_s = end_s - min(first_s, begin_s)
    return (f"video_ends_early:{video_s:.2f}/{header_s:.2f}s",) if header_s - video_s > max(0.5, 0.1 * header_s) else ()
