"""Videos with damage: broken, missing or overwritten packets, cut files. Each function returns bytes.

Frames 0-95 at 24 fps with a key frame every 24, so that one broken packet costs at most 24 frames.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from tests.odd_inputs.numbered import X264_B, encode
from tests.odd_inputs.remux import Edit, harming, packets_of, remux, without

FRAMES = 96
GROUP = 24


class Kind(NamedTuple):
    """A codec in a container; `b_frames`: with the options `X264_B`."""

    codec: str
    container: str
    b_frames: bool = False


KINDS = {
    "h264-mkv": Kind("libx264", "matroska"),
    "h264-b-mkv": Kind("libx264", "matroska", b_frames=True),
    "h264-mp4": Kind("libx264", "mp4"),
    "h264-b-ts": Kind("libx264", "mpegts", b_frames=True),
    "h264-avi": Kind("libx264", "avi"),
    "hevc-mkv": Kind("libx265", "matroska"),
    "hevc-ts": Kind("libx265", "mpegts"),
    "vp9-mkv": Kind("libvpx-vp9", "matroska"),
    "vp8-webm": Kind("libvpx", "webm"),
    "av1-mp4": Kind("libsvtav1", "mp4"),
    "mpeg2-ts": Kind("mpeg2video", "mpegts"),
    "mpeg4-avi": Kind("mpeg4", "avi"),
    "mpeg4-mp4": Kind("mpeg4", "mp4"),
}


@functools.cache
def whole(kind: Kind) -> bytes:
    """The undamaged video. Encoded once per process: encoders write other bytes under load, and original and damaged copy must agree."""
    return encode(range(FRAMES), kind.container, kind.codec, options=X264_B if kind.b_frames else None)


def edited(kind: Kind, edit: Edit) -> bytes:
    """The packets of the undamaged video after `edit`."""
    return remux(whole(kind), kind.container, edit)


def one_packet(kind: Kind, position: int = 30) -> bytes:
    """One packet becomes noise."""
    return edited(kind, harming(position))


def one_in_every_group(kind: Kind) -> bytes:
    """A packet of each group becomes noise."""
    return edited(kind, harming(*range(6, FRAMES, GROUP)))


def tail_of_packet(kind: Kind, position: int = 30) -> bytes:
    """One packet becomes noise behind its headers."""
    return edited(kind, harming(position, keep=24))


def lost_packets(kind: Kind, *positions: int) -> bytes:
    """Some packets are missing."""
    return edited(kind, without(*positions))


def overwritten(kind: Kind, near: int = 30, seed: int = 3) -> bytes:
    """Bytes inside a packet are replaced; the container is consistent."""
    data = whole(kind)
    container, packets = packets_of(data)
    container.close()
    contents = max((bytes(packet) for packet in packets[near : near + 8]), key=len)
    start = len(contents) // 3
    for size in (60, 40, 20, 12):  # transport packets put headers in between
        piece = contents[start : start + size]
        if (at := data.find(piece)) >= 0:
            return (
                data[:at]
                + bytes(value ^ (seed * 37 + n) % 255 + 1 for n, value in enumerate(piece))
                + data[at + len(piece) :]
            )
    raise ValueError("the packet is nowhere in the file in one piece")


def cut_short(kind: Kind, share: float = 0.6) -> bytes:
    """The first part of the file."""
    data = whole(kind)
    return data[: int(len(data) * share)]
