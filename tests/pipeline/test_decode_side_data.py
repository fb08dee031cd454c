"""Side data of frames: every kind of orientation is applied, all other kinds are ignored safely."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.video.decode import open_video
from tests.pipeline.decoded import FAST, LIMITS, X265, planes
from tests.video_files import encode

HEIGHT, WIDTH = 64, 96  # libx265 corrupts memory below its block of 64 pixels
X265_FRAMES = 8  # with fewer it sometimes gives packets that cannot be muxed
CORNERS = [[40, 90], [140, 200]]  # luma of the four quarters
SHOWN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).T,
    8: lambda stored: np.rot90(stored),
}  # EXIF orientation -> how the quarters are seen


def quarters(*_: int) -> np.ndarray:
    luma = np.kron(np.array(CORNERS), np.ones((HEIGHT // 2, WIDTH // 2))).astype(np.uint8)
    return np.concatenate([luma, np.full((HEIGHT // 2, WIDTH), 128, np.uint8)])


def seen(data: bytes) -> np.ndarray:
    """Luma of the four quarters as shown."""
    luma = planes(open_video(data, LIMITS), [0])[0, 0]
    y, x = luma.shape[0] // 4, luma.shape[1] // 4
    return luma[y :: 2 * y, x :: 2 * x][:2, :2]


def mux(packets: list[bytes], codec: str, container: str, pix_fmt: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, width=WIDTH, height=HEIGHT)
        stream.pix_fmt = pix_fmt
        output.start_encoding()
        for index, data in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, index, index, True
            packet.time_base = Fraction(1, 10)
            output.mux(packet)
    return buffer.getvalue()


def exif_jpeg(orientation: int) -> bytes:
    jpeg = encode([quarters()], size=(HEIGHT, WIDTH), codec="mjpeg", container="mjpeg", pix_fmt="yuvj420p")
    entry = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    body = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("container", ["avi", "mov", "matroska"])
def test_exif_orientation_of_a_jpeg_is_applied(orientation, container):
    data = mux([exif_jpeg(orientation)] * 2, "mjpeg", container, "yuvj420p")
    np.testing.assert_allclose(seen(data), SHOWN[orientation](np.array(CORNERS)), atol=3)


@pytest.mark.parametrize(
    ("container", "orientation"), [("mp4", 2), ("mp4", 4), ("mov", 6), ("mov", 7), ("matroska", 6), ("matroska", 3)]
)
def test_the_containers_display_matrix_is_applied(container, orientation):
    # Counter-clockwise degrees, then a mirror.
    rotation, hflip = {2: (0, True), 3: (180, False), 4: (180, True), 6: (-90, False), 7: (90, True)}[orientation]
    settings = {"rotation": rotation, "hflip": hflip, "container": container, "options": {"qp": "1"}}
    data = encode(2, size=(HEIGHT, WIDTH), picture=quarters, **settings)
    np.testing.assert_allclose(seen(data), SHOWN[orientation](np.array(CORNERS)), atol=4)


@pytest.mark.parametrize(("codec", "container"), [("libx264", "h264"), ("libx265", "hevc")])
@pytest.mark.parametrize(("hflip", "vflip", "turns"), [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 0, 3)])
def test_display_orientation_in_the_stream_is_applied(codec, container, hflip, vflip, turns):
    options = {"qp": "1"} if codec == "libx264" else {**X265, "x265-params": X265["x265-params"] + ":qp=1"}
    data = encode(
        X265_FRAMES, size=(HEIGHT, WIDTH), picture=quarters, codec=codec, container=container, options=options
    )
    # H.264 D.1.26, HEVC D.2.17: not cancelled, flips, turns of 90 degrees anticlockwise; period 1 / persistent; stop bit.
    bits = f"0{hflip}{vflip}{turns << 14:016b}" + ("0101" if codec == "libx264" else "11")
    payload = int(bits.ljust(24, "0"), 2).to_bytes(3, "big").replace(b"\0\0\0", b"\0\0\3\0")
    header = b"\x06" if codec == "libx264" else b"\x4e\x01"
    sei = b"\0\0\0\1" + header + bytes([47, 3]) + payload.ljust(3, b"\0") + b"\x80"
    stored = np.array(CORNERS)
    expected = np.rot90(stored[:: -1 if vflip else 1, :: -1 if hflip else 1], turns)
    np.testing.assert_allclose(seen(_before_pictures(data, sei, codec)), expected, atol=6)


def _before_pictures(stream: bytes, nal: bytes, codec: str) -> bytes:
    position = 0
    while (position := stream.find(b"\0\0\1", position)) >= 0:
        header = stream[position + 3]
        if (codec == "libx264" and header & 0x1F == 5) or (codec == "libx265" and 16 <= header >> 1 & 63 <= 21):
            start = position - (stream[position - 1] == 0)
            return stream[:start] + nal + stream[start:]
        position += 3
    raise AssertionError("the stream has no picture")


def with_profile(png: bytes) -> bytes:
    body = b"a profile\0\0" + zlib.compress(bytes(200))
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    return png[:33] + chunk + png[33:]  # after the signature and IHDR


def profiled(container: str) -> bytes:
    rgb = np.full((HEIGHT, WIDTH, 3), (220, 20, 20), np.uint8)
    settings = {"size": (HEIGHT, WIDTH), "pix_fmt": "rgb24", "source_format": "rgb24"}
    if container == "apng":
        return with_profile(encode([rgb, rgb // 2], codec="apng", container="apng", **settings))
    png = encode([rgb], codec="png", container="image2pipe", **settings)
    return mux([with_profile(png)] * 2, "png", container, "rgb24")


LOOP = """
import gc, sys
from pathlib import Path
from pipeline.video.decode import open_video
from tests.pipeline.decoded import LIMITS, planes
files = [Path(name).read_bytes() for name in sys.argv[1:]]
for n in range(300):
    video = open_video(files[n % len(files)], LIMITS)
    assert planes(video, range(2), 16, 16).shape == (2, 3, 16, 16)
    video.close()
    gc.collect()
print("sound")
"""


def test_profiles_and_unknown_side_data_corrupt_no_memory(tmp_path):
    files = {name: profiled(name) for name in ("mov", "avi", "apng")}
    files["jpeg.mov"] = mux([exif_jpeg(6)] * 2, "mjpeg", "mov", "yuvj420p")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    names = [str(tmp_path / name) for name in files]
    found = subprocess.run([sys.executable, "-c", LOOP, *names], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (0, "sound"), found.stderr[-500:]


def test_hdr_metadata_beside_a_matrix_is_ignored():
    master = "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):max-cll=1000,400"
    options = {**X265, "x265-params": f"{X265['x265-params']}:{master}:qp=4"}
    settings = {"size": (HEIGHT, WIDTH), "picture": quarters, "codec": "libx265", "rotation": 90}
    data = encode(X265_FRAMES, options=options, **settings)
    np.testing.assert_allclose(seen(data), np.rot90(CORNERS), atol=4)
    captioned = encode(2, size=(HEIGHT, WIDTH), picture=quarters, options={**FAST, "qp": "1"})  # x264's own SEI
    np.testing.assert_allclose(seen(captioned), CORNERS, atol=4)
