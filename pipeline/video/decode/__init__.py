"""Decoding by libav: encoded bytes or a local path become a `Video`, whose frames become uint8 YUV planes.

    packets (times, no decoding) -> first frame (rotation, tags, interlacing) -> Video.show(index) -> planes

A frame has an index among the shown frames. The frame on screen at index i is the last decoded one that is not later than time i, as
in a player. Single-threaded: videos are decoded in parallel, not frames. Raises only `BadDataError`, or the storage's error if the
file cannot be read.

- `encoded_file`, `read_mark`: the bytes as a file for libav; whether a decoder is inside a read
- `container`, `stream_choice`, `description`: opening a container and choosing its video stream; what libav says of it
- `encryption`, `lookalikes`, `refusals`: why a video cannot be opened
- `ebml`, `matroska_crop`: Matroska elements; Matroska files that libav refuses
- `packets`, `packet_table`, `clock`, `bitstream`, `h264_pictures`: which frame each packet shows, and when
- `frame_stream`, `damaged`: decoded frames in order; which are damaged
- `beginning`, `hardware`: where a video begins; videos that a GPU decodes
- `deinterlacer`, `filtering`, `orientation`, `cropping`: filters
- `planes`, `colour_tags`, `tonemap`: planes of the bucket's size; colour
- `changes`: frames that differ from the first one
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import BadDataError, DamagedInput, PolicyReject
from pipeline.records import VideoInfo, video_counts
from pipeline.video.decode.beginning import begin, is_interlaced
from pipeline.video.decode.changes import FirstFrame, apply_policies, first_colour, interlaced_reject
from pipeline.video.decode.container import OpenContainer, damage, measure
from pipeline.video.decode.cropping import Cropper
from pipeline.video.decode.frame_stream import FrameStream
from pipeline.video.decode.hardware import HardwareDecoder, installed, unsuited
from pipeline.video.decode.orientation import Orientation, display_size
from pipeline.video.decode.packet_table import PacketTable
from pipeline.video.decode.packets import read_packets
from pipeline.video.decode.planes import FrameScaler, Geometry, Scaler
from pipeline.video.decode.refusals import explained, only_named_errors, refuse_encrypted, refuse_still

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

LOST_FRAMES = 2  # missing frames over which a player repeats the one before; more are damage


@dataclass(frozen=True, slots=True)
class Shown:
    """A frame on screen: libav's frame with its index among the shown frames.

    `damaged`: why it is not intact, as text. `size`: height and width as displayed, if they are not those of the video. `refusal`: why it
    may not be used, beside the first frame.
    """

    index: int
    frame: Any
    scaler: FrameScaler
    damaged: str | None = None
    size: tuple[int, int] | None = None
    refusal: PolicyReject | None = None

    def write(self, out_3HW: np.ndarray, geometry: Geometry) -> None:
        """Fills `out_3HW` (uint8) with the frame's limited-range Y, U, V planes.

        Raises:
            DamagedInput: `corrupt_stream`, `decoder_fault`, `decoder_memory`.
            PolicyReject: `pixel_format`, `size_changed`.
        """
        wanted = geometry.scaled_height, geometry.scaled_width
        if self.size is not None and not geometry.enlarge and any(np.less(self.size, wanted)):
            shown, scaled = ("x".join(map(str, size)) for size in (self.size, wanted))
            message = f"frames shrink to {shown} inside the video and would have to be enlarged to {scaled}; set clips.upscale to allow it"
            raise PolicyReject("size_changed", message, stage="decode")
        with only_named_errors("scaling a frame"):
            self.scaler.write(self.frame, geometry, out_3HW)


def open_video(video: bytes | str, limits: DecodeConfig) -> Video:
    """Opens a video, lists its times and decodes its first frame, which alone has the rotation and interlacing.

    Raises:
        DamagedInput: `undecodable`, `not_a_video`, `no_decoder`, `truncated`, `corrupt_stream`, `decoder_memory`, `decoder_fault`.
        PolicyReject: `encrypted`, `still_image`, `no_video_stream`, `no_frames`, `unsupported_format`, `too_large`, `too_many_pixels`,
            `too_many_frames`, `too_long`, `hdr`, `interlaced`, `color_matrix`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    content_hash = measure(video, limits)
    with explained(video):
        refuse_encrypted(video)
        opened = _open(video, limits, content_hash)
        try:
            refuse_still(video, opened.info.num_frames)
        except BaseException:
            opened.close()
            raise
        return opened


