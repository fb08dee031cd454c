"""Videos with palettes, cropping, cover art, rotation, side data or encryption, and files that are not videos. Functions return bytes."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from tests import video_files
from tests.odd_inputs import boxes
from tests.odd_inputs.numbered import HEIGHT, WIDTH, X264, draw, encode
from tests.odd_inputs.remux import packets_of, remux, replaced

FRAMES = 24
KEY = "00112233445566778899aabbccddeeff"


# --- palettes ---------------------------------------------------------------------------------------------------------


def palette(codec: str = "zmbv", container: str = "avi", pix_fmt: str = "pal8") -> bytes:
    """24 frames of at most 256 colours: numbers 0-23 with their corners."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for number in range(FRAMES):
            frame = paletted(number) if pix_fmt == "pal8" else av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def paletted(number: int) -> av.VideoFrame:
    """A frame of indices into a palette; the background is one colour, so that all fit."""
    picture = draw(number).copy()
    plain = [(220, 20, 20), (20, 200, 20), (20, 20, 220), (220, 220, 20), (235, 235, 235), (20, 20, 20)]
    colours = np.array([*plain, (90, 90, 100)], np.uint8)
    indices = np.full(picture.shape[:2], len(plain), np.uint8)
    for index, colour in enumerate(plain):
        indices[(picture == np.array(colour, np.uint8)).all(-1)] = index
    table = np.zeros((256, 4), np.uint8)  # ARGB, the first byte is alpha
    table[:, 0] = 255
    table[: len(colours), 1:] = colours
    return av.VideoFrame.from_ndarray((indices, table), format="pal8")


# --- cropping and rotation --------------------------------------------------------------------------------------------


def framed(number: int, border: tuple[int, int, int, int]) -> np.ndarray:
    """The numbered picture inside a grey border of left, top, right, bottom pixels."""
    left, top, right, bottom = border
    picture = np.full((HEIGHT + top + bottom, WIDTH + left + right, 3), 128, np.uint8)
    picture[top : top + HEIGHT, left : left + WIDTH] = draw(number)
    return picture


def _framed_video(container: str, border: tuple[int, int, int, int], **settings) -> bytes:
    pictures = [framed(number, border) for number in range(FRAMES)]
    size = pictures[0].shape[:2]
    return video_files.encode(
        pictures, size=size, container=container, options=X264, fps=24, source_format="rgb24", **settings
    )


def pixel_crop(left: int = 32, top: int = 16, right: int = 32, bottom: int = 16) -> bytes:
    """Matroska with PixelCrop: the numbered 96x64 of its picture are shown."""
    video = _framed_video("matroska", (left, top, right, bottom), container_options={"write_crc32": "0"})
    return boxes.with_pixel_crop(video, left=left, top=top, right=right, bottom=bottom)


def clean_aperture(left: int = 32, top: int = 16, right: int = 32, bottom: int = 16) -> bytes:
    """mp4 with a `clap` box: the numbered 96x64 of it is shown."""
    video = _framed_video("mp4", (left, top, right, bottom))
    return boxes.with_clap(video, WIDTH, HEIGHT, (right - left) / 2, (bottom - top) / 2)


def rotated(degrees: int = 90, container: str = "mp4") -> bytes:
    """A phone's video: frames 0-23 to be turned by `degrees` counter-clockwise."""
    return encode(range(FRAMES), container, rotation=degrees)


# --- more than a video ------------------------------------------------------------------------------------------------


def cover_first(container: str = "matroska", cover: str = "mjpeg") -> bytes:
    """A picture as the first video stream, not marked as cover art, then the video: 0-47."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        picture = output.add_stream(cover, rate=24)
        picture.width, picture.height, picture.pix_fmt = 160, 160, "yuvj420p" if cover == "mjpeg" else "rgb24"
        stream = output.add_stream("libx264", rate=24, options=X264)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        still = av.VideoFrame.from_ndarray(np.full((160, 160, 3), 90, np.uint8), format="rgb24")
        still.pts, still.time_base = 0, Fraction(1, 24)
        output.mux(picture.encode(still))
        output.mux(picture.encode())
        for number in range(48):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def exif(container: str = "avi", frames: int = FRAMES) -> bytes:
    """MJPEG whose frames carry EXIF, which PyAV gives as side data of a type it does not know."""
    body = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 0x0112, 3, 1, 1) + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(body) + 8) + b"Exif\0\0" + body

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            data = bytes(packet)
            yield replaced(packet, data[:2] + segment + data[2:])

    return remux(encode(range(frames), container, "mjpeg", pix_fmt="yuvj420p"), container, edit)


def icc(container: str = "mov", frames: int = FRAMES) -> bytes:
    """PNG frames with an ICC profile, whose side data holds metadata."""
    profile = _profile()
    chunk = _png_chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(profile))

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            data = bytes(packet)
            yield replaced(packet, data[:33] + chunk + data[33:])

    return remux(encode(range(frames), container, "png", pix_fmt="rgb24"), container, edit)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _profile() -> bytes:
    """The smallest ICC profile: a header and one tag with a description."""
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    table = struct.pack(">I4sII", 1, b"desc", 144, len(text))
    size = 128 + len(table) + len(text)
    header = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return header.ljust(128, b"\0") + table + text


def encrypted(codec: str = "libx264", scheme: str = "cenc-aes-ctr") -> bytes:
    """mp4 with encrypted samples and without the key."""
    options = {"encryption_scheme": scheme, "encryption_key": KEY, "encryption_kid": KEY}
    return encode(range(FRAMES), "mp4", codec, container_options=options)


def audio_only(container: str = "mp4", codec: str = "aac") -> bytes:
    """Sound without a picture."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48_000)
        samples = np.zeros((1, 2048), np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def still(codec: str = "mjpeg") -> bytes:
    """One image: JPEG, PNG or WebP."""
    context = av.CodecContext.create(codec, "w")
    context.width, context.height, context.time_base = WIDTH, HEIGHT, Fraction(1, 24)
    context.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24", "libwebp": "yuv420p"}[codec]
    frame = av.VideoFrame.from_ndarray(draw(1), format="rgb24").reformat(format=context.pix_fmt)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def web_page() -> bytes:
    """The HTML page of a failed download."""
    return (
        b"<!DOCTYPE html><html><head><title>403 Forbidden</title></head><body>" + b"<p>no</p>" * 50 + b"</body></html>"
    )


def pointer_file() -> bytes:
    """The pointer of Git LFS for a file that was not fetched."""
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def archive() -> bytes:
    """A zip."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.mp4", bytes(1000))
    return buffer.getvalue()


def with_sound_longer(seconds: int = 4) -> bytes:
    """Frames 0-47 with a longer sound track."""
    video, packets = packets_of(encode(range(48), "mp4"))
    buffer = io.BytesIO()
    with video, av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream_from_template(video.streams.video[0], opaque=True)
        sound = output.add_stream("aac", rate=48_000)
        for packet in packets:
            packet.stream = stream
            output.mux(packet)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48_000 * seconds), np.int16), format="s16", layout="stereo")
        frame.sample_rate = 48_000
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    return buffer.getvalue()
