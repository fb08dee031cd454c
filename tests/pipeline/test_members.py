"""Paired videos in the cutter: the frames, crops and variants of the main video under every clip rule; damage, sizes and durations."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
import pytest

from pipeline.errors import DamagedInput, PolicyReject
from pipeline.records import ClipFailed, FrameChunk, MemberVideo, TimeSpan
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.members import averaged
from tests.pipeline.test_cutting import by_clip, cut, frames_of, planes_of, request_of
from tests.video_files import encode, numbered, textured

FAST = {"preset": "ultrafast", "g": "5"}
SPANS = (TimeSpan(0.2, 1.1), TimeSpan(0.4, 1.3))


def later(index: int, width: int, height: int) -> np.ndarray:
    return numbered(index + 5, width, height)


@pytest.fixture(scope="module")
def texture() -> bytes:
    return encode(40, size=(64, 96), fps=25, picture=textured, options=FAST)


@pytest.fixture(scope="module")
def numbers() -> tuple[bytes, bytes]:
    """Two videos; frame i of the second shows picture i + 5."""
    return encode(40, fps=25, options=FAST), encode(40, fps=25, options=FAST, picture=later)


def request(main: bytes, members: dict[str, bytes], **clips: object) -> CutRequest:
    made = request_of(main, frames=5, **clips)
    videos = tuple(MemberVideo(name, data, f"key.{name}.mp4") for name, data in sorted(members.items()))
    spans = SPANS if clips.get("select") == "spans:tile" else ()
    return dataclasses.replace(made, video=dataclasses.replace(made.video, members=videos, time_spans=spans))


def of_member(answers: list, member: str) -> dict[int, list[FrameChunk]]:
    return by_clip([chunk for chunk in answers if isinstance(chunk, FrameChunk) and chunk.member == member])


RULES = [
    {"select": "tile"},
    {"select": "slide:3"},
    {"select": "whole"},
    {"select": "spans:tile"},
    {"select": "tile", "fps": 40},
    {"select": "tile", "crop": "letterbox"},
    {"select": "tile", "crop": "random:3", "variants": "flip", "size": "32x32"},
    {"select": "spans:tile", "crop": "random:2", "variants": "flip", "size": "32x32"},
]


@pytest.mark.parametrize("clips", RULES, ids=lambda clips: "-".join(map(str, clips.values())))
def test_a_member_that_is_the_main_video_gives_its_pixels(texture, clips):
    _, answers, _ = cut(request(texture, {"control": texture}, **clips))
    main, control = of_member(answers, ""), of_member(answers, "control")
    assert main.keys() == control.keys()
    for clip, chunks in main.items():
        assert [chunk.pts_s for chunk in chunks] == [chunk.pts_s for chunk in control[clip]]
        np.testing.assert_array_equal(planes_of(chunks), planes_of(control[clip]))
    _, alone, _ = cut(request(texture, {}, **clips))
    for clip, chunks in of_member(alone, "").items():
        np.testing.assert_array_equal(planes_of(chunks), planes_of(main[clip]))


@pytest.mark.parametrize("select", ["tile", "slide:2", "spans:tile"])
def test_frame_i_of_a_member_belongs_to_frame_i(numbers, select):
    _, answers, ended = cut(request(numbers[0], {"control": numbers[1]}, select=select))
    control = of_member(answers, "control")
    for clip, chunks in of_member(answers, "").items():
        assert frames_of(control[clip]) == [(number + 5) % 16 for number in frames_of(chunks)]
    assert ended.frames_decoded > 40


@pytest.mark.parametrize("select", ["tile", "spans:tile"])
def test_masks_come_with_the_chunks_of_the_main_video(texture, select):
    made = request(texture, {"mask": texture}, select=select, variants="flip")
    _, answers, _ = cut(made)
    assert {chunk.member for chunk in answers} == {""}
    for chunk in answers:
        wanted = averaged(chunk.planes_T3HW[:, 0], made.rules, first=chunk.first)
        np.testing.assert_array_equal(chunk.masks["mask"], wanted)
        assert wanted.shape == (1, -(-len(chunk.pts_s) // 4), 6, 6)


def test_a_mask_is_averaged_over_the_pixels_and_frames_of_a_latent_cell():
    rules = request_of(b"").rules
    luma = np.full((5, 16, 8), 16, np.uint8)
    luma[0, :8], luma[1:3, 8:], luma[4, 8:, :4] = 235, 235, 255  # brighter than white counts as white
    np.testing.assert_allclose(averaged(luma, rules, first=True), [[[[1], [0]], [[0], [0.625]]]])
    np.testing.assert_allclose(averaged(luma[1:], rules, first=False), [[[[0], [0.625]]]])


def test_a_damaged_frame_of_a_member_fails_the_clips_that_show_it(numbers):
    broken = bytearray(intra := encode(40, fps=25, options={"preset": "ultrafast", "g": "1"}))
    with av.open(io.BytesIO(intra)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
        broken[packet.pos + 4 : packet.pos + packet.size] = bytes(packet.size - 4)
    _, answers, _ = cut(request(numbers[0], {"control": bytes(broken)}, select="tile"))
    (failed,) = [answer for answer in answers if isinstance(answer, ClipFailed)]
    assert failed.clip == 2  # frames 10 to 14
    assert failed.reject.message.startswith("control (key.control.mp4): ")
    whole = {chunk.clip for chunk in answers if isinstance(chunk, FrameChunk) and chunk.last and chunk.member}
    assert whole == {0, 1, 3, 4, 5, 6, 7}


def test_a_member_may_have_another_resolution_but_not_another_picture(texture):
    for size, mismatch in [((32, 48), False), ((160, 242), False), ((64, 64), True)]:
        member = encode(40, size=size, fps=25, picture=textured, options=FAST)
        made = request(texture, {"control": member}, size="32x48")
        if not mismatch:
            assert of_member(cut(made)[1], "control")
            continue
        with pytest.raises(DamagedInput, match=r"control \(key.control.mp4\): 64x64 pixels, the main video has 96x64"):
            Cutter(made).open()


def test_lengths_are_compared(texture):
    for frames, fps, wanted in [
        (39, 25, "39 frames, the main video has 40"),
        (40, 20, "2.000 s, the main video has 1.600 s"),
    ]:
        member = encode(frames, size=(64, 96), fps=fps, picture=textured, options=FAST)
        with pytest.raises(DamagedInput, match=wanted) as caught:
            Cutter(request(texture, {"control": member})).open()
        assert caught.value.reason == "member_mismatch"


def test_a_member_is_not_enlarged_unless_the_job_allows_it_and_a_mask_always(texture):
    small = encode(40, size=(32, 48), fps=25, picture=textured, options=FAST)
    with pytest.raises(PolicyReject, match="32x48 pixels, would have to be enlarged to 48x72") as caught:
        Cutter(request(texture, {"control": small})).open()
    assert caught.value.reason == "too_small"
    assert of_member(cut(request(texture, {"control": small}, upscale=True))[1], "control")
    assert cut(request(texture, {"mask": small}))[1][0].masks


@pytest.mark.parametrize("select", ["tile", "spans:tile"])
def test_a_member_whose_frames_shrink_costs_its_clips_and_a_mask_does_not(texture, select):
    halves = [encode(20, size=(side, side * 3 // 2), fps=25, container="mpegts", options=FAST) for side in (64, 32)]
    shrinking = b"".join(halves)
    _, answers, _ = cut(request(texture, {"control": shrinking}, select=select))
    failed = [answer.reject.reason for answer in answers if isinstance(answer, ClipFailed)]
    assert failed
    assert set(failed) == {"size_changed"}
    _, answers, _ = cut(request(texture, {"mask": shrinking}, select=select))
    assert all(isinstance(answer, FrameChunk) for answer in answers)


def test_a_member_that_cannot_be_decoded_is_named(texture):
    with pytest.raises(DamagedInput, match=r"control \(key.control.mp4\): "):
        Cutter(request(texture, {"control": b"no video"})).open()
