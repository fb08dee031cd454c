"""Files named like videos that are not, and videos that cannot be read: the reject says what the file is."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import BadDataError, DamagedInput, PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.encryption import why_encrypted
from pipeline.video.decode.lookalikes import TABLE
from tests.pipeline.decoded import FAST, LIMITS
from tests.video_files import audio_only, encode

CENC = {
    "encryption_scheme": "cenc-aes-ctr",
    "encryption_key": "00112233445566778899aabbccddeeff",
    "encryption_kid": "0123456789abcdef0123456789abcdef",
}


def refusal(video: bytes | str) -> BadDataError:
    with pytest.raises(BadDataError) as caught:
        open_video(video, LIMITS)
    return caught.value


def image(kind: str, frames: int = 1) -> bytes:
    pictures = [Image.fromarray(np.full((64, 64, 3), 40 * n, np.uint8)) for n in range(frames)]
    target = io.BytesIO()
    animation = {"save_all": True, "append_images": pictures[1:], "duration": 40} if frames > 1 else {}
    pictures[0].save(target, kind, **animation)
    return target.getvalue()


# --- still images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_a_still_image_is_rejected_as_one(kind):
    error = refusal(image(kind))
    assert (type(error), error.reason) == (PolicyReject, "still_image")
    assert {"JPEG2000": "JPEG 2000", "WEBP": "WebP"}.get(kind, kind) in error.message


def test_a_heic_image_is_rejected_as_one():
    error = refusal(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(500))
    assert (error.reason, error.message[:12]) == ("still_image", "a HEIC image")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "AVIF"])
def test_an_animated_image_is_a_video(kind):
    assert open_video(image(kind, frames=4), LIMITS).info.num_frames == 4


def test_an_animation_that_libav_does_not_read_is_named():
    error = refusal(image("WEBP", frames=4))
    assert (type(error), error.reason) == (PolicyReject, "unsupported_format")
    assert "animated WebP; convert it" in error.message


def test_a_broken_animation_is_damage_and_one_frame_of_a_video_codec_is_a_video():
    assert type(refusal(b"GIF89a" + b"\xff" * 300)) is DamagedInput
    assert open_video(encode(1, options=FAST), LIMITS).info.num_frames == 1


# --- other files ------------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.mp4", b"x" * 100)
    return target.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "a git-lfs pointer; fetch the file with",
        ),
        (b"\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", "an HTML page; download"),
        (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "an XML document"),
        (b'{"error": "not found"}', "a JSON text"),
        ("Zugriff auf die größte Datei verweigert.\n".encode(), "a text"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "an HLS playlist"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "an ffconcat list"),
        (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "a DASH manifest"),
        (b"%PDF-1.7\n" + bytes(range(256)), "a PDF document"),
        (zipped(), "a zip archive; unpack it"),
        (gzip.compress(b"x" * 1000), "gzip-compressed data"),
        (bytes(5000), "nothing but zero bytes"),
        (b"", "empty"),
    ],
    ids=lambda value: value.split(";")[0] if isinstance(value, str) else "",
)
def test_other_files_are_rejected_with_their_kind(data, words, tmp_path):
    (tmp_path / "a.mp4").write_bytes(data)
    for video in (data, str(tmp_path / "a.mp4")):
        error = refusal(video)
        assert (type(error), error.reason) == (DamagedInput, "not_a_video")
        assert error.message.startswith(f"the file is {words}")


@pytest.mark.parametrize("data", [audio_only(), b"ID3\4" + bytes(500), b"RIFF\x24\0\0\0WAVEfmt " + bytes(99)])
def test_a_file_with_only_sound_is_policy_and_not_damage(data):
    error = refusal(data)
    assert (type(error), error.reason) == (PolicyReject, "no_video_stream")


def test_a_header_without_frames_is_policy_unless_it_promises_some():
    fragmented = encode(8, options=FAST, container_options={"movflags": "frag_keyframe+empty_moov"})
    error = refusal(fragmented[: fragmented.index(b"moof") - 4])
    assert (type(error), error.reason) == (PolicyReject, "no_frames")
    indexed = encode(8, options=FAST, container_options={"movflags": "faststart"})
    error = refusal(indexed[: indexed.index(b"mdat") + 4])
    assert (type(error), error.reason) == (DamagedInput, "truncated")
    assert "promises 8 frames" in error.message


def test_no_signature_matches_a_video():
    formats = {
        "mp4": "libx264",
        "matroska": "libx264",
        "mpegts": "libx264",
        "avi": "mpeg4",
        "asf": "mpeg4",
        "flv": "libx264",
    }
    for container, codec in formats.items():
        head = encode(2, container=container, codec=codec)[:4096]
        assert [what.what for fits, what in TABLE if fits(head)] == []


# --- encryption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("movflags", ["", "faststart", "frag_keyframe+empty_moov+default_base_moof"])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_video_with_common_encryption_is_encrypted(movflags, codec):
    options = {**CENC, "movflags": movflags} if movflags else CENC
    error = refusal(encode(8, codec=codec, container_options=options))
    assert (type(error), error.reason) == (PolicyReject, "encrypted")
    assert error.message.endswith("(Common Encryption, scheme cenc) and Lathe has no key; decrypt it first")


def test_an_entry_that_is_protected_only_by_name_is_not_encrypted():
    data = encode(8, options=FAST, container_options=CENC)
    at = data.index(b"tenc") + 10
    assert data[at] == 1
    assert why_encrypted(data[:at] + b"\0" + data[at + 1 :]) is None


def test_a_scrambled_transport_stream_is_encrypted():
    clear = encode(60, options=FAST, container="mpegts")
    scrambled = bytearray(clear)
    for at in range(0, len(clear), 188):
        if (clear[at + 1] & 0x1F) << 8 | clear[at + 2] == 0x100:  # of the video
            scrambled[at + 3] |= 0x80
    assert refusal(bytes(scrambled)).reason == "encrypted"
    bluray = b"".join(bytes(4) + scrambled[at : at + 188] for at in range(0, len(clear), 188))
    assert why_encrypted(bluray) == "a scrambled transport stream"
    assert why_encrypted(clear) is None


def element(identifier: bytes, contents: bytes) -> bytes:
    return identifier + (len(contents) | 1 << 56).to_bytes(8, "big") + contents


@pytest.mark.parametrize(("kind", "encrypted"), [(1, True), (2, False)])
def test_an_encrypted_matroska_track_counts_if_it_is_the_video(kind, encrypted):
    encodings = element(b"\x6d\x80", element(b"\x62\x40", element(b"\x50\x35", b"")))
    track = element(b"\xae", element(b"\x83", bytes([kind])) + encodings)
    data = element(b"\x1a\x45\xdf\xa3", b"") + element(b"\x18\x53\x80\x67", element(b"\x16\x54\xae\x6b", track))
    assert bool(why_encrypted(data)) is encrypted
    assert why_encrypted(encode(4, options=FAST, container="matroska")) is None


def test_windows_media_drm_is_encrypted():
    clear = encode(4, codec="mpeg4", container="asf")
    assert why_encrypted(clear) is None
    drm = bytes.fromhex("fbb3112223bdd211b4b700a0c955fc6e") + struct.pack("<Q", 24)
    size = int.from_bytes(clear[16:24], "little") + len(drm)
    assert refusal(clear[:16] + struct.pack("<Q", size) + clear[24:30] + drm + clear[30:]).reason == "encrypted"


def test_hostile_headers_are_read_in_bounded_time(tmp_path):
    boxes = b"".join(struct.pack(">I4s", 8, b"moov") for _ in range(50_000))
    for data in (
        struct.pack(">I4s", 16, b"ftyp") + bytes(8) + boxes,
        struct.pack(">I4sQ", 1, b"moov", 1 << 63) + bytes(64),
        struct.pack(">I4s", 4, b"moov") + bytes(64),
        b"\x1a\x45\xdf\xa3" + b"\xff" * 500,
        b"\x1a\x45\xdf\xa3" + b"\x80" * 500,
        bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + b"\xff" * 40 + bytes(500),
        b"\x47" * 5000,
    ):
        assert why_encrypted(data) is None
