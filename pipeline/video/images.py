"""Images and animations that Pillow decodes, as videos of one or more frames, and the choice between Pillow and libav.

Takes the encoded bytes or a local path, gives what `cutting` needs of a `decode.Video`. A still image becomes the same limited-range BT.709
planes as a frame of lossless RGB video with these pixels. Contents decide, not names: a picture that moves is a video. Pillow decodes
animated WebP and AVIF, libav the other animations.
"""

from __future__ import annotations

import struct
import warnings as python_warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, features

from pipeline.errors import DamagedInput, LatheError, PolicyReject
from pipeline.records import IMAGE_EXTENSIONS, EncodedVideo, VideoInfo, video_counts
from pipeline.video.decode import Shown, Video, open_video
from pipeline.video.decode.container import measure
from pipeline.video.decode.encoded_file import open_encoded
from pipeline.video.decode.orientation import Orientation
from pipeline.video.decode.planes import Scaler, rgb_frame
from pipeline.video.decode.refusals import only_named_errors
from pipeline.video.image_colour import HEADER_BYTES, scale_transparent_value, srgb, transfer

if TYPE_CHECKING:
    from pipeline.config import DecodeConfig
    from pipeline.records import ImageRules
    from pipeline.video.decode.encoded_file import EncodedFile
    from pipeline.video.decode.planes import Geometry

IMAGES = 2
"""Version of the pixel path of images. Raised whenever a stored value of an image could change."""

# `decode.max_pixels` is checked before pixels are read. Pillow's own limit would refuse what the job allows.
Image.MAX_IMAGE_PIXELS = None

BY_LIBAV = ("GIF", "PNG")  # formats whose animations libav decodes
ANIMATED = ("WEBP", "AVIF")  # of AVIF, libav has transparency as a second video stream
ANNOUNCING = ("AVIF", "PNG")  # HDR, by `image_colour.transfer`
PAGED = ("TIFF", "MPO")
NO_DURATION_S = 0.1  # of a frame that states none, as browsers show it
ROUNDED_S = 0.0015  # times and durations of AVIF come in whole milliseconds
REFUSED_BY_LIBAV = ("still_image", "unsupported_format")
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
AVIF_BRANDS, FTYP_BYTES = (b"avif", b"avis"), 256
# EXIF orientation -> transpose, then flips.
ORIENTATIONS = {
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}
ORIENTATION_TAG = 0x0112
# What Pillow raises for broken files, besides MemoryError.
PILLOW_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError, struct.error,
)  # fmt: skip


def decoder_version() -> dict[str, Any]:
    """Versions that decide pixels of images, for the fingerprint."""
    libraries = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "webp", "avif", "littlecms2")}
    return {"images": IMAGES, "pillow": version("pillow"), **libraries}


def open_media(video: EncodedVideo, limits: DecodeConfig, images: ImageRules | None) -> Video | Pictures:
    """Opens a video, or with `images` also an image.

    Raises:
        DamagedInput, PolicyReject: as `decode.open_video`; `aspect_ratio`; `not_an_image` if the job encodes images alone.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    if images is None:
        return open_video(video.video, limits)
    opened: Video | Pictures | None = None
    if video.extension in IMAGE_EXTENSIONS or _is_avif(video.video):
        opened = open_pictures(video.video, limits, images)
    if opened is None:
        opened = _open_unless_still(video, limits, images)
    if images.policy == "only" and not opened.info.is_image:
        opened.close()
        raise PolicyReject("not_an_image", "it is a video or moves, and images.policy is only", stage="decode")
    return opened


def _is_avif(video: bytes | str) -> bool:
    with closing(open_encoded(video)) as file:
        head = file.read(FTYP_BYTES)
        file.check()
    return image_format(head) == "AVIF"


def _open_unless_still(video: EncodedVideo, limits: DecodeConfig, images: ImageRules) -> Video | Pictures:
    try:
        return open_video(video.video, limits)
    except PolicyReject as error:
        if error.reason not in REFUSED_BY_LIBAV or (opened := open_pictures(video.video, limits, images)) is None:
            raise
        return opened


def open_pictures(video: bytes | str, limits: DecodeConfig, images: ImageRules) -> Pictures | None:
    """An image, or an animation that Pillow decodes; None if it is neither.

    Raises:
        DamagedInput: `truncated`, `undecodable`, `no_decoder`, `decoder_memory`, `decoder_fault`.
        PolicyReject: `too_large`, `too_many_pixels`, `too_many_frames`, `too_long`, `aspect_ratio`, `hdr`, `pixel_format`.
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    with only_named_errors("opening the image"):
        file = open_encoded(video)
        try:
            head = file.read(HEADER_BYTES)
            file.check()
            if (format_ := image_format(head)) is None:
                file.close()
                return None
            content_hash = measure(video, limits)
            image = _opened(file, format_, limits)
            if format_ in BY_LIBAV and _frames(image, file) > 1:
                file.close()
                return None
            if format_ == "PNG":
                scale_transparent_value(image, head)
            if format_ in ANNOUNCING and (hdr := transfer(head)) is not None:
                size = video_counts(image.width, image.height)
                raise PolicyReject("hdr", f"the image is {hdr}; convert it to SDR", stage="decode", video=size)
            return Pictures(image, format_, file, content_hash, limits, images)
        except BaseException:
            file.close()
            raise


