"""Videos whose frames depend on each other in uncommon ways: open groups, intra refresh, hidden frames. Functions return bytes."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import av

from tests.odd_inputs import boxes
from tests.odd_inputs.numbered import X264, X264_B, X265, encode
from tests.odd_inputs.remux import filtered, packets_of, remux, replaced, shifted
from tests.odd_inputs.untimed import OPEN_GOP

OPEN_GOP_264 = {
    "preset": "veryfast",
    "g": "24",
    "bf": "2",
    "crf": "16",
    "x264-params": "open-gop=1:b-adapt=0:scenecut=0",
}
REFRESH = {"preset": "veryfast", "g": "24", "crf": "16", "bf": "0", "x264-params": "intra-refresh=1:scenecut=0"}
FIELDS = {**X264, "flags": "+ildct+ilme"}
VP9_SHOW_FRAME, VP9_SHOW_EXISTING, VP8_SHOW_FRAME = (
    0x02,
    0x88,
    0x10,
)  # bits of the first byte of a frame; 0x88 shows slot 0


def b_frames(container: str = "matroska", count: int = 144) -> bytes:
    """H.264 with reordered frames and closed groups of 24."""
    return encode(range(count), container, options=X264_B)


def b_frames_hevc(container: str = "matroska", count: int = 144) -> bytes:
    """HEVC with reordered frames and closed groups of 24."""
    return encode(range(count), container, "libx265", options=X265)


def open_groups(container: str = "mp4") -> bytes:
    """H.264 whose key frames are not IDR: 0-95."""
    return encode(range(96), container, options=OPEN_GOP_264)


def open_groups_hevc(container: str = "matroska") -> bytes:
    """HEVC whose key frames are CRA pictures with leading pictures: 0-95."""
    return encode(range(96), container, "libx265", options=OPEN_GOP)


def intra_refresh(container: str = "matroska") -> bytes:
    """H.264 with one key frame at its head; later ones are recovery points: 0-95."""
    return encode(range(96), container, options=REFRESH)


def one_group(container: str = "matroska") -> bytes:
    """A single key frame: 0-95."""
    return encode(range(96), container, options={**X264_B, "g": "1000"})


def falsely_marked(container: str = "matroska") -> bytes:
    """Every packet is flagged as a key frame, although few are: 0-71."""

    def edit(packets: list[av.Packet]) -> list[av.Packet]:
        copies = [replaced(packet, bytes(packet)) for packet in packets]
        for copy in copies:
            copy.is_keyframe = True
        return copies

    return remux(encode(range(72), container), container, edit)


def hidden_vp9(container: str = "matroska") -> bytes:
    """VP9 whose key frames are hidden, each in a packet of its own before a packet that shows it: 0-71 in 75 packets."""

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        for packet in packets:
            data = bytes(packet)
            if not packet.is_keyframe:
                yield packet
                continue
            yield replaced(packet, bytes([data[0] & ~VP9_SHOW_FRAME]) + data[1:])
            shows = replaced(packet, bytes([VP9_SHOW_EXISTING]))
            shows.pts, shows.dts, shows.is_keyframe = packet.pts + 1, packet.dts + 1, False
            yield shows

    return remux(encode(range(72), container, "libvpx-vp9"), container, edit, {"fflags": "-autobsf"})


def hidden_vp8(container: str = "webm") -> bytes:
    """VP8 with frames 10, 11 and 40 hidden: the other ones of 0-71."""

    def edit(packets: list[av.Packet]) -> Iterator[av.Packet]:
        for position, packet in enumerate(packets):
            data = bytes(packet)
            hidden = replaced(packet, bytes([data[0] & ~VP8_SHOW_FRAME]) + data[1:])
            yield hidden if position in (10, 11, 40) else packet

    return remux(encode(range(72), container, "libvpx"), container, edit)


def hidden_av1_apart() -> bytes:
    """AV1 whose hidden frames are packets of their own: 0-47."""
    return filtered(encode(range(48), "matroska", "libsvtav1"), "matroska", "av1_frame_split")


def hidden_av1(container: str = "mp4") -> bytes:
    """AV1 with hidden frames and frames that show them: 0-47."""
    return encode(range(48), container, "libsvtav1")


def interlaced(container: str = "mpegts", codec: str = "libx264") -> bytes:
    """Interlaced frames, two fields to a packet: 0-47 at 25 fps."""
    options = FIELDS if codec == "libx264" else {"flags": "+ildct+ilme", "g": "24", "b": "1500k"}
    return encode(range(48), container, codec, options=options, fps=25)


def interlaced_later() -> bytes:
    """Progressive, then interlaced, then progressive frames: 0-47, 100-147, 200-247 at 25 fps."""
    flat = [encode(range(first, first + 48), "mpegts", fps=25) for first in (0, 200)]
    fields = encode(range(100, 148), "mpegts", options=FIELDS, fps=25)
    return flat[0] + fields + flat[1]


def frozen(container: str = "mp4", codec: str = "libx264") -> bytes:
    """One frame that lasts two seconds between others: 0-3 at 24 fps, then 4 for 2 s, then 5-40. AVI holds empty packets meanwhile."""
    times = [n if n < 5 else n + 48 for n in range(41)]
    return encode(range(41), container, codec, pts=times, time_base=Fraction(1, 24))


def size_changes(container: str = "mpegts", size: tuple[int, int] = (128, 192)) -> bytes:
    """The second half has another size: 0-47, then 100-147."""
    return encode(range(48), container) + remux(encode(range(100, 148), container, size=size), container, shifted(2))


def one_frame(container: str = "mp4", codec: str = "libx264") -> bytes:
    """A video of a single frame, number 7."""
    return encode([7], container, codec, pix_fmt="rgb8" if codec == "gif" else "yuv420p")


def with_last_duration(delta: int, edit_ms: int = 25_000) -> bytes:
    """25 frames of a second each; the last sample's duration is `delta` milliseconds; the edit list says 25 s."""
    pts = [1000 * n for n in range(25)]
    data = encode(range(25), "mp4", options={**X264, "g": "8"}, pts=pts, time_base=Fraction(1, 1000))
    container, _ = packets_of(data)
    scale = int(1 / container.streams.video[0].time_base)
    container.close()
    return boxes.with_edits(boxes.with_last_delta(data, delta * scale // 1000), [(edit_ms, 0)])
