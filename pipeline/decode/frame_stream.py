"""Decoded frames of one stream in order of display, each with its index in the packet table. Part of the decode package.

Enters: a video and its `PacketTable`. Leaves: (index, libav frame), one after the other, with jumps ahead where a
keyframe allows them exactly. Optionally deinterlaced.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
from av.error import BlockingIOError as NeedsInput
from av.error import EOFError as FilterEnded
from av.filter import Graph

from pipeline.decode.container import OpenContainer, damage
from pipeline.decode.packets import PacketTable

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

SEEK_FRAMES = 24  # a seek costs about as much as this many small frames
FILTER_REACH = 2  # bwdif looks at neighbouring frames: a jump lands this many frames earlier


class FrameStream:
    """Reads forward only. `decoded` counts frames that left the codec, `position` is the index of the last one handed
    out.
    """

    def __init__(
        self, video: bytes | str, limits: DecodeConfig, table: PacketTable, *, deinterlace: bool = False
    ) -> None:
        """Opens `video` once more; see `OpenContainer` for what it raises."""
        self._video, self._limits, self._table = video, limits, table
        self._deinterlace = deinterlace
        self._starts_N3 = table.starts_N3
        self.decoded = 0
        self._restart()

    def _restart(self) -> None:
        self.opened = OpenContainer(self._video, self._limits)
        self._begin()
        self._counter = 0
        self.position = -1

    def _begin(self) -> None:
        self._packets = self.opened.container.demux(self.opened.stream)
        self._ready: deque[Any] = deque()
        self._filter = Deinterlacer(self.opened.stream) if self._deinterlace else None

    def next(self) -> tuple[int, Any] | None:
        """Index and frame; None at the end. Index -1: a frame earlier than every listed time.

        Raises:
            DamagedInput: `corrupt_stream`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        while not self._ready:
            doing, file = f"decoding after frame {self.position}", self.opened.file
            with damage("corrupt_stream", doing, self.position + 1, file=file):
                packet = next(self._packets, None)
                file.check()  # a packet that a failed read cut short must not become a frame
                if packet is None:
                    return None
                self._decode(packet)
        frame = self._ready.popleft()
        self.position = self._index(frame)
        self._counter += 1
        return self.position, frame

    def jump(self, index: int) -> bool:
        """Moves to the last exact start not after `index`, if that skips enough; says whether it did.

        Raises:
            DamagedInput: `corrupt_stream`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        latest = index - (FILTER_REACH if self._deinterlace else 0)
        at = int(np.searchsorted(self._starts_N3[:, 0], latest, side="right")) - 1
        if at < 0 or self._starts_N3[at, 0] - self.position <= SEEK_FRAMES:
            return False
        _, pts, dts = self._starts_N3[at].tolist()
        with damage("corrupt_stream", f"seeking to frame {index}", self.position + 1, file=self.opened.file):
            # By decode time: MPEG-TS searches on it, and where the index holds presentation times it lands earlier at worst.
            self.opened.container.seek(dts, stream=self.opened.stream)
            self._begin()
            for packet in self._packets:
                if packet.pts == pts and packet.dts == dts:
                    self._decode(packet)
                    return True
                if packet.dts is None or packet.dts > dts:
                    break
        # The demuxer cannot find a keyframe it has listed itself: decode everything from the beginning, and do not ask
        # again.
        self.close()
        self._starts_N3 = self._starts_N3[:0]
        self._restart()
        return True

    def close(self) -> None:
        """Releases libav's memory; safe to call twice."""
        self._ready.clear()
        self._filter = None
        self.opened.close()

    def _decode(self, packet: Any) -> None:
        flush = packet.size == 0 and packet.dts is None
        if packet.size == 0 and not flush:
            return  # AVI's way to say "the same picture again"
        frames = packet.decode()
        self.decoded += len(frames)
        if self._filter is None:
            self._ready.extend(frames)
            return
        for frame in frames:
            self._ready.extend(self._filter.push(frame))
        if flush:
            self._ready.extend(self._filter.push(None))

    def _index(self, frame: Any) -> int:
        if self._table.ticks is None:
            return self._counter
        if frame.pts is None:
            return self.position + 1
        ticks, time_base = frame.pts, self.opened.stream.time_base
        if frame.time_base and frame.time_base != time_base:  # bwdif halves it
            ticks = round(frame.pts * frame.time_base / time_base)
        return int(np.searchsorted(self._table.ticks, ticks, side="right")) - 1


class Deinterlacer:
    """bwdif, one frame for one frame, on frames that are flagged as interlaced; the others pass unchanged."""

    def __init__(self, stream: Any) -> None:
        """Takes the time base of `stream`; the graph is built from the first frame, since sizes may differ from the
        header's.
        """
        self._time_base = stream.time_base
        self._graph: Graph | None = None

    def push(self, frame: Any | None) -> list[Any]:
        """Gives a frame in (None: no more come) and takes out what is ready."""
        if self._graph is None:
            if frame is None:
                return []
            self._graph = self._build(frame)
        self._graph.vpush(frame)
        ready = []
        while True:
            try:
                ready.append(self._graph.vpull())
            except (NeedsInput, FilterEnded):
                return ready

    def _build(self, frame: Any) -> Graph:
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or self._time_base
        )
        bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        sink = graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        graph.configure()
        return graph