def image_format(head: bytes) -> str | None:
    """Pillow's name of the format of a file that begins with `head`; None if it is not an image that Lathe reads."""
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    brands = head[8 : int.from_bytes(head[:4], "big")]
    if head[4:8] == b"ftyp" and any(
        brands[at : at + 4] in AVIF_BRANDS for at in range(0, min(len(brands), FTYP_BYTES), 4)
    ):
        return "AVIF"
    return None


@contextmanager
def _damage(doing: str, file: EncodedFile) -> Iterator[None]:
    """Turns errors of Pillow into damage of the image, after those of the file. Python's warnings are left out: the row has ours.

    Raises:
        DamagedInput: `truncated`, `undecodable`, `decoder_memory`.
        StorageUnavailable, SourceChanged, SourceRefused: a read of `file` failed.
    """
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            try:
                yield
            finally:
                file.check()
    except LatheError:
        raise
    except MemoryError:
        message = f"out of memory while {doing}; raise decode.memory_bytes, the limit of a decoder"
        raise DamagedInput("decoder_memory", message, stage="decode") from None
    except PILLOW_ERRORS as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        if "truncated" in text.lower():
            raise DamagedInput("truncated", f"the image is cut short: {text}", stage="decode") from None
        raise DamagedInput("undecodable", f"Pillow failed while {doing}: {text}", stage="decode") from None


def _opened(file: EncodedFile, format_: str, limits: DecodeConfig) -> Image.Image:
    """The image without its pixels, not larger than the limits."""
    if format_ == "AVIF" and not features.check("avif"):
        message = f"Pillow {version('pillow')} was built without AVIF; install a Pillow that has it, such as the wheels of PyPI"
        raise DamagedInput("no_decoder", message, stage="decode")
    file.seek(0)
    with _damage("opening the image", file):
        image = Image.open(file, formats=[format_])  # type: ignore[arg-type]  # it needs read, seek and tell
    if image.width * image.height > limits.max_pixels:
        message = f"an image of {image.width}x{image.height} is larger than decode.max_pixels {limits.max_pixels}"
        video = video_counts(image.width, image.height)
        raise PolicyReject("too_many_pixels", message, stage="decode", video=video)
    return image


def _frames(image: Image.Image, file: EncodedFile) -> int:
    with _damage("counting frames", file):
        return int(getattr(image, "n_frames", 1))