def open_again(video: bytes | str, limits: DecodeConfig, content_hash: str) -> Video:
    """Opens a video that `open_video` has opened and whose hash is known, to read its frames from the start. Raises as `open_video`."""
    with explained(video):
        return _open(video, limits, content_hash)


def _open(video: bytes | str, limits: DecodeConfig, content_hash: str) -> Video:
    opened = OpenContainer(video, limits)
    try:
        width, height = opened.stream.codec_context.width, opened.stream.codec_context.height
        table = read_packets(opened, limits)
    finally:
        opened.close()
    try:
        return _open_listed(video, limits, table, content_hash)
    except BadDataError as error:
        # As stored: what display changes is known only from a decoded frame.
        error.video = error.video or video_counts(width, height, table.end_s - float(table.times_s[0]))
        raise


def _open_listed(video: bytes | str, limits: DecodeConfig, table: PacketTable, content_hash: str) -> Video:
    stream, first, warnings = begin(video, limits, table, deinterlace=False)
    try:
        interlaced = is_interlaced(stream, first[1])
        if interlaced and limits.interlaced == "deinterlace":
            stream.close()
            stream, first, warnings = begin(video, limits, table, deinterlace=True)
        table = replace(table, warnings=(*table.warnings, *warnings))
        found = Video(stream, table, *first, interlaced, content_hash, limits)
        if limits.device == "cuda":
            found.use_hardware(installed(), video, limits)
        return found
    except BaseException:
        stream.close()
        raise


