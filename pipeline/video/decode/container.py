"""An open container with its video stream; no frame is decoded. Part of the decode package.

Takes encoded bytes or a local path, and the job's limits. Only self-contained formats are probed and no protocol may be opened: a playlist
named like a video cannot reach another file or the network. Every error of libav becomes a `BadDataError`, or an error of the storage if
the file could not be read.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import av
import av.error

from pipeline.errors import DamagedInput, PolicyReject
from pipeline.records import video_counts
from pipeline.video.decode.cropping import Margins, container_margins
from pipeline.video.decode.description import count_videos, dolby_vision
from pipeline.video.decode.encoded_file import open_encoded, storage_error
from pipeline.video.decode.matroska_crop import PatchedFile, hide_impossible_crops
from pipeline.video.decode.read_mark import READING
from pipeline.video.decode.stream_choice import MOVING_PACKETS, choose, count_packets

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.video.decode.encoded_file import EncodedFile

# Containers and raw streams that hold video and name no other file: no hls, dash, concat, image sequences, subtitles.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,flv,live_flv,asf,ogg,gif,apng,h264,hevc,vvc,av1,obu,ivf,yuv4mpegpipe,mxf,nut,dv,"
    "gxf,rm,wtv,mjpeg,mjpeg_2000,h263,vc1,cavsvideo,dirac,nsv"
)
HEADERLESS = ("mpegts", "mpeg", "flv")  # libav adds their streams when it meets them
DOLBY_VISION_CODECS = ("hevc", "av1")  # in H.264 it always has a compatible base layer
IO_BYTES = 256 * 1024  # PyAV's default of 32 kB means a call into Python for every 32 kB

# What PyAV raises on broken input besides its own errors: ValueError and ArithmeticError from headers, OSError from the file.
LIBAV_ERRORS = (av.error.FFmpegError, ValueError, ArithmeticError, LookupError, OSError, RuntimeError)


@contextmanager
def damage(
    reason: str, doing: str, frames_recovered: int = 0, *, file: EncodedFile | PatchedFile | None = None
) -> Iterator[None]:
    """Turns any error of libav in the block into `DamagedInput(reason)`. `file`: the one that libav reads in the block, if any.

    Raises:
        DamagedInput: `no_decoder`, `decoder_memory` or `reason`.
        StorageUnavailable, SourceChanged, SourceRefused: a read of `file` failed, even if libav hid it.
    """
    try:
        try:
            yield
        finally:
            if file is not None:
                file.check()
    except av.error.DecoderNotFoundError as error:
        message = f"no decoder for this codec while {doing}: {error_text(error)}"
        raise DamagedInput("no_decoder", message, stage="decode") from None
    except MemoryError:
        message = f"out of memory while {doing}; raise decode.memory_bytes, the limit of a decoder"
        raise DamagedInput("decoder_memory", message, frames_recovered=frames_recovered, stage="decode") from None
    except LIBAV_ERRORS as error:
        message = f"libav failed while {doing}: {error_text(error)}"
        raise DamagedInput(reason, message, frames_recovered=frames_recovered, stage="decode") from None


def error_text(error: BaseException) -> str:
    """The text of an error of libav, on one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


