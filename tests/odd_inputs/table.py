"""Table of odd inputs, each with the expected result: the numbers and times of its shown frames, or the reason of its reject.

`VIDEOS` give all their frames, `DAMAGED` only some of them, `REFUSED` none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tests.odd_inputs import clocks, damage, fields, shapes, structure, untimed
from tests.odd_inputs.numbered import HEIGHT, WIDTH, X264_B, encode

Make = Callable[[], bytes]


@dataclass(frozen=True)
class Odd:
    """A file with its expected result. Files are made once per process, see `data`."""

    name: str
    make: Make
    suffix: str
    numbers: tuple[int, ...] = ()  # of the shown frames, in order
    times_s: tuple[float, ...] | None = None  # of them; None: ascending is enough
    end_s: float | None = None
    size: tuple[int, int] = (HEIGHT, WIDTH)  # as shown
    warnings: frozenset[str] = frozenset()  # kinds that must be among those of the video
    optional: frozenset[int] = frozenset()  # numbers of frames that may be missing: their place is unknown
    colours: bool = False  # the corners are compared too
    # Of damaged files:
    lost: frozenset[int] = frozenset()  # numbers of frames that may be missing or in rejected clips
    truth: tuple[Make, ...] = ()  # undamaged videos with the same frames
    may_refuse: bool = False  # as a whole
    # Of refused files:
    reasons: frozenset[str] = frozenset()
    policy: bool | None = None

    @property
    def file_name(self) -> str:
        """Name of the file in a corpus."""
        return f"{self.name}.{self.suffix}"

    def data(self) -> bytes:
        """The file."""
        return made(self.make)


@functools.cache
def made(make: Make) -> bytes:
    """The result of `make`, cached."""
    return make()


def at(fps: Any, count: int) -> tuple[float, ...]:
    """Times of `count` frames at a constant rate."""
    return tuple(n / float(fps) for n in range(count))


def _of(function: Callable[..., bytes], *arguments: Any, **settings: Any) -> Make:
    return functools.partial(function, *arguments, **settings)


def _video(name: str, suffix: str, make: Make, numbers: Sequence[int], fps: Any = 24, **settings: Any) -> Odd:
    times_s = settings.pop("times_s", "constant")
    if times_s == "constant":
        times_s = at(fps, len(numbers))
    return Odd(name, make, suffix, tuple(numbers), times_s, **settings)


TWO = (*range(48), *range(100, 148))
THREE = (*range(36), *range(100, 136), *range(200, 236))
CLOCKS = [
    _video("ts-restarts", "ts", _of(clocks.restarted), TWO),
    _video("ts-restarts-b-frames", "ts", _of(clocks.restarted_with_b_frames), TWO),
    _video("ts-restarts-hevc", "ts", _of(clocks.restarted, "mpegts", "libx265"), TWO),
    _video("ts-restarts-mpeg2", "ts", _of(clocks.restarted, "mpegts", "mpeg2video"), TWO),
    _video("ps-restarts", "mpg", _of(clocks.restarted, "mpeg", "mpeg2video"), TWO),
    _video("ts-overlaps", "ts", clocks.overlapping, TWO),
    _video("ts-back", "ts", clocks.back, TWO),
    _video("ts-ahead", "ts", clocks.ahead, TWO, times_s=None),
    _video("ts-three", "ts", clocks.three_segments, THREE),
    _video("ts-wraps", "ts", _of(clocks.wrapped), range(72)),
    _video("ts-wraps-b-frames", "ts", _of(clocks.wrapped, options=X264_B), range(72)),
    _video("ts-recorder", "ts", clocks.recorder, range(24, 72)),
    _video(
        "mkv-cluster-at-0", "mkv", _of(clocks.broken_clusters, lambda n, t: 0 if n == 2 else t), range(96), times_s=None
    ),
    _video("mkv-all-clusters-at-0", "mkv", _of(clocks.broken_clusters, lambda n, t: 0), range(96)),
    _video(
        "mkv-clusters-restart", "mkv", _of(clocks.broken_clusters, lambda n, t: t - 2000 if n > 1 else t), range(96)
    ),
    _video(
        "mkv-clusters-swapped",
        "mkv",
        _of(clocks.broken_clusters, lambda n, t: {1: 2000, 2: 1000}.get(n, t), X264_B),
        range(96),
        times_s=None,
    ),
    _video("flv-restarts", "flv", clocks.flv_restarted, TWO),
    _video("flv-back", "flv", clocks.flv_back, TWO),
    _video("mp4-two-edits", "mp4", clocks.two_edits, (*range(24), *range(48, 72))),
    _video("mp4-edit-inside-group", "mp4", clocks.edit_inside_group, range(10, 34)),
    _video("mp4-empty-edit", "mp4", clocks.empty_edit, range(96)),
    _video("mp4-rewound", "mp4", clocks.rewound, (*range(48, 72), *range(24))),
    _video("mp4-repeated", "mp4", clocks.repeated, (*range(24, 48), *range(24, 48))),
    _video("mp4-negative-start", "mp4", _of(clocks.negative_start), range(72)),
    _video("mkv-negative-start", "mkv", _of(clocks.negative_start, "matroska"), range(72)),
    _video("mp4-negative-offsets", "mp4", clocks.negative_offsets, range(72)),
    *(
        _video(f"{suffix}-late-start", suffix, _of(clocks.late_start, container), range(72))
        for suffix, container in (("mkv", "matroska"), ("mp4", "mp4"), ("flv", "flv"), ("ts", "mpegts"), ("nut", "nut"))
    ),
]

IRREGULAR_S = tuple(time / 1000 for time in untimed.irregular_times(96))
CUT_S = tuple(time - IRREGULAR_S[22] for time in IRREGULAR_S[22:])
NTSC = Fraction(60_000, 1001)
RAW = (
    ("libx264", "h264", "h264"),
    ("libx265", "hevc", "hevc"),
    ("mpeg2video", "mpeg2video", "m2v"),
    ("mpeg4", "m4v", "m4v"),
)
UNTIMED = [
    _video("mkv-open-gop-cut", "mkv", _of(untimed.open_gop_cut, "matroska"), range(22, 96), times_s=CUT_S),
    _video("mp4-open-gop-cut", "mp4", _of(untimed.open_gop_cut, "mp4"), range(22, 96), times_s=CUT_S),
    _video("mkv-one-timeless", "mkv", _of(untimed.timeless_blocks, 1), range(72), times_s=None),
    _video("mkv-few-timeless", "mkv", _of(untimed.timeless_blocks, 5, 6, 30), range(72), times_s=None),
    _video("mkv-all-timeless", "mkv", _of(untimed.timeless_blocks, *range(72)), range(72), times_s=None),
    _video(
        "mkv-timeless-b-frames",
        "mkv",
        _of(untimed.timeless_blocks, 5, 6, 40, options=X264_B),
        range(72),
        times_s=None,
        optional=frozenset((*range(4, 10), *range(36, 44))),
    ),
    _video(
        "webm-few-timeless", "webm", _of(untimed.timeless_blocks, 5, 30, codec="libvpx-vp9"), range(72), times_s=None
    ),
    _video("ts-few-timeless", "ts", _of(untimed.timeless_transport, 5, 6, 30), range(72)),
    _video(
        "ts-timeless-b-frames",
        "ts",
        _of(untimed.timeless_transport, 5, 30, options=X264_B),
        range(72),
        times_s=None,
        optional=frozenset((*range(3, 10), *range(27, 34))),
    ),
    _video("ts-timeless-mpeg2", "ts", _of(untimed.timeless_transport, 5, 30, codec="mpeg2video"), range(72)),
    # libav's parser gives the frames of a pack the times of others: one is skipped, one comes twice.
    _video("ps-mpeg2", "mpg", _of(untimed.program_stream), range(72), times_s=None),
    _video("ps-few-times", "mpg", _of(untimed.program_stream, "libx264", X264_B), range(72)),
    *(
        _video(f"{codec}-raw-{round(fps)}", suffix, _of(untimed.elementary, codec, container, fps), range(48), fps)
        for codec, container, suffix in RAW
        for fps in ((24, 50) if codec != "libx264" else (24, 30, 50, NTSC))
    ),
    _video("h264-raw-b-frames", "h264", untimed.elementary_with_b_frames, range(48), 30),
]

STILL_S = tuple((n if n < 5 else n + 48) / 24 for n in range(41))
STRUCTURE = [
    _video("mkv-b-frames", "mkv", _of(structure.b_frames), range(144)),
    _video("mkv-b-frames-hevc", "mkv", _of(structure.b_frames_hevc), range(144)),
    _video("mp4-open-gop", "mp4", _of(structure.open_groups), range(96)),
    _video("mkv-open-gop", "mkv", _of(structure.open_groups, "matroska"), range(96)),
    _video("ts-open-gop", "ts", _of(structure.open_groups, "mpegts"), range(96)),
    _video("mkv-open-gop-hevc", "mkv", _of(structure.open_groups_hevc), range(96)),
    _video("mkv-intra-refresh", "mkv", _of(structure.intra_refresh), range(96)),
    _video("ts-intra-refresh", "ts", _of(structure.intra_refresh, "mpegts"), range(96)),
    _video("mkv-one-group", "mkv", _of(structure.one_group), range(96)),
    _video("mkv-falsely-marked", "mkv", _of(structure.falsely_marked), range(72)),
    _video("mp4-falsely-marked", "mp4", _of(structure.falsely_marked, "mp4"), range(72)),
    _video("mkv-hidden-vp9", "mkv", _of(structure.hidden_vp9), range(72)),
    _video("mp4-hidden-vp9", "mp4", _of(structure.hidden_vp9, "mp4"), range(72)),
    _video(
        "webm-hidden-vp8",
        "webm",
        _of(structure.hidden_vp8),
        [n for n in range(72) if n not in (10, 11, 40)],
        times_s=None,
    ),
    _video("mp4-hidden-av1", "mp4", _of(structure.hidden_av1), range(48)),
    _video("mkv-hidden-av1-apart", "mkv", structure.hidden_av1_apart, range(48)),
    _video("ts-interlaced", "ts", _of(structure.interlaced), range(48), 25),
    _video("ts-interlaced-mpeg2", "ts", _of(structure.interlaced, "mpegts", "mpeg2video"), range(48), 25),
    _video("ts-interlaced-later", "ts", structure.interlaced_later, (*TWO, *range(200, 248)), 25),
    _video("ts-fields", "ts", _of(fields.fields_as_packets), range(48), 25, end_s=48 / 25),
    _video("mkv-fields", "mkv", _of(fields.fields_as_packets, "matroska"), range(48), 25, end_s=48 / 25),
    _video("mp4-fields", "mp4", _of(fields.fields_as_packets, "mp4"), range(48), 25, end_s=48 / 25),
    _video("h264-fields", "h264", _of(fields.fields_as_packets, "h264"), range(48), 25),
    _video("mp4-frozen", "mp4", _of(structure.frozen), range(41), times_s=STILL_S),
    _video("mkv-frozen", "mkv", _of(structure.frozen, "matroska"), range(41), times_s=STILL_S),
    _video("avi-frozen", "avi", _of(structure.frozen, "avi", "mpeg4"), range(41), times_s=STILL_S),
    _video("ts-larger-later", "ts", _of(structure.size_changes), TWO),
    _video("mp4-last-too-long", "mp4", _of(structure.with_last_duration, 535_000), range(25), 1, end_s=25.0),
    _video("mp4-last-too-long-hours", "mp4", _of(structure.with_last_duration, 40_000_000), range(25), 1, end_s=25.0),
    _video("mp4-one-frame", "mp4", _of(structure.one_frame), [7]),
]

PALETTES = (
    ("zmbv", "avi"),
    ("png", "mov"),
    ("gif", "gif"),
    ("smc", "mov"),
    ("msrle", "avi"),
    ("rawvideo", "avi"),
    ("apng", "apng"),
)
SHAPES = [
    *(
        _video(
            f"palette-{codec}", container, _of(shapes.palette, codec, container), range(24), colours=True, times_s=None
        )
        for codec, container in PALETTES
    ),
    _video("mkv-pixel-crop", "mkv", _of(shapes.pixel_crop), range(24), colours=True),
    _video("mkv-pixel-crop-corner", "mkv", _of(shapes.pixel_crop, 64, 0, 0, 32), range(24), colours=True),
    _video("mp4-clap", "mp4", _of(shapes.clean_aperture), range(24), colours=True),
    _video("mp4-clap-corner", "mp4", _of(shapes.clean_aperture, 64, 0, 0, 32), range(24), colours=True),
    *(
        _video(f"{suffix}-cover-first", suffix, _of(shapes.cover_first, container, cover), range(48), colours=True)
        for suffix, container, cover in (("mkv", "matroska", "mjpeg"), ("mp4", "mp4", "mjpeg"), ("mov", "mov", "png"))
    ),
    *(
        _video(f"{suffix}-exif", suffix, _of(shapes.exif, container), range(24), colours=True)
        for suffix, container in (("avi", "avi"), ("mkv", "matroska"), ("mov", "mov"))
    ),
    *(
        _video(f"{container}-icc", container, _of(shapes.icc, container), range(24), colours=True)
        for container in ("mov", "avi", "nut")
    ),
    _video(
        "mp4-sound-longer", "mp4", _of(shapes.with_sound_longer), range(48), warnings=frozenset({"video_ends_early"})
    ),
]

VIDEOS: list[Odd] = [*CLOCKS, *UNTIMED, *STRUCTURE, *SHAPES]

GROUP_1 = frozenset(range(24, 48))
LAST_GROUP = frozenset(range(72, 96))
# Noise for a whole packet: libav's mpegvideo parser adds it to the picture before, and such an AV1 file cannot be opened.
NOISE_UNNOTICED = ("mpeg2-ts", "av1-mp4")
# Noise inside a picture: decoders of HEVC, VP8 and VP9 never notice it, that of H.264 does not always. These do.
NOISE_INSIDE_NOTICED = ("h264-b-mkv", "h264-b-ts", "av1-mp4", "mpeg2-ts", "mpeg4-avi")


def _damaged(name: str, function: Callable[..., bytes], lost: frozenset[int], *arguments: Any, **settings: Any) -> Odd:
    kind = damage.KINDS[name]
    suffix = {"matroska": "mkv", "mpegts": "ts"}.get(kind.container, kind.container)
    return Odd(
        f"{name}-{function.__name__}{''.join(f'-{n}' for n in arguments)}".replace("_", "-"),
        _of(function, kind, *arguments),
        suffix,
        tuple(range(damage.FRAMES)),
        lost=lost,
        truth=(_of(damage.whole, kind),),
        **settings,
    )


DAMAGED: list[Odd] = [
    *(_damaged(name, damage.one_packet, GROUP_1) for name in damage.KINDS if name not in NOISE_UNNOTICED),
    *(_damaged(name, damage.overwritten, GROUP_1) for name in NOISE_INSIDE_NOTICED),
    *(_damaged(name, damage.tail_of_packet, GROUP_1) for name in ("h264-mp4", "mpeg2-ts", "mpeg4-mp4")),
    *(
        _damaged(name, damage.one_packet, frozenset(range(24)), 0, may_refuse=True)
        for name in ("h264-mkv", "hevc-mkv", "mpeg2-ts")
    ),
    *(_damaged(name, damage.one_packet, LAST_GROUP, -1) for name in ("h264-b-mkv", "hevc-ts", "vp9-mkv", "mpeg4-avi")),
    *(
        _damaged(name, damage.one_in_every_group, frozenset(range(96)), may_refuse=True)
        for name in ("h264-mkv", "mpeg4-mp4")
    ),
    *(
        _damaged(name, damage.cut_short, frozenset(range(40, 96)))
        for name in ("h264-mkv", "h264-b-ts", "mpeg4-avi", "vp9-mkv")
    ),
    Odd(
        "ts-second-cut-inside-group",
        clocks.cut_inside_group,
        "ts",
        TWO,
        lost=frozenset(range(100, 124)),
        truth=(_of(clocks.segment, 0, 48), _of(clocks.segment, 100, 148)),
    ),
    Odd(
        "ts-other-shape-later",
        _of(structure.size_changes, "mpegts", (64, 128)),
        "ts",
        TWO,
        lost=frozenset(range(100, 148)),
        truth=(_of(clocks.segment, 0, 48),),
    ),
]


def _refused(name: str, suffix: str, make: Make, *reasons: str, policy: bool | None = None) -> Odd:
    return Odd(name, make, suffix, reasons=frozenset(reasons), policy=policy)


REFUSED: list[Odd] = [
    *(
        _refused(f"encrypted-{codec}", "mp4", _of(shapes.encrypted, codec), "encrypted")
        for codec in ("libx264", "libx265", "libsvtav1")
    ),
    _refused("audio-only", "mp4", _of(shapes.audio_only), "no_video_stream", policy=True),
    _refused("audio-only-mkv", "mkv", _of(shapes.audio_only, "matroska"), "no_video_stream", policy=True),
    _refused("audio-only-ogg", "ogv", _of(shapes.audio_only, "ogg", "libopus"), "no_video_stream", policy=True),
    *(
        _refused(f"still-{codec}", "mp4", _of(shapes.still, codec), "still_image")
        for codec in ("mjpeg", "png", "libwebp")
    ),
    _refused("gif-one-frame", "gif", _of(structure.one_frame, "gif", "gif"), "still_image", policy=True),
    _refused("web-page", "mp4", shapes.web_page, "not_a_video", policy=False),
    _refused("lfs-pointer", "mp4", shapes.pointer_file, "not_a_video", policy=False),
    _refused("zip", "mp4", shapes.archive, "not_a_video", policy=False),
    _refused("no-bytes", "mp4", bytes, "not_a_video", "empty_video", policy=False),
    _refused(
        "mp4-cut-before-index", "mp4", _of(damage.cut_short, damage.KINDS["h264-mp4"]), "undecodable", policy=False
    ),
]

ALL: list[Odd] = [*VIDEOS, *DAMAGED, *REFUSED]


def small() -> bytes:
    """An ordinary video, for a corpus that must give at least one clip."""
    return encode(range(24))