class Video:
    """An open video. `times_s` (float64) has the time of each shown frame from the first one, `end_s` the end of the last, in seconds."""

    def __init__(
        self,
        stream: FrameStream,
        table: PacketTable,
        index: int,
        first: Any,
        interlaced: bool,
        content_hash: str,
        limits: DecodeConfig,
    ) -> None:
        """Takes over `stream`, which has just given `first`. The video begins at frame `index` of `table`; see `open_video`."""
        context = stream.opened.stream.codec_context
        with damage("undecodable", "reading the first frame's orientation"):
            orientation = Orientation.of(first)
        colour = first_colour(first, stream.opened, limits)
        decisions = apply_policies(colour, interlaced, limits)
        self._stream, self._table, self._decoded = stream, table, 0
        self._hardware: HardwareDecoder | None = None
        self._offset = index  # frames of the table before the first that can be decoded; they are not shown
        shown_size, cropper, cropped = _crop(stream.opened, first)
        self._orientation = orientation
        self._scaler: FrameScaler = Scaler(orientation, colour.transfer, cropper)
        self._current: Shown | None = None
        self._coming: Shown | None = Shown(stream.position - index, first, self._scaler)
        self._broken: DamagedInput | None = None
        self._unsuited = unsuited(
            str(context.codec.canonical_name),
            first,
            interlaced=interlaced,
            transfer=colour.transfer,
            cropped=cropper is not None,
            late=stream.position != index,
            limits=limits,
        )
        self._keep_damaged = limits.damage == "warn"
        self.times_s = table.times_s[index:] - table.times_s[index]
        self.end_s = table.end_s - float(table.times_s[index])
        width, height, aspect = display_size(stream.opened.stream, shown_size, orientation)
        coded_aspect = stream.aspect(stream.position) or Fraction(1)
        follows_codec = coded_aspect == Fraction(*aspect)
        self._first = FirstFrame(first.width, first.height, coded_aspect if follows_codec else None, colour)
        self._interlaced = limits.interlaced
        if orientation.mirrored:
            decisions.append("mirrored")
        self.info = VideoInfo(
            codec=str(context.codec.canonical_name),
            pixel_format=str(first.format.name),
            width=width,
            height=height,
            coded_width=first.width,
            coded_height=first.height,
            rotation=orientation.rotation,
            sample_aspect=aspect,
            fps=round(len(self.times_s) / self.end_s, 6),
            num_frames=len(self.times_s),
            duration_s=round(self.end_s, 6),
            color_matrix=colour.matrix if colour.transfer == "sdr" else "bt709",
            color_range=colour.range,
            content_hash=content_hash,
            warnings=(*stream.opened.warnings, *table.warnings, *cropped, *colour.warnings, *decisions),
        )

    @property
    def frames_decoded(self) -> int:
        """Frames that have left the codec."""
        return self._decoded + self._stream.decoded

    @property
    def incomplete(self) -> str:
        """Which frames the container lacks, as text; empty if none is known to be missing."""
        return self._table.missing

    def planes(self, indices: np.ndarray, geometry: Geometry) -> np.ndarray:
        """Limited-range Y, U, V planes `(T, 3, H, W)`, uint8, of the frames at `indices`, which ascend and may repeat.

        Raises:
            DamagedInput, PolicyReject, StorageUnavailable, SourceChanged, SourceRefused: as `show` and `Shown.write`.
        """
        planes_T3HW = np.empty((len(indices), 3, geometry.height, geometry.width), np.uint8)
        previous = -1
        for row, index in enumerate(indices.tolist()):
            if index == previous:
                planes_T3HW[row] = planes_T3HW[row - 1]
            else:
                self.show(index).write(planes_T3HW[row], geometry)
                previous = index
        return planes_T3HW

    def use_hardware(self, decoder: HardwareDecoder, video: bytes | str, limits: DecodeConfig) -> None:
        """Goes on with the frames of `decoder`, if it takes this video and its first frame has the same pixels. Called before `show`.

        The last warning of `info` says which decoder it is: `nvdec`, or `not_nvdec` with the reason. Raises what the file raises.
        """
        why = self._unsuited or self._move_to(decoder, video, limits)
        warnings = list(self.info.warnings)
        warnings.append(f"not_nvdec:{why}" if why else "nvdec")
        self.info = replace(self.info, warnings=tuple(warnings))

    def _move_to(self, decoder: HardwareDecoder, video: bytes | str, limits: DecodeConfig) -> str:
        """Replaces the stream by one of the hardware. Returns why not, as a slug; empty if it did."""
        first, stream = self._coming, None
        assert first is not None  # noqa: S101 - `show` was not called yet
        try:
            stream = decoder.stream(video, limits, self._table)
            other = self._first_of(stream, decoder, first.frame)
            same = other is not None and decoder.same_pixels(first.frame, other.frame)
        except BadDataError:
            other, same = None, False
        except BaseException:
            if stream is not None:
                stream.close()
            raise
        if other is None or not same or stream is None:
            if stream is not None:
                stream.close()
            return "refused" if other is None else "other_pixels"
        self._software = self._scaler, partial(FrameStream, video, limits, self._table)
        self._replace_stream(stream, other.scaler)
        self._hardware, self._coming = decoder, other
        return ""

    def _first_of(self, stream: FrameStream, decoder: HardwareDecoder, first: Any) -> Shown | None:
        """The first frame of a stream of the hardware; None if it is another one than libav's `first`, or cannot be scaled there."""
        item = stream.next()
        while item is not None and item[0] < self._offset:
            item = stream.next()
        if item is None or item[0] != self._offset or stream.damaged.why(self._offset) or not decoder.takes(item[1]):
            return None
        scaler = decoder.scaler(self._orientation, first)
        return None if scaler is None else Shown(0, item[1], scaler)

    def _replace_stream(self, stream: FrameStream, scaler: FrameScaler) -> None:
        self._decoded += self._stream.decoded
        self._stream.close()
        self._stream, self._scaler = stream, scaler
        self._current = self._coming = self._broken = None

    @only_named_errors("decoding a frame")
    def show(self, index: int) -> Shown:
        """The frame on screen at `index`, which must not be smaller than in the calls before.

        Jumps ahead to a keyframe only if the pixels are the same as without the jump. After an error, later frames can still be asked for.

        Raises:
            DamagedInput: `corrupt_stream` if the stream breaks or the frame is damaged (with `decode.damage` "warn" it is returned as the
                decoder concealed it, or the frame before it), `ended_early` if the stream has fewer frames than its packets say,
                `decoder_fault`, `decoder_memory`.
            PolicyReject: `size_changed`, `color_changed`, `color_matrix`, `interlaced`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        if self._hardware is not None:
            try:
                shown = self._show(index)
                if shown.damaged is None and shown.refusal is None:
                    return shown
            except BadDataError:
                pass
            # libav decides what is damaged, and how it looks. The frames so far have the same pixels as its own.
            scaler, restart = self._software
            self._replace_stream(restart(), scaler)
            self._hardware = None
        shown = self._show(index)
        if shown.refusal is not None:  # raised here and not where it is read: a clip that passes over the frame stands
            raise shown.refusal
        return shown

    def _show(self, index: int) -> Shown:
        if self._broken is not None:
            raise self._broken
        while self._current is None or self._current.index < index:
            if self._coming is None:
                self._coming = self._read(index)
            if self._coming is None or self._coming.index > index:
                break
            self._current, self._coming = self._coming, None
        damaged = self._stream.damaged.why(index + self._offset)
        if damaged is not None:
            return self._show_damaged(index, damaged)
        if self._current is None or index - self._current.index > (0 if self._stream.gives_each else LOST_FRAMES):
            raise self._lost(index)
        return self._current

    def _show_damaged(self, index: int, why: str) -> Shown:
        shown = self._current
        # The frame before, but only of the same group of pictures: after a jump to this group there is no earlier one, and the result
        # must not depend on jumps.
        if shown is None or shown.index + self._offset < self._stream.damaged.group_of(index + self._offset):
            shown = self._coming or shown
        if self._keep_damaged and shown is not None:
            return replace(shown, damaged=why)
        raise DamagedInput("corrupt_stream", why, frames_recovered=index, stage="decode")

    def _read(self, index: int) -> Shown | None:
        """The next frame of the stream, after a jump towards `index` if that is shorter; None at the end."""
        try:
            if self._stream.jump(index + self._offset):
                self._current = None
            while (item := self._stream.next()) is not None:
                number, frame = item
                if self._hardware is not None and (
                    not self._hardware.takes(frame) or frame.interlaced_frame or not self._first.is_like(frame)
                ):
                    message = f"frame {number} is of another kind than the first one"
                    raise DamagedInput("corrupt_stream", message, stage="decode")  # `show` goes on without the hardware
                if number < self._offset:
                    continue
                if frame.interlaced_frame and self._interlaced == "deinterlace" and not self._stream.deinterlaces:
                    self._stream.deinterlace()  # progressive frames stay as they were
                    self._current = None
                    return self._read(index)
                return self._shown(number, frame)
        except DamagedInput as error:  # the container breaks, or memory ran out: no frame follows
            self._broken = error
            raise
        return None

    def close(self) -> None:
        """Releases libav's memory; safe to call twice."""
        self._current = self._coming = None
        self._stream.close()

    def _shown(self, number: int, frame: Any) -> Shown:
        """A frame of the stream, compared with the first one."""
        aspect, size = self._stream.aspect(number), None
        if (scale := self._first.scale(frame, aspect)) != (1, 1):
            x, y = reversed(scale) if self._orientation.transpose else scale
            size = round(self.info.height * y), round(self.info.width * x)
        refusal = self._first.refusal(frame, aspect)
        if frame.interlaced_frame and self._interlaced == "reject":
            refusal = interlaced_reject(f"frame {number} is interlaced")
        return Shown(number - self._offset, frame, self._scaler, size=size, refusal=refusal)

    def _lost(self, index: int) -> DamagedInput:
        last = self._stream.position - self._offset
        if self._coming is None:
            message = f"the stream ends after frame {last} of {len(self.times_s)}; frame {index} was wanted"
            return DamagedInput("ended_early", message, frames_recovered=last + 1, stage="decode")
        message = f"the decoder gave no frame {index}; the next one is frame {self._coming.index}"
        return DamagedInput("corrupt_stream", message, frames_recovered=index, stage="decode")


def _crop(opened: OpenContainer, frame: Any) -> tuple[tuple[int, int], Cropper | None, tuple[str, ...]]:
    """Width and height of `frame` after the container's cropping, the cropper if there is one, and warnings."""
    margins = opened.margins()
    if margins is None:
        return (frame.width, frame.height), None, ()
    window = margins.window(frame)
    if window is None:
        return (frame.width, frame.height), None, (f"bad_crop:{margins}",)
    return (window.width, window.height), Cropper(margins, frame), (f"cropped:{window}",)
