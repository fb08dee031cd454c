"""Encoded bytes become frames on screen. Enters: bytes or a local path, the job's limits. Leaves: `Video`.

    packets (times, no decoding) -> first frame (rotation, tags, interlacing) -> Video.frames(indices) -> planes

A frame is named by its index among the shown frames. What is on screen at index i is the last decoded frame not after
its time, as a player shows it. Single-threaded: parallelism is over videos. Raises `BadDataError`, or the storage's error
where the file itself cannot be read, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.decode.colour_tags import Colour, made_of_rgb, resolve
from pipeline.decode.container import OpenContainer, damage, measure
from pipeline.decode.cropping import Cropper
from pipeline.decode.frame_stream import FrameStream
from pipeline.decode.orientation import Orientation
from pipeline.decode.packets import PacketTable, read_packets
from pipeline.decode.planes import Geometry, Scaler
from pipeline.decode.refusals import explained, naming_errors, only_named_errors, refuse_encrypted, refuse_still
from pipeline.errors import DamagedInput, PolicyReject
from pipeline.records import VideoInfo

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig

LOST_FRAMES = 2  # a player repeats a frame over such a hole; more is damage
ASPECT_TOLERANCE = 0.03
FIELD_ORDERS = range(2, 6)  # libav's tt, bb, tb, bt
SANE_ASPECT = 16.0  # a sample aspect ratio beyond this (or its inverse) is a broken header


@dataclass(frozen=True, slots=True)
class Shown:
    """A frame on screen: `index` among the shown frames of its video."""

    index: int
    frame: Any
    scaler: Scaler

    def write(self, out_3HW: np.ndarray, geometry: Geometry) -> None:
        """Fills `out_3HW` (uint8) with the frame's limited-range Y, U, V planes.

        Raises:
            DamagedInput: `corrupt_stream`, `decoder_fault`, `decoder_memory`.
            PolicyReject: `pixel_format`.
        """
        with only_named_errors("scaling a frame"):
            self.scaler.write(self.frame, geometry, out_3HW)


def open_video(video: bytes | str, limits: DecodeConfig) -> Video:
    """Opens a video, lists its times and decodes its first frame (rotation and interlacing are told nowhere else).

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


def _open(video: bytes | str, limits: DecodeConfig, content_hash: str) -> Video:
    opened = OpenContainer(video, limits)
    try:
        table = read_packets(opened, limits)
    finally:
        opened.close()
    # Opened anew instead of rewound: not every format can seek to its beginning, and opening takes 2 ms.
    stream = FrameStream(video, limits, table)
    try:
        index, frame = _first(stream)
        interlaced = _is_interlaced(stream, frame)
        if interlaced and limits.interlaced == "deinterlace":
            stream.close()
            stream = FrameStream(video, limits, table, deinterlace=True)
            index, frame = _first(stream)
        return Video(stream, table, index, frame, interlaced, content_hash, limits)
    except BaseException:
        stream.close()
        raise


def _first(stream: FrameStream) -> tuple[int, Any]:
    try:
        first = stream.next()
        while first is not None and first[0] < 0:
            first = stream.next()
    except DamagedInput as error:
        if error.reason == "corrupt_stream":
            raise DamagedInput("undecodable", f"no frame can be decoded: {error.message}", stage="decode") from None
        raise
    if first is None:
        raise DamagedInput("undecodable", "no packet of the video stream gives a frame", stage="decode")
    return first


def _is_interlaced(stream: FrameStream, frame: Any) -> bool:
    return bool(frame.interlaced_frame) or stream.opened.stream.codec_context.field_order in FIELD_ORDERS


