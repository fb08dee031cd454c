"""Cut and spliced streams, lost packets and packets without a picture: the frames are those of libav, damage stays in its group."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import cache

import av
import numpy as np
import pytest

from pipeline.config import DecodeConfig, validate
from pipeline.errors import DamagedInput
from pipeline.video.decode import open_video
from pipeline.video.decode.container import OpenContainer
from pipeline.video.decode.packets import read_packets
from tests.odd_inputs import structure
from tests.odd_inputs.clocks import segment
from tests.odd_inputs.damage import Kind, lost_packets
from tests.odd_inputs.numbered import MPEG, X264, X265, encode, number_in
from tests.odd_inputs.remux import harming, packets_of, remux, replaced

LIMITS = validate(DecodeConfig, {})
OPEN_X264 = {
    **X264,
    "bf": "3",
    "preset": "veryfast",
    "x264-params": "open-gop=1:keyint=24:min-keyint=24:scenecut=0:b-adapt=0",
}
OPEN_X265 = {
    "preset": "ultrafast",
    "x265-params": "log-level=none:pools=none:frame-threads=1:keyint=24:min-keyint=24:scenecut=0:open-gop=1:bframes=4:b-adapt=0",
}
LOST = -1


def shown(data: bytes) -> tuple[list[int], tuple[str, ...]]:
    """Numbers of the frames in order, `LOST` for a rejected one; kinds of warnings."""
    video = open_video(data, LIMITS)
    numbers = []
    for index in range(video.info.num_frames):
        try:
            numbers.append(number_in(video.show(index).frame))
        except DamagedInput:
            numbers.append(LOST)
    video.close()
    return numbers, tuple(sorted({warning.partition(":")[0] for warning in video.info.warnings} - {"untagged_color"}))


@cache
def opened_groups(container: str) -> bytes:
    """96 frames of H.264; each keyframe but the first is followed by pictures that are shown before it."""
    return encode(range(96), container, "libx264", options=OPEN_X264)


@pytest.mark.parametrize("container", ["matroska", "mpegts", "flv"])
def test_a_copy_from_a_keyframe_of_an_open_group_begins_with_that_keyframe(container):
    data = opened_groups(container)
    _, packets = packets_of(data)
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    assert shown(remux(data, container, lambda ps: ps[keys[1] :])) == (list(range(24, 96)), ("undecodable_start",))
    one_group = remux(data, container, lambda ps: ps[keys[1] : keys[2]])
    assert shown(one_group) == (list(range(24, 45)), ("undecodable_start",))


def test_a_damaged_packet_costs_only_its_open_group():
    data = encode(range(96), "matroska", "libx265", options=OPEN_X265)
    numbers, _ = shown(remux(data, "matroska", harming(30)))
    assert numbers == [*range(30), *[LOST] * 18, *range(48, 96)]
    started_inside, warnings = shown(remux(data, "matroska", lambda ps: ps[27:]))
    assert started_inside == list(range(48, 96))
    assert warnings == ("undecodable_start",)


def between(nal: bytes) -> Callable[[list], Iterator[av.Packet]]:
    """An edit that puts packets of `nal` alone behind the packets 29 and 50."""

    def edit(packets: list) -> Iterator[av.Packet]:
        for place, packet in enumerate(packets):
            yield packet
            if place in (29, 50):
                extra = av.Packet(nal)
                extra.time_base = packet.time_base
                extra.pts, extra.dts = (time + packet.duration // 2 for time in (packet.pts, packet.dts))
                yield extra

    return edit


@pytest.mark.parametrize(
    ("codec", "options", "container", "nal"),
    [
        ("libx265", X265, "mp4", b"\0\0\0\x03\x46\x01\x50"),  # access unit delimiter
        ("libx264", X264, "mp4", b"\0\0\0\x02\x09\xf0"),
        ("libx264", X264, "flv", b"\0\0\0\x02\x09\xf0"),
        ("libx264", X264, "matroska", b"\0\0\0\x01\x0a"),  # end of sequence
        ("libx264", X264, "matroska", b"\0\0\0\x05\x06\x05\x01\x00\x80"),  # a message
    ],
)
def test_a_packet_without_a_picture_shows_no_frame_and_damages_none(codec, options, container, nal):
    data = remux(encode(range(72), container, codec, options=options), container, between(nal))
    numbers, warnings = shown(data)
    assert numbers == list(range(72))
    assert warnings == ()


def test_a_bad_message_of_h265_does_not_damage_its_picture():
    message = bytes([39 << 1, 1, 137, 2, 1, 2, 0x80])  # mastering display, cut short
    unit = len(message).to_bytes(4, "big") + message
    data = encode(range(48), "mp4", "libx265", options=X265)
    numbers, _ = shown(
        remux(data, "mp4", lambda ps: (replaced(p, unit + bytes(p)) if n else p for n, p in enumerate(ps)))
    )
    assert numbers == list(range(48))


def test_lost_transport_packets_are_damage_or_a_warning():
    whole = encode(range(96), "mpegts", "libx265", options=X265)
    clean, _ = shown(whole)
    assert clean == list(range(96))
    said = 0
    for lost in (60, 134, 95, 120):
        numbers, warnings = shown(whole[: lost * 188] + whole[(lost + 1) * 188 :])
        said += "transport_errors" in warnings
        if lost in (120, 134):  # inside a group
            assert LOST in numbers
            assert [n for n in numbers if n >= 72] == list(range(72, 96))
    assert said == 4


@pytest.mark.parametrize("again_s", [3000, 70, 0])
def test_an_flv_clock_that_falls_far_back_is_continued(again_s):
    data = segment(0, 48, "flv", "libx264", 3600) + segment(100, 148, "flv", "libx264", again_s)[13:]
    assert shown(data) == ([*range(48), *range(100, 148)], ("clock_restarts",))


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
def test_pictures_missing_by_h264_frame_numbers_damage_the_frames_predicted_from_them(container):
    numbers, _ = shown(lost_packets(Kind("libx264", container), 30))
    assert numbers == [*range(30), *[LOST] * 17, *range(48, 96)]


def test_a_clock_break_inside_a_continuous_group_damages_no_frame():
    data = encode(range(72), "mpegts", "libx264", options=X264)

    def reset(packets: list) -> Iterator[av.Packet]:
        first = packets[0].dts
        for packet in packets:
            packet.pts, packet.dts = packet.pts - first + 126_000, packet.dts - first + 126_000
            yield packet

    joined = remux(data, "mpegts", lambda ps: reset(ps[:30])) + remux(data, "mpegts", lambda ps: reset(ps[30:]))
    assert shown(joined) == (list(range(72)), ("clock_restarts",))


def test_one_outlier_time_does_not_invalidate_others():
    def edit(packets: list) -> Iterator[av.Packet]:
        for place, packet in enumerate(packets):
            packet.pts += int(20 / packet.time_base) if place == 30 else 0
            yield packet

    numbers, warnings = shown(remux(encode(range(72), "mpegts", "libx264", options=X264), "mpegts", edit))
    assert numbers == list(range(72))
    assert "untimed_frames" in warnings


def test_a_long_damaged_group_at_the_beginning_is_rejected_and_later_clips_are_not():
    options = {**X264, "g": "1200", "keyint_min": "1200"}
    data = encode([n % 256 for n in range(1300)], "matroska", options=options, size=(64, 64))
    rest = [n % 256 for n in range(1200, 1300)]
    concealed, _ = shown(remux(data, "matroska", harming(0, keep=1000)))
    assert concealed == [*[LOST] * 1200, *rest]
    # Without its header libav does not see a keyframe either: the recording begins inside a group.
    assert shown(remux(data, "matroska", harming(0, keep=60))) == (rest, ("undecodable_start",))


def test_damage_at_the_beginning_is_found_when_frames_are_deinterlaced():
    numbers, warnings = shown(remux(structure.interlaced("matroska"), "matroska", harming(1)))
    assert len(numbers) == 48
    assert numbers[26:] == list(range(26, 48))
    assert set(numbers[1:24]) == {LOST}
    assert warnings == ("deinterlaced",)


def test_program_streams_that_leap_at_a_join_lose_no_time_and_at_most_a_frame():
    options = {**MPEG, "bf": "2"}
    data = segment(0, 48, "mpeg", "mpeg2video", 0, options=options)
    data += segment(100, 148, "mpeg", "mpeg2video", 20, options=options)
    video = open_video(data, LIMITS)
    numbers, warnings = shown(data)
    assert video.end_s == pytest.approx(4.0, abs=0.1)
    assert LOST not in numbers
    assert len(set(range(48)) - set(numbers)) <= 1
    assert numbers[-48:] == list(range(100, 148))
    assert "clock_restarts" in warnings


def test_an_absurd_duration_of_the_last_frame_is_ignored_without_an_end_in_the_header():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuv420p", {"preset": "ultrafast"}
        packets = []
        for _ in range(25):
            packets += stream.encode(av.VideoFrame(64, 64, "yuv420p"))
        packets += stream.encode()
        packets[-1].duration *= 9000
        output.mux(packets)
    opened = OpenContainer(buffer.getvalue(), LIMITS)
    table = read_packets(opened, LIMITS)
    opened.close()
    assert table.end_s - table.times_s[0] == pytest.approx(1.0, abs=0.05)
    assert (np.diff(table.times_s) > 0).all()