def measure(video: bytes | str, limits: DecodeConfig) -> str:
    """Checks the size and returns the BLAKE2b-128 of the encoded bytes, in hex.

    Raises:
        PolicyReject: `too_large`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(video, bytes):
        _check_size(len(video), limits)
        digest.update(video)
        return digest.hexdigest()
    try:
        with READING:
            size = os.stat(video).st_size
    except OSError as error:
        raise storage_error(error, video) from None
    _check_size(size, limits)
    with closing(open_encoded(video)) as file:
        while block := file.read(1 << 20):
            digest.update(block)
        file.check()
    return digest.hexdigest()


def _check_size(num_bytes: int, limits: DecodeConfig) -> None:
    if num_bytes > limits.max_video_bytes:
        message = f"encoded file has {num_bytes} bytes, decode.max_video_bytes is {limits.max_video_bytes}"
        raise PolicyReject("too_large", message, stage="decode")


def _open(
    file: EncodedFile, limits: DecodeConfig, hwaccel: Any = None, **options: str
) -> tuple[Any, EncodedFile | PatchedFile]:
    """Container of libav, and the file that it reads: `file`, or a view of it without impossible cropping."""
    try:
        return _libav_open(file, limits, hwaccel, options), file
    except av.error.InvalidDataError:
        patched = hide_impossible_crops(file)
        if patched is None:
            raise
        return _libav_open(patched, limits, hwaccel, options), patched


def _libav_open(file: EncodedFile | PatchedFile, limits: DecodeConfig, hwaccel: Any, options: dict[str, str]) -> Any:
    return av.open(
        file,
        mode="r",
        # Passed on to the codecs that libav opens to probe its streams.
        options={"max_pixels": str(limits.max_pixels)},
        container_options={"format_whitelist": FORMATS, "protocol_whitelist": "none", **options},
        metadata_errors="replace",
        buffer_size=IO_BYTES,
        hwaccel=hwaccel,
    )


class OpenContainer:
    """An open container and one of its video streams, set to decode in one thread.

    `others` are its other video streams that are not cover art, `warnings` are for the row.
    """

    def __init__(self, video: bytes | str, limits: DecodeConfig, hwaccel: Any = None) -> None:
        """Opens `video` and chooses its stream: libav's best one that is not a still picture or cover art. `hwaccel`: PyAV's `HWAccel`.

        Raises:
            DamagedInput: `undecodable`, `no_decoder`.
            PolicyReject: `no_video_stream`, `too_many_pixels`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        file = open_encoded(video)
        self._video, self._limits = video, limits
        self.file: EncodedFile | PatchedFile = file
        self.container: Any = None
        try:
            expected = "expected a video file: mp4, mkv, webm, avi, ts, …"
            with damage("undecodable", f"opening the container ({expected})", file=file):
                self.container, self.file = _open(file, limits, hwaccel)
            with damage("undecodable", "listing the streams"):
                self.stream, self.others = choose(
                    self.container, lambda indices: _count_packets(video, limits, indices)
                )
            self.warnings = ("bad_crop:impossible",) if isinstance(self.file, PatchedFile) else ()
            with damage("undecodable", "reading the stream's header"):
                self._prepare(limits)
        except BaseException:
            self.close()
            raise

    def _prepare(self, limits: DecodeConfig) -> None:
        context = self.stream.codec_context
        pixels = max(context.width * context.height, context.coded_width * context.coded_height)
        if pixels > limits.max_pixels:
            message = (
                f"frames of {context.width}x{context.height} are larger than decode.max_pixels {limits.max_pixels}"
            )
            video = video_counts(context.width, context.height)
            raise PolicyReject("too_many_pixels", message, stage="decode", video=video)
        # Videos are decoded in parallel. Threads inside one decoder are slower per core and have hung beside PyTorch (PyAV#1962).
        self.stream.thread_type = "NONE"
        context.thread_count = 1
        context.options = {"max_pixels": str(limits.max_pixels)}

    @property
    def format_name(self) -> str:
        """Name of the container format, as libav gives it."""
        return str(self.container.format.name)

    def extra_streams(self, packets: Counter[int]) -> int:
        """Number of further moving streams. `packets`: how many each stream of `others` has, by index.

        Called when all packets were read: a transport stream may list a stream only there.
        """
        listed = len(self.container.streams.video)
        late = count_videos(self.container) - listed if self.format_name in HEADERLESS else 0
        return sum(packets[stream.index] >= MOVING_PACKETS for stream in self.others) + max(0, late)

    def listed_without_edits(self) -> int:
        """Number of packets that the index of an mp4 or mov would have without its edit list. Opens the file once more."""
        with closing(open_encoded(self._video)) as file, damage("undecodable", "opening the container", file=file):
            container, _ = _open(file, self._limits, advanced_editlist="0")
            with container:
                return len(container.streams[self.stream.index].index_entries)

    def margins(self) -> Margins | None:
        """The cropping that the container has for its frames, if any."""
        with damage("undecodable", "reading the container's cropping"):
            return container_margins(self.container, self.stream.index)

    def dolby_vision(self) -> tuple[int, int] | None:
        """Profile and compatibility id of Dolby Vision; None if the container names none."""
        if self.stream.codec_context.codec.canonical_name not in DOLBY_VISION_CODECS:
            return None
        with damage("undecodable", "reading the container's description"):
            return dolby_vision(self.container, self.stream.index)

    def close(self) -> None:
        """Closes the container and its file; safe to call twice."""
        if self.container is not None:
            self.container.close()
        self.file.close()


def _count_packets(video: bytes | str, limits: DecodeConfig, indices: set[int]) -> Counter[int]:
    # In a container of its own: not every format can seek to its beginning.
    with closing(open_encoded(video)) as file:
        found: Counter[int] = Counter()
        with suppress(*LIBAV_ERRORS):  # a break here is found again when packets are listed
            container, _ = _open(file, limits)
            with container:
                count_packets(container, indices, found)
        file.check()
        return found