class Video:
    """An open video. `times_s` float64: seconds of each shown frame from the first one; `end_s`: when the last one
    ends.
    """

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
        """Takes over `stream`, which has just given `first` at `index` of `table`; see `open_video`."""
        context = stream.opened.stream.codec_context
        with damage("undecodable", "reading the first frame's orientation"):
            orientation = Orientation.of(first)
        colour = resolve(
            _first_tag(first.colorspace, context.colorspace),
            _first_tag(first.color_range, context.color_range, unknown=0),
            _first_tag(first.color_trc, context.color_trc),
            first.height,
            made_of_rgb(first.format),
            limits.untagged_matrix,
        )
        decisions = _apply_policies(colour, interlaced, limits)
        self._stream, self._table = stream, table
        self._offset = index  # listed frames before the first that can be decoded are not shown
        self._coded = first.width, first.height
        shown_size, cropper, cropped = _crop(stream.opened, first)
        self._scaler = Scaler(orientation, colour.transfer, cropper)
        self._pending: Shown | None = Shown(0, first, self._scaler)
        self.times_s = table.times_s[index:] - table.times_s[index]
        self.end_s = table.end_s - float(table.times_s[index])
        width, height, aspect = _display_size(stream.opened.stream, shown_size, orientation)
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
        return self._stream.decoded

    @property
    def incomplete(self) -> str:
        """What the container lacks of its frames, in words; empty when nothing is known to be missing."""
        return self._table.missing

    @naming_errors("decoding frames")
    def frames(self, wanted: Iterable[int]) -> Iterator[Shown]:
        """What is on screen at each index of `wanted`, which ascends. Reads the stream once, so it may be called once.

        Jumps ahead where a keyframe allows it exactly; the pixels are those of a decode from the beginning.

        Raises:
            DamagedInput: `corrupt_stream` where the stream breaks, `ended_early` where it holds fewer frames than its
                packets say; `decoder_fault`, `decoder_memory`.
            PolicyReject: `size_changed`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        current: Shown | None = None
        coming, self._pending = self._pending, None
        for index in wanted:
            while current is None or current.index < index:
                if coming is None:
                    if self._stream.jump(index + self._offset):
                        current = None
                    coming = self._next()
                if coming is None or coming.index > index:
                    break
                current, coming = coming, None
            if current is None or index - current.index > LOST_FRAMES:
                raise self._lost(index, coming)
            yield current

    def close(self) -> None:
        """Releases libav's memory; safe to call twice."""
        self._pending = None
        self._stream.close()

    def _next(self) -> Shown | None:
        while (item := self._stream.next()) is not None:
            index, frame = item
            self._check_shape(frame)
            if index >= self._offset:
                return Shown(index - self._offset, frame, self._scaler)
        return None

    def _check_shape(self, frame: Any) -> None:
        width, height = self._coded
        if abs(frame.width * height / (frame.height * width) - 1) > ASPECT_TOLERANCE:
            message = f"frames change shape from {width}x{height} to {frame.width}x{frame.height} inside the video"
            raise PolicyReject("size_changed", message, stage="decode")

    def _lost(self, index: int, coming: Shown | None) -> DamagedInput:
        last = self._stream.position - self._offset
        if coming is None:
            message = f"the stream ends after frame {last} of {len(self.times_s)}; frame {index} was wanted"
            return DamagedInput("ended_early", message, frames_recovered=last + 1, stage="decode")
        message = f"the decoder gave nothing for frame {index}; the next it gave is frame {coming.index}"
        return DamagedInput("corrupt_stream", message, frames_recovered=index, stage="decode")


def _first_tag(frame_tag: int, context_tag: int, unknown: int = 2) -> int:
    """The frame's tag, or the stream's where the frame has none (2 is "unspecified" in H.273; 0 for the range)."""
    return int(context_tag) if int(frame_tag) == unknown else int(frame_tag)


def _apply_policies(colour: Colour, interlaced: bool, limits: DecodeConfig) -> list[str]:
    decisions = []
    if colour.transfer != "sdr":
        if limits.hdr == "reject":
            raise PolicyReject(
                "hdr", f"{colour.transfer.upper()} video; decode.hdr=convert would tone-map it", stage="decode"
            )
        decisions.append("tonemapped")
    if interlaced:
        if limits.interlaced == "reject":
            message = "interlaced video; decode.interlaced=deinterlace or keep would take it"
            raise PolicyReject("interlaced", message, stage="decode")
        decisions.append("deinterlaced" if limits.interlaced == "deinterlace" else "interlaced_kept")
    return decisions


def _crop(opened: OpenContainer, frame: Any) -> tuple[tuple[int, int], Cropper | None, tuple[str, ...]]:
    """Width and height that the container leaves of `frame`, what cuts it, and the warning."""
    margins = opened.margins()
    if margins is None:
        return (frame.width, frame.height), None, ()
    window = margins.window(frame)
    if window is None:
        return (frame.width, frame.height), None, (f"bad_crop:{margins}",)
    return (window.width, window.height), Cropper(margins, frame), (f"cropped:{window}",)


def _display_size(stream: Any, size: tuple[int, int], orientation: Orientation) -> tuple[int, int, tuple[int, int]]:
    """Width and height as shown of a stored picture of `size`, and the sample aspect ratio that was applied."""
    with damage("undecodable", "reading the sample aspect ratio"):
        ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    numerator, denominator = (ratio.numerator, ratio.denominator) if ratio else (1, 1)
    if numerator <= 0 or denominator <= 0 or not 1 / SANE_ASPECT <= numerator / denominator <= SANE_ASPECT:
        numerator = denominator = 1
    width, height = max(1, round(size[0] * numerator / denominator)), size[1]
    if orientation.transpose:
        width, height = height, width
    return width, height, (numerator, denominator)
