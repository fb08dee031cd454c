"""Decoded frames of one stream in order of display, each with its index in the packet table. Part of the decode package.

Takes a video and its `PacketTable`, returns (index, libav frame) one by one, and records which frames are damaged. It jumps ahead only if
the pixels are the same as without the jump. Optionally deinterlaces.

Each packet gets its place in the stream as its time before it is decoded. So the time of a frame says which packet it is of, even if the
clock of the container is broken.
"""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DamagedInput
from pipeline.video.decode.container import LIBAV_ERRORS, OpenContainer, damage
from pipeline.video.decode.damaged import DamagedFrames
from pipeline.video.decode.deinterlacer import REACH, Deinterlacer
from pipeline.video.decode.orientation import sane_aspect
from pipeline.video.decode.packet_table import NO_PICTURE, PacketTable, near

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

MOST_HELD = 40  # frames: in a pyramid of 32 pictures the first one shown comes 31 frames before the first one decoded
SEEK_FRAMES = 24  # a seek costs about as much as decoding this many small frames
# Decoders that conceal damage without a flag, unless they are set to fail. The others flag it, or cannot detect it.
STRICT = {"mjpeg", "ffv1"}
# In these codecs each packet that shows a frame gives one. In others a packet without a frame may mean "repeat the last one".
ALWAYS_GIVES = {"h264", "hevc", "vvc"}


