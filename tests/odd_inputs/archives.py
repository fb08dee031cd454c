"""Tars with odd names, orders or contents of members. Each function returns bytes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable

from tests.odd_inputs.numbered import encode

Members = Iterable[tuple[str, bytes]]
DOTTED = (
    "Track 1.0 (A).mp4",
    "Track 2.0 (A).mp4",
    "Track 2.0 (B).mp4",
    "vid_00.12.500-00.14.000.mp4",
    "vid_00.14.000-00.16.000.mp4",
    "yt.f137.mp4",
    "yt.f248.mp4",
    "plain.mp4",
)
NESTED = b'{"a":' * 500 + b"1" + b"}" * 500
CAPTION = "it’s a “dog” – running café"
ENCODED_CAPTIONS = {
    "utf8": "größer".encode(),
    "bom": b"\xef\xbb\xbf" + "größer".encode(),
    "utf16": CAPTION.encode("utf-16"),
    "utf16be": b"\xfe\xff" + CAPTION.encode("utf-16-be"),
    "cp1252": CAPTION.encode("cp1252"),
    "gbk": "一只狗在草地上奔跑，阳光明媚，天空很蓝，孩子们在旁边玩耍".encode("gbk"),
    "sjis": "犬が草原を走っています。とても良い天気で、子供たちが遊んでいます".encode("shift_jis"),
    "nul": b"a dog\0 running\0",
}


def tar(members: Members) -> bytes:
    """Members in order; a name may come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def small_video(number: int = 0) -> bytes:
    """Nine frames from `number` on."""
    return encode(range(number, number + 9))


def dotted() -> bytes:
    """Eight videos and eight captions whose names hold dots: eight samples, each with its own caption."""
    members: list[tuple[str, bytes]] = []
    for n, name in enumerate(DOTTED):
        members += [(name, small_video(10 * n)), (name[:-3] + "txt", f"caption of {name}".encode())]
    return tar(members)


def same_key() -> bytes:
    """Two samples of one key after each other, then another one."""
    texts = [("k.txt", b"first"), ("k.txt", b"second"), ("m.txt", b"third")]
    videos = [("k.mp4", small_video(0)), ("k.mp4", small_video(10)), ("m.mp4", small_video(20))]
    return tar(member for pair in zip(videos, texts, strict=True) for member in pair)


def same_key_apart() -> bytes:
    """The second sample of a key comes after another one."""
    return tar(
        [
            *(("k.mp4", small_video(0)), ("k.txt", b"first")),
            *(("m.mp4", small_video(10)), ("m.txt", b"other")),
            *(("k.mp4", small_video(20)), ("k.txt", b"second")),
        ]
    )


def two_videos_of_a_key() -> bytes:
    """One key with two videos of different kinds."""
    return tar(
        [("k.mp4", small_video(0)), ("k.webm", encode(range(10, 19), "webm", "libvpx-vp9")), ("k.txt", b"words")]
    )


def captions() -> bytes:
    """A caption in each of several encodings."""
    members: list[tuple[str, bytes]] = []
    for name, text in ENCODED_CAPTIONS.items():
        members += [(f"{name}.mp4", small_video()), (f"{name}.txt", text)]
    return tar(members)


def nested_json() -> bytes:
    """A sample whose json is nested 500 deep, between two others."""
    members: list[tuple[str, bytes]] = []
    for n, (key, text) in enumerate((("a", b"{}"), ("deep", NESTED), ("z", json.dumps({"n": 1}).encode()))):
        members += [(f"{key}.mp4", small_video(10 * n)), (f"{key}.json", text)]
    return tar(members)
