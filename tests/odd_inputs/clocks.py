"""Videos whose clocks restart, jump, overlap or wrap, and cuts by edit lists. Each function returns bytes."""

from __future__ import annotations

from fractions import Fraction

from tests.odd_inputs import boxes
from tests.odd_inputs.numbered import X264_B, X265, encode
from tests.odd_inputs.remux import cut, remux, shifted

TICKS = Fraction(1, 90_000)
WRAP = 1 << 33
CLUSTERS = {"cluster_time_limit": "1000", "write_crc32": "0"}


def segment(
    first: int, last: int, container: str = "mpegts", codec: str = "libx264", starts_s: float = 0, **settings
) -> bytes:
    """Frames `first` to `last` at 24 fps with a key frame every 24, from `starts_s` on the clock."""
    data = encode(range(first, last), container, codec, **settings)
    return remux(data, container, shifted(starts_s)) if starts_s else data


def restarted(container: str = "mpegts", codec: str = "libx264") -> bytes:
    """Two segments with the same clock: 0-47, then 100-147."""
    return segment(0, 48, container, codec) + segment(100, 148, container, codec)


def restarted_with_b_frames() -> bytes:
    """The same with reordered frames."""
    return segment(0, 48, options=X264_B) + segment(100, 148, options=X264_B)


def overlapping() -> bytes:
    """The second segment's clock starts at 1.02 s, while the first lasts 2 s: 0-47, then 100-147."""
    return segment(0, 48) + segment(100, 148, starts_s=1.02)


def back() -> bytes:
    """30 s, then 0 s: 0-47, then 100-147."""
    return segment(0, 48, starts_s=30) + segment(100, 148)


def ahead() -> bytes:
    """An hour is skipped: 0-47, then 100-147."""
    return segment(0, 48) + segment(100, 148, starts_s=3600)


def three_segments() -> bytes:
    """Three clocks: 0-35, 100-135, 200-235."""
    return segment(0, 36) + segment(100, 136) + segment(200, 236, starts_s=0.51)


def cut_inside_group() -> bytes:
    """A second segment that starts in the middle of a group, as a recorder joins: 0-47, then 110-147, of which 124-147 can be decoded."""
    return segment(0, 48) + remux(segment(100, 148), "mpegts", cut(10))


def recorder() -> bytes:
    """A capture that starts inside a group, with MPEG-2 and B-frames: 0-71, of which 24-71 can be decoded."""
    data = encode(
        range(72), "mpegts", "mpeg2video", options={"g": "24", "bf": "2", "b": "1500k", "sc_threshold": "1000000000"}
    )
    return remux(data, "mpegts", cut(5))


def wrapped(codec: str = "libx264", options: dict[str, str] | None = None) -> bytes:
    """The 33-bit clock wraps after one second of three: 0-71."""
    pts = [WRAP - 90_000 - 126_000 + 3750 * n for n in range(72)]
    return encode(range(72), "mpegts", codec, options=options, pts=pts, time_base=TICKS)


def broken_clusters(change, options: dict[str, str] | None = None) -> bytes:
    """Matroska with a cluster each second, whose times went through `change(position, time)`: 0-95."""
    data = encode(range(96), "matroska", options=options, container_options=CLUSTERS)
    assert len(boxes.cluster_times(data)) == 4
    return boxes.with_cluster_times(data, change)


def flv_restarted() -> bytes:
    """Two FLV streams, the second without its header: 0-47, then 100-147."""
    first, second = encode(range(48), "flv"), encode(range(100, 148), "flv")
    return first + second[13:]


def flv_back() -> bytes:
    """An FLV recording whose server restarted: 30 s, then 0 s."""
    return segment(0, 48, "flv", starts_s=30) + segment(100, 148, "flv")[13:]


# --- edit lists -------------------------------------------------------------------------------------------------------


def _mp4(options: dict[str, str] | None = None, codec: str = "libx264") -> bytes:
    pts = [1000 * n for n in range(96)]
    return encode(range(96), "mp4", codec, options=options, pts=pts, time_base=Fraction(1, 24_000))


def two_edits() -> bytes:
    """One second from 0 and one from 2 s: 0-23, 48-71."""
    return boxes.with_edits(_mp4(), [(1000, 0), (1000, 48_000)])


def edit_inside_group() -> bytes:
    """One second from frame 10, which is not a key frame: 10-33."""
    return boxes.with_edits(_mp4(), [(1000, 10_000)])


def empty_edit() -> bytes:
    """Half a second of nothing, then all: 0-95."""
    return boxes.with_edits(_mp4(), [(500, boxes.EMPTY_EDIT), (4000, 0)])


def rewound() -> bytes:
    """The second that comes later is shown first: 48-71, 0-23."""
    return boxes.with_edits(_mp4(), [(1000, 48_000), (1000, 0)])


def repeated() -> bytes:
    """The same second twice: 24-47, 24-47."""
    return boxes.with_edits(_mp4(), [(1000, 24_000), (1000, 24_000)])


# --- starts -----------------------------------------------------------------------------------------------------------


def negative_start(container: str = "mp4") -> bytes:
    """Decode times before zero without an edit list: 0-71."""
    options = {"use_editlist": "0"} if container == "mp4" else {"avoid_negative_ts": "disabled"}
    return encode(range(72), container, options=X264_B, container_options=options)


def negative_offsets() -> bytes:
    """Signed composition offsets instead of an edit list: 0-71."""
    return encode(range(72), "mp4", "libx265", options=X265, container_options={"movflags": "negative_cts_offsets"})


def late_start(container: str) -> bytes:
    """The first frame at 5 s: 0-71."""
    return segment(0, 72, container, starts_s=5)
