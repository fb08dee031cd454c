"""Decoded frames of one stream in order of display, each with its index in the packet table. Part of the decode package.

Enters: a video and its `PacketTable`. Leaves: (index, libav frame), one after the other, with jumps ahead where a
keyframe allows them exactly, and which frames are damaged. Optionally deinterlaced.

Each packet gets the index of its frame in place of its time before it is decoded, so that a frame says which packet it
came from, whatever the clock of the container does.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.decode.container import LIBAV_ERRORS, OpenContainer, damage
from pipeline.decode.damaged import DamagedFrames
from pipeline.decode.deinterlacer import REACH, Deinterlacer
from pipeline.decode.packets import HIDDEN, PacketTable

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

SEEK_FRAMES = 24  # a seek costs about as much as this many small frames
NO_FRAME = 1 << 40  # stands for the time of a packet that shows no frame
# Decoders that conceal damage without a word unless told not to. The others flag it, or cannot see it.
STRICT = {"hevc", "vvc", "mjpeg", "ffv1", "png", "apng", "dnxhd", "jpeg2000"}
# Of these, each packet that shows a frame gives one; others may say "the same again" by giving none.
ALWAYS_GIVES = {"h264", "hevc", "vvc"}


class FrameStream:
    """Reads forward only. `decoded` counts frames that left the codec, `position` is the index of the last one handed
    out, `damaged` knows which frames are damaged as far as packets were decoded.
    """

    def __init__(
        self,
        video: bytes | str,
        limits: DecodeConfig,
        table: PacketTable,
        *,
        deinterlace: bool = False,
        lenient: bool = False,
    ) -> None:
        """Opens `video` once more; see `OpenContainer` for what it raises. `lenient`: the decoder may conceal damage."""
        self._video, self._limits, self._table = video, limits, table
        self._deinterlace, self._lenient = deinterlace, lenient
        self.damaged = DamagedFrames(table, REACH if deinterlace else 0)
        exact = table.points.exact
        self._point_of = dict(
            zip(table.points.packets[exact].tolist(), table.points.frames[exact].tolist(), strict=True)
        )
        self._seekable = table.seekable
        self.decoded = 0
        self.position = -1
        self._restart()

    def _restart(self) -> None:
        self.opened = OpenContainer(self._video, self._limits)
        context = self.opened.stream.codec_context
        codec = context.codec.canonical_name
        self._gives_each = codec in ALWAYS_GIVES
        self.strict = codec in STRICT and not self._lenient
        if self.strict:
            context.options = {**context.options, "err_detect": "explode"}
        self._packets = self.opened.container.demux(self.opened.stream)
        self._next_packet = 0  # place in the stream of the packet that comes next
        self._begin()

    def _begin(self) -> None:
        """The codec knows of no earlier packet."""
        self._ready: deque[Any] = deque()
        self._filter = Deinterlacer(self.opened.stream) if self._deinterlace else None
        self._expected: int | None = None  # the frame that comes next if none is lost

    def next(self) -> tuple[int, Any] | None:
        """Index and frame; None at the end.

        Raises:
            DamagedInput: `corrupt_stream` where the container breaks, `decoder_memory`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        while True:
            while not self._ready:
                packet = self._read()
                if packet is None:
                    return None
                self._decode(packet)
            frame = self._ready.popleft()
            index = self._index(frame)
            if index is None:
                continue
            if self._gives_each and not self._table.counted and self._expected is not None and index > self._expected:
                self.damaged.lost(self._expected)
            self._expected = index + 1
            if frame.is_corrupt:
                self.damaged.flagged(index)
            self.position = index
            return index, frame

    def jump(self, index: int) -> bool:
        """Moves to the last exact point not after frame `index`, if that skips enough; says whether it did.

        Raises:
            DamagedInput: `corrupt_stream`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        points = self._table.points
        latest = index - (REACH if self._deinterlace else 0)
        at = int(np.searchsorted(points.frames, latest, side="right")) - 1
        while at >= 0 and not points.exact[at]:
            at -= 1
        if at < 0 or points.frames[at] - self.position <= SEEK_FRAMES or points.packets[at] < self._next_packet:
            return False
        with damage("corrupt_stream", f"seeking to frame {index}", self.position + 1, file=self.opened.file):
            first = self._seek(at) if self._seekable else None
        if first is None:
            first = self._skip(int(points.packets[at]))
        if first is not None:
            self._begin()
            self._expected = int(points.frames[at])
            self._decode(first)
        return True

    def close(self) -> None:
        """Releases libav's memory; safe to call twice."""
        self._ready.clear()
        self._filter = None
        self.opened.close()

    def _seek(self, at: int) -> Any | None:
        """The packet of point `at`, found by its time; None, and a stream at its beginning, if it is not there."""
        points = self._table.points
        pts, dts, pos = int(points.pts[at]), int(points.dts[at]), int(points.pos[at])
        size = int(self._table.sizes_N[points.packets[at]])
        # By decode time: MPEG-TS searches on it, and where the index holds presentation times it lands earlier at worst.
        self.opened.container.seek(min(pts, dts) if dts > -(2**62) else pts, stream=self.opened.stream)
        self._packets = self.opened.container.demux(self.opened.stream)
        for packet in self._packets:
            if packet.pts == pts and packet.size == size and pos in (-1, packet.pos):
                self._next_packet = int(points.packets[at]) + 1
                return packet
            if packet.pts is None and packet.size == 0:
                break
            if packet.is_keyframe and packet.pts is not None and packet.pts > pts:
                break
        # The demuxer cannot find a keyframe that it has listed itself: it is not asked again.
        self._seekable = False
        self.opened.close()
        self._restart()
        return None

    def _skip(self, place: int) -> Any | None:
        """The packet at `place`, reached by reading without decoding; None at the end."""
        self.opened.stream.codec_context.flush_buffers()
        while self._next_packet <= place:
            packet = self._read()
            if packet is None or self._next_packet > place:
                return packet
        return None

    def _read(self) -> Any | None:
        """The next packet, that which flushes the codec included; None at the end."""
        file = self.opened.file
        with damage("corrupt_stream", f"reading on after frame {self.position}", self.position + 1, file=file):
            packet = next(self._packets, None)
            file.check()  # a packet that a failed read cut short must not become a frame
        if packet is not None and packet.size:
            self._next_packet += 1
        return packet

    def _decode(self, packet: Any) -> None:
        flush = packet.size == 0 and packet.dts is None
        if packet.size == 0 and not flush:
            return  # AVI's way to say "the same picture again"
        place = self._next_packet - 1
        if not flush:
            self._stamp(packet, place)
        try:
            frames = packet.decode()
        except MemoryError:
            with damage("decoder_memory", f"decoding after frame {self.position}", self.position + 1):
                raise
        except LIBAV_ERRORS as error:
            self.damaged.undecodable(place, self.position, error)
            return
        self.decoded += len(frames)
        if self._filter is None:
            self._ready.extend(frames)
            return
        for frame in frames:
            self._ready.extend(self._filter.push(frame))
        if flush:
            self._ready.extend(self._filter.push(None))

    def _stamp(self, packet: Any, place: int) -> None:
        if self._table.counted:
            packet.pts = place
        else:
            frame = int(self._table.frames_N[place]) if place < len(self._table.frames_N) else HIDDEN
            packet.pts = NO_FRAME if frame == HIDDEN else frame
        packet.dts = None

    def _index(self, frame: Any) -> int | None:
        """Which frame it is; None for one that is not to be shown."""
        if frame.pts is None:
            return self.position + 1
        stamp = int(frame.pts)
        if self._filter is not None:
            stamp = self._filter.stamp(frame)
        if self._table.counted:
            return self._point_of.get(stamp, self.position + 1)
        return None if stamp >= NO_FRAME else stamp