class Pictures:
    """A still image or an animation, decoded by Pillow. It has what is used of a `decode.Video`.

    `times_s` (float64) has the time of each frame from the first one, `end_s` the end of the last, in seconds; both 0 for a still image.
    """

    incomplete = ""  # an image is whole or rejected

    def __init__(
        self,
        image: Image.Image,
        format_: str,
        file: EncodedFile,
        content_hash: str,
        limits: DecodeConfig,
        images: ImageRules,
    ) -> None:
        """Takes over `image` and `file`. Decodes the first frame, of an animation all frames, one after the other, for their times.

        Raises: see `open_pictures`.
        """
        self._image, self._file, self._background = image, file, images.background
        self.frames_decoded = 0
        self._at = -1
        self._rgb_HW3 = np.empty((0, 0, 3), np.uint8)
        frames = _frames(image, file)
        self._moves = moves = format_ in ANIMATED and frames > 1
        self.times_s, self.end_s = np.zeros(1), 0.0
        warnings = [*(self._read_times(frames, limits) if moves else self._decode(0))]
        orientation = _orientation(image)
        if orientation is None:
            warnings.append("bad_exif")
            orientation = Orientation()
        width, height = image.size[::-1] if orientation.transpose else image.size
        if not moves and max(width, height) > images.max_aspect * min(width, height):
            message = f"{width}x{height} pixels are longer than images.max_aspect {images.max_aspect:g} allows"
            raise PolicyReject("aspect_ratio", message, stage="decode", video=video_counts(width, height))
        if orientation.mirrored:
            warnings.append("mirrored")
        if image.format in PAGED and frames > 1:
            warnings.append(f"extra_pages:{frames - 1}")
        self._scaler = Scaler(orientation, "sdr")
        self.info = VideoInfo(
            codec=format_.lower(),
            pixel_format=image.mode.lower(),
            width=width,
            height=height,
            coded_width=image.width,
            coded_height=image.height,
            rotation=orientation.rotation,
            sample_aspect=(1, 1),
            fps=round(frames / self.end_s, 6) if moves else 0.0,
            num_frames=len(self.times_s),
            duration_s=round(self.end_s, 6),
            color_matrix="bt709",
            color_range="full",
            content_hash=content_hash,
            warnings=tuple(warnings),
            is_image=not moves,
        )

    def show(self, index: int) -> Shown:
        """The frame on screen at `index`, which must not be smaller than in the calls before.

        Raises:
            DamagedInput: `truncated`, `undecodable`, `decoder_memory`.
            StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
        """
        self._decode(index)
        return Shown(index, rgb_frame(self._rgb_HW3), self._scaler)

    def planes(self, indices: np.ndarray, geometry: Geometry) -> np.ndarray:
        """Limited-range Y, U, V planes `(T, 3, H, W)`, uint8, of the frames at `indices`, which ascend. Raises as `show`."""
        planes_T3HW = np.empty((len(indices), 3, geometry.height, geometry.width), np.uint8)
        for row, index in enumerate(indices.tolist()):
            self.show(index).write(planes_T3HW[row], geometry)
        return planes_T3HW

    def close(self) -> None:
        """Releases the pixels and the file; safe to call twice."""
        self._image.close()
        self._file.close()

    def _read_times(self, frames: int, limits: DecodeConfig) -> tuple[str, ...]:
        """Decodes all frames for `times_s` and `end_s`. Returns warnings about their colour."""
        if frames > limits.max_frames:
            message = f"{frames} frames are more than decode.max_frames {limits.max_frames}"
            video = video_counts(*self._image.size)
            raise PolicyReject("too_many_frames", message, stage="decode", video=video)
        self.times_s, end_s, noted = np.empty(frames), 0.0, dict[str, None]()
        for index in range(frames):
            noted.update(dict.fromkeys(self._decode(index)))
            stated_s = float(self._image.info.get("timestamp") or 0) / 1000
            # Sums of rounded durations drift from the times, but frames without a duration have no time of their own.
            self.times_s[index] = stated_s if abs(stated_s - end_s) <= ROUNDED_S else end_s
            end_s = float(self.times_s[index]) + (float(self._image.info.get("duration") or 0) / 1000 or NO_DURATION_S)
        self.end_s = end_s
        if end_s > limits.max_duration_s:
            message = f"{end_s:g} s are longer than decode.max_duration_s {limits.max_duration_s:g}"
            video = video_counts(*self._image.size, end_s)
            raise PolicyReject("too_long", message, stage="decode", video=video)
        return tuple(noted)

    def _decode(self, index: int) -> tuple[str, ...]:
        """Decodes the frame at `index`, unless it is the current one. Returns warnings about its colour."""
        if index == self._at:
            return ()
        with _damage(f"decoding frame {index}", self._file):
            if self._moves:
                self._image.seek(index)
            self._image.load()
            self._rgb_HW3, noted = srgb(self._image, self._background)
        self._at = index
        self.frames_decoded += 1
        return noted


def _orientation(image: Image.Image) -> Orientation | None:
    """What EXIF says of a loaded image; None if it cannot be read."""
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")
            return ORIENTATIONS.get(image.getexif().get(ORIENTATION_TAG, 1), Orientation())
    except PILLOW_ERRORS:
        return None