class FrameStream:
    """Forward reader of frames.

    `decoded` counts frames that left the codec, `position` is the index of the last frame returned, `damaged` has the damaged frames
    among the packets decoded so far.
    """

    def __init__(
        self,
        video: bytes | str,
        limits: DecodeConfig,
        table: PacketTable,
        *,
        deinterlace: bool = False,
        lenient: bool = False,
        hwaccel: Any = None,
    ) -> None:
        """Opens `video` again; raises as `OpenContainer`. `lenient`: the decoder may conceal damage. `hwaccel`: PyAV's `HWAccel` for a
        decoder in hardware.
        """
        self._video, self._limits, self._table = video, limits, table
        self._deinterlace, self._lenient, self._hwaccel = deinterlace, lenient, hwaccel
        self.damaged = DamagedFrames(table, REACH if deinterlace else 0)
        points = table.points
        self._exact = np.flatnonzero(points.exact)  # points where decoding may begin
        self._exact_frames = points.frames[self._exact]
        self._is_exact_N, self._is_closed_N = np.zeros((2, len(table.frames_N)), bool)
        self._is_exact_N[points.packets[points.exact]] = True
        self._is_closed_N[points.packets[points.closed]] = True
        self._is_point_N = np.zeros(len(table.frames_N) + 1, bool)
        self._is_point_N[points.packets] = True
        self._seekable = table.seekable
        self._aspects: list[tuple[int, Fraction | None]] = []  # first frame, and the sample aspect ratio from there on
        self.decoded = 0
        self.position = self._counter = -1
        self._restart()

    def _restart(self) -> None:
        self.opened = OpenContainer(self._video, self._limits, self._hwaccel)
        context = self.opened.stream.codec_context
        codec = context.codec.canonical_name
        self._gives_each = codec in ALWAYS_GIVES
        self.strict = codec in STRICT and not self._lenient
        if self.strict:
            context.options = {**context.options, "err_detect": "explode"}
        self._packets = self.opened.container.demux(self.opened.stream)
        self._drain: _Drain | None = _Drain(context)
        self._next_packet = 0  # place in the stream of the next packet
        self._begin()
        self._floor = self._table.begins_at or 0

    def _begin(self) -> None:
        """Resets the state for a codec that holds no packet."""
        self._known: deque[tuple[int, Any]] = deque()  # index and frame, ready to be returned
        self._held: deque[tuple[int, Any]] = deque()  # packet and frame, in order of display
        self._inside: set[int] = set()  # packets in the codec whose frames have not come out
        self._floor = 0  # frames before it are not expected: they depend on packets before the beginning
        self._filter = Deinterlacer(self.opened.stream) if self._deinterlace else None
        self._refused = False  # the decoder has refused a packet, and may have lost frames with it

    def next(self) -> tuple[int, Any] | None:
        """The next index and frame; None at the end.

        A frame is returned once all packets before its own have given theirs, or never will. Only then its index and its damage are known.

        Raises:
            DamagedInput: `corrupt_stream` where the container breaks, `decoder_memory`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        while not self._known:
            packet = self._read()
            if packet is None:
                self._give_up(len(self._table.frames_N))
                self._settle()
                break
            for frame in self._decode(packet):
                self._take(frame)
            if packet.size == 0 and packet.dts is None:  # the decoder has been emptied
                self._give_up(len(self._table.frames_N))
            if len(self._held) > MOST_HELD:
                self._give_up(self._held[0][0])
            self._settle()
        if not self._known:
            return None
        index, frame = self._known.popleft()
        self.position = index
        return index, frame

    def _take(self, frame: Any) -> None:
        """Records the packet of a decoded frame, and whether it is damaged."""
        place = self._place(frame)
        if self._table.frames_N[place] < 0:
            return
        if self._is_exact_N[place]:
            self._give_up(place)
        self._inside.discard(place)
        if frame.is_corrupt:
            self.damaged.concealed(place)
        self._held.append((place, frame))

    def _give_up(self, place: int) -> None:
        """Packets before `place` that have not given their frames never will."""
        lost = {other for other in self._inside if other < place}
        self._inside -= lost
        if lost and (self.gives_each or self._refused):
            self.damaged.lost(min(lost))

    def deinterlace(self) -> None:
        """Goes back to the beginning, with deinterlacing. Raises as `OpenContainer`."""
        self.opened.close()
        self._deinterlace, self._aspects = True, []
        self.damaged = DamagedFrames(self._table, REACH)
        self.position = self._counter = -1
        self._restart()

    @property
    def deinterlaces(self) -> bool:
        """Whether interlaced frames are deinterlaced."""
        return self._deinterlace

    def aspect(self, index: int) -> Fraction | None:
        """Sample aspect ratio of frame `index` in the codec's headers, of a frame that was returned; None if it has none.

        PyAV 18.1 does not give that of a frame. The decoder's is that of the packet it decodes, a few frames later.
        """
        return next((ratio for first, ratio in reversed(self._aspects) if first <= index), None)

    def _note_aspect(self, place: int) -> None:
        ratio = sane_aspect(self.opened.stream.codec_context.sample_aspect_ratio)
        if not self._aspects:
            self._aspects.append((0, ratio))
        elif self._aspects[-1][1] != ratio:
            frames = self._table.frames_N[place:]
            self._aspects.append((int(frames[int(np.argmax(frames >= 0))]), ratio))

    def _settle(self) -> None:
        """Gives indices to the held frames before which none is missing, in the order they came out, not in that of their times."""
        earliest = min(self._inside, default=len(self._table.frames_N))
        settled = []
        while self._held and self._held[0][0] < earliest:
            settled.append(self._held.popleft())
        if self._table.counted:
            for place, frame in settled:
                self._counter = int(self._table.frames_N[place]) if self._is_exact_N[place] else self._counter + 1
                self._known.append((self._counter, frame))
            return
        # Some muxers write decode times as presentation times: the same times in another order.
        indices = sorted(int(self._table.frames_N[place]) for place, _ in settled)
        self._known.extend((index, frame) for index, (_, frame) in zip(indices, settled, strict=True))

    @property
    def gives_each(self) -> bool:
        """Whether each packet gives a frame if nothing is damaged; see `ALWAYS_GIVES`."""
        return self._gives_each and not self._table.counted

    def jump(self, index: int) -> bool:
        """Moves to the last exact point up to frame `index`, if that skips enough frames. Returns whether it moved.

        Raises:
            DamagedInput: `corrupt_stream`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        points = self._table.points
        latest = index - (REACH if self._deinterlace else 0)
        before = int(np.searchsorted(self._exact_frames, latest, side="right"))
        at = int(self._exact[before - 1]) if before else -1
        if at < 0 or points.frames[at] - self.position <= SEEK_FRAMES or points.packets[at] < self._next_packet:
            return False
        with damage("corrupt_stream", f"seeking to frame {index}", self.position + 1, file=self.opened.file):
            first = self._seek(at) if self._seekable else None
        if first is None:
            first = self._skip(int(points.packets[at]))
        if first is not None:
            self._begin()
            self._floor = int(points.frames[at])
            self._counter = self._floor - 1
            for frame in self._decode(first):
                self._take(frame)
        return True

    def close(self) -> None:
        """Releases libav's memory; safe to call twice."""
        self._held.clear()
        self._known.clear()
        self._filter = None
        self.opened.close()

    def _seek(self, at: int) -> Any | None:
        """The packet of point `at`, found by its time. None if it is not found; then the stream is at its beginning."""
        points = self._table.points
        pts, dts, pos = int(points.pts[at]), int(points.dts[at]), int(points.pos[at])
        size = int(self._table.sizes_N[points.packets[at]])
        # By decode time: MPEG-TS searches by it. An index of presentation times leads to an earlier place at worst.
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
        # The demuxer cannot find a keyframe that it has listed: no further seek is tried.
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
        """The next packet, including the one that flushes the codec; None at the end."""
        if self._table.missing and self._next_packet >= len(self._table.sizes_N):
            # The container breaks here: the frames in the decoder are shown, as at the end of a file.
            drain, self._drain = self._drain, None
            return drain
        file = self.opened.file
        with damage("corrupt_stream", f"reading on after frame {self.position}", self.position + 1, file=file):
            packet = next(self._packets, None)
            file.check()  # a packet that a failed read cut short must not become a frame
        if packet is not None and packet.size:
            sizes = self._table.sizes_N
            if self._next_packet >= len(sizes) or sizes[self._next_packet] != packet.size:
                message = f"packet {self._next_packet} is not the one that was there when the file was read first"
                raise DamagedInput("corrupt_stream", message, frames_recovered=self.position + 1, stage="decode")
            self._next_packet += 1
        return packet

    def _decode(self, packet: Any) -> list[Any]:
        """The frames that leave the codec when `packet` goes in."""
        if packet.size == 0 and packet.dts is not None:
            return []  # AVI: repeat the last picture
        flush, place = packet.size == 0, self._next_packet - 1
        frames: list[Any] = []
        if not flush:
            if self._is_closed_N[place] and (self.damaged.first is not None or self._limits.damage == "warn"):
                frames = self._renew()  # damage in the decoder's state ends here, as it does after a jump
            # Just before a point the flag may mean the next group, since libav sets it early; the decoder finds damage by itself.
            if packet.is_corrupt and not (
                self._is_point_N[place + 1 : place + 3].any() or near(place, self._table.breaks)
            ):
                self.damaged.concealed(place)
            packet.pts, packet.dts = place, None
            if place < len(self._table.frames_N) and self._table.frames_N[place] >= self._floor:
                self._inside.add(place)
        try:
            frames += packet.decode()
        except MemoryError:
            with damage("decoder_memory", f"decoding after frame {self.position}", self.position + 1):
                raise
        except LIBAV_ERRORS as error:
            if self._table.frames_N[place] != NO_PICTURE:
                self.damaged.undecodable(place, error)
                self._inside.discard(place)
                self._refused = True
        if not flush:
            self._note_aspect(place)
        self.decoded += len(frames)
        if self._filter is None:
            return frames
        filtered = [ready for frame in frames for ready in self._filter.push(frame)]
        return filtered + self._filter.push(None) if flush else filtered

    def _renew(self) -> list[Any]:
        """The frames still in the decoder, which is empty afterwards."""
        context = self.opened.stream.codec_context
        try:
            frames = context.decode(None)
        except LIBAV_ERRORS:
            frames = []
        context.flush_buffers()
        return list(frames)

    def _place(self, frame: Any) -> int:
        """The packet of a frame. Frames of a decoder that sets no time are in the order of their packets."""
        if frame.pts is None:
            place = min(self._inside, default=self._next_packet - 1)
        else:
            place = self._filter.stamp(frame) if self._filter is not None else int(frame.pts)
        return min(max(place, 0), len(self._table.frames_N) - 1)


class _Drain:
    """Substitute for libav's packet that empties a decoder."""

    size, pts, dts, is_keyframe = 0, None, None, False

    def __init__(self, context: Any) -> None:
        self._context = context

    def decode(self) -> list[Any]:
        """The frames still in the decoder."""
        return list(self._context.decode(None))
