"""Variants of a clip: crops, mirrored frames, black bars. What they show, and that jobs without them stay as they were."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from pipeline.config import ClipConfig, validate
from pipeline.engine.decoders.lane_worker import LaneWorker
from pipeline.engine.worker.clip_id import clip_id
from pipeline.errors import ConfigError, SourceRefused
from pipeline.records import (
    Bucket,
    ClipFailed,
    ClipPlan,
    FrameChunk,
    OpenedVideo,
    Sample,
    StillOpening,
    VideoEnded,
    split_id,
    stable_hash,
)
from pipeline.video import black_bars
from pipeline.video.black_bars import BlackBars, content_box
from pipeline.video.clips import resolve_rules
from pipeline.video.crops import random_places
from pipeline.video.cutting import CutRequest, Cutter
from pipeline.video.decode import Video, open_video
from pipeline.video.decode.planes import Geometry
from tests.pipeline.test_cutting import by_clip, planes_of, request_of
from tests.video_files import encode, luma_of, numbered, textured

LOSSLESS = {"preset": "ultrafast", "qp": "0"}


def cut(request: CutRequest) -> tuple[OpenedVideo, dict[str, np.ndarray], VideoEnded]:
    """The opened video, planes of each variant of its only clip, the end."""
    opened, answers, ended = everything(request)
    planes = by_clip(answers)
    return opened, {plan.variant: planes_of(planes[plan.index]) for plan in opened.clips}, ended


def everything(request: CutRequest) -> tuple[OpenedVideo, list[FrameChunk | ClipFailed], VideoEnded]:
    cutter, answers = Cutter(request), []
    opened = cutter.open()
    while isinstance(opened, StillOpening):
        opened = cutter.next()
    while not isinstance(answer := cutter.next(), VideoEnded):
        answers.append(answer)
    return opened, answers, answer


@pytest.fixture(scope="module")
def wide() -> bytes:
    return encode(24, size=(48, 96), options={**LOSSLESS, "g": "8"}, fps=8, picture=textured)


@pytest.fixture(scope="module")
def tall() -> bytes:
    return encode(5, size=(96, 48), options=LOSSLESS, fps=8, picture=textured)


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_rules_and_ids_of_jobs_without_variants_are_those_of_before():
    clips = {"frames": [17, 5], "size": ["256x256", "256x384"], "select": "tile", "fps": 8}
    rules = resolve_rules(validate(ClipConfig, clips), 4, 8, "leanvae")
    assert stable_hash(rules.to_dict()) == "6d2b9b2e9211c384f83a813a1dc054f7"
    assert rules.variants == ("base",)
    plan = ClipPlan(2, 34, Bucket(17, 256, 256), 8.0, 4.25, 256, 455, 0, 99)
    name = clip_id(Sample("dir/a b", 3, "s3://bucket/a.tar", b"", "mp4"), "etag", plan, "f0e1d2c3" + "0" * 24)
    assert name == "dir_a_b-0002-1efe93c458bc0fcf"


@pytest.mark.parametrize("option", [{"crop": "top"}, {"crop": "letterbox"}, {"crop": "random:2"}, {"variants": "flip"}])
def test_each_option_is_part_of_the_rules_that_the_fingerprint_hashes(option):
    plain, other = (resolve_rules(validate(ClipConfig, clips), 4, 8, "leanvae") for clips in ({}, option))
    assert stable_hash(plain.to_dict()) != stable_hash(other.to_dict())
    more = resolve_rules(validate(ClipConfig, {"crop": "random:3"}), 4, 8, "leanvae")
    assert stable_hash(more.to_dict()) != stable_hash(other.to_dict())


@pytest.mark.parametrize("value", ["random", "random:0", "random:65", "left", "random:-1"])
def test_a_crop_that_is_none_is_refused_with_those_there_are(value):
    with pytest.raises(ConfigError, match=r"crop: expected center, top, letterbox or random:K with K of 1 to 64"):
        validate(ClipConfig, {"crop": value})


# --- what variants show -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_frames", [0, 4, 8])
def test_the_mirrored_clip_shows_the_mirrored_frames_of_one_decoding(wide, chunk_frames):
    plain = cut(request_of(wide, frames=17, chunk_frames=chunk_frames))
    opened, planes, ended = cut(request_of(wide, frames=17, chunk_frames=chunk_frames, variants="flip"))
    assert [(plan.index, plan.clip_index, plan.variant) for plan in opened.clips] == [(0, 0, "base"), (1, 0, "flip")]
    assert np.array_equal(planes["base"], plain[1]["base"])
    assert np.array_equal(planes["flip"], planes["base"][..., ::-1])
    assert ended.frames_decoded == plain[2].frames_decoded


def whole_frames_of(data: bytes, count: int, height: int, width: int) -> np.ndarray:
    video = open_video(data, request_of(data).limits)
    planes = video.planes(np.arange(count), Geometry(height, width, 0, 0, height, width))
    video.close()
    return planes


def test_random_crops_are_windows_of_the_scaled_frame_and_mirrored_with_flip(wide):
    opened, planes, ended = cut(request_of(wide, frames=5, size="32x32", crop="random:3", variants="flip"))
    assert list(planes) == ["crop1", "crop2", "crop3", "crop1-flip", "crop2-flip", "crop3-flip"]
    frames = whole_frames_of(wide, 5, 32, 64)
    for plan in opened.clips:
        window = frames[..., plan.crop_top : plan.crop_top + 32, plan.crop_left : plan.crop_left + 32]
        assert np.array_equal(planes[plan.variant], window[..., ::-1] if plan.mirrored else window)
    assert len({plan.crop_left for plan in opened.clips}) == 3
    assert ended.frames_decoded == cut(request_of(wide, frames=5, size="32x32"))[2].frames_decoded


def test_places_of_random_crops_depend_on_the_video_and_the_clip_alone(wide):
    def places(count: int, **other: object) -> list[tuple[str, int]]:
        request = request_of(wide, frames=5, size="32x32", crop=f"random:{count}", select="tile", **other)
        renamed = dataclasses.replace(request, video=dataclasses.replace(request.video, key="other", uri="elsewhere"))
        assert everything(renamed)[0].clips == everything(request)[0].clips
        return [(plan.clip_index, plan.variant, plan.crop_left) for plan in everything(request)[0].clips]

    four = places(4)
    assert places(2) == [place for place in four if place[1] in ("crop1", "crop2")]
    assert places(4, chunk_frames=4) == four
    assert len({left for _, _, left in four}) > 4  # each clip has its own


def test_memory_of_a_decoder_does_not_grow_with_the_number_of_variants(wide):
    """Planes of one variant are 21 x 3 x 48 x 48 bytes, 145 kB; those of all 128 are 19 MB."""
    cutter = Cutter(request_of(wide, frames=21, size="48x48", crop="random:64", variants="flip", chunk_frames=0))
    opened = cutter.open()
    assert len(opened.clips) == 128
    tracemalloc.start()
    try:
        seen = {cutter.next().clip for _ in opened.clips}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        cutter.close()
    assert len(seen) == 128
    assert peak < 3_000_000


def test_more_crops_than_places_repeat_and_say_so(wide):
    opened, _, _ = cut(request_of(wide, frames=5, size="48x88", crop="random:16"))
    assert {plan.warnings for plan in opened.clips} == {("random_crops:9/16",)}
    assert {plan.crop_left for plan in opened.clips} == set(range(9))
    assert random_places((0, 0), 3, ["x"]) == [(0, 0)] * 3


def test_top_takes_the_upper_part(tall):
    opened, planes, _ = cut(request_of(tall, frames=5, size="48x48", crop="top"))
    assert (opened.clips[0].crop_top, opened.clips[0].scaled_height) == (0, 96)
    assert np.array_equal(planes["base"], whole_frames_of(tall, 5, 96, 48)[:, :, :48])


def test_variants_of_overlapping_clips_share_frames(wide):
    request = request_of(wide, frames=9, size="32x32", select="slide:3", crop="random:2", variants="flip")
    opened, answers, ended = everything(request)
    assert ended.frames_decoded == 24
    frames = whole_frames_of(wide, 24, 32, 64)
    planes = by_clip(answers)
    for plan in opened.clips:
        window = frames[plan.start : plan.start + 9, ..., plan.crop_left : plan.crop_left + 32]
        assert np.array_equal(planes_of(planes[plan.index]), window[..., ::-1] if plan.mirrored else window)


def test_a_frame_that_cannot_be_decoded_fails_all_variants_and_no_other_clip(monkeypatch, wide):
    show = Video.show

    def broken(self, index):
        if index == 7:
            from pipeline.errors import DamagedInput

            raise DamagedInput("corrupt_stream", "damaged", stage="decode")
        return show(self, index)

    monkeypatch.setattr(Video, "show", broken)
    opened, answers, _ = everything(request_of(wide, frames=5, select="tile", variants="flip", crop="random:2"))
    failed = [answer for answer in answers if isinstance(answer, ClipFailed)]
    assert [answer.clip for answer in failed] == [4, 5, 6, 7]
    assert [answer.reject.clip for answer in failed] == [4, 5, 6, 7]
    finished = {answer.clip for answer in answers if isinstance(answer, FrameChunk) and answer.last}
    assert finished == {plan.index for plan in opened.clips} - {4, 5, 6, 7}


def test_ids_of_variants_differ_in_the_name_of_the_variant_only(wide):
    request = request_of(wide, frames=5, select="tile", variants="flip", crop="random:2")
    names = [clip_id(request.video, "etag", plan, "f" * 32) for plan in everything(request)[0].clips]
    assert len(set(names)) == len(names)
    split = [split_id(name) for name in names]
    assert [variant for _, variant in split[:4]] == ["crop1", "crop2", "crop1-flip", "crop2-flip"]
    assert len({stem for stem, _ in split}) == len(names) // 4
    assert split_id("key-flip-0000-1efe93c458bc0fcf") == ("key-flip-0000-1efe93c458bc0fcf", "base")


# --- black bars -------------------------------------------------------------------------------------------------------


def barred(index: int, width: int, height: int, *, top: int = 0, bottom: int = 0, side: int = 0) -> np.ndarray:
    """Planar YUV 4:2:0: a grey that changes from frame to frame, between black bars."""
    frame = numbered(index + 4, width, height)
    luma = frame[:height]
    luma[:top], luma[height - bottom :], luma[:, :side], luma[:, width - side :] = 16, 16, 16, 16
    return frame


def film(*bars: dict[str, int], size: tuple[int, int] = (96, 96)) -> bytes:
    """A frame for each of `bars`."""
    frames = [barred(i, size[1], size[0], **each) for i, each in enumerate(bars)]
    return encode(frames, size=size, options=LOSSLESS, fps=8)


def test_black_bars_are_cut_off_and_the_row_says_which():
    data = film(*[{"top": 24, "bottom": 20}] * 5)
    opened, planes, _ = cut(request_of(data, frames=5, size=["48x48", "32x64"], crop="letterbox"))
    (plan,) = opened.clips
    assert plan.warnings == ("letterbox:96x52+0+24",)
    assert str(plan.bucket) == "5x32x64"  # that of what is inside the bars, 96x52
    for frame, luma_HW in enumerate(planes["base"][:, 0]):
        assert abs(luma_HW.astype(int) - luma_of(frame + 4)).max() <= 2  # nothing of the bars, not even at the edges


def test_bars_that_change_within_a_clip_leave_what_every_frame_shows():
    data = film({"top": 24, "bottom": 24}, {"top": 12, "bottom": 32}, *[{"top": 24, "bottom": 24}] * 3)
    opened, _, _ = cut(request_of(data, frames=5, size="32x32", crop="letterbox"))
    assert opened.clips[0].warnings == ("letterbox:96x60+0+12",)


def test_each_clip_has_its_own_bars_and_black_frames_say_nothing():
    sides, none, black = {"side": 24}, {}, {"top": 96}
    data = film(*[sides] * 4, black, *[none] * 5, *[black] * 5, sides, black, black, black, sides)
    opened, answers, _ = everything(request_of(data, frames=5, size="32x32", select="tile", crop="letterbox"))
    found = [plan.warnings for plan in opened.clips]
    assert found == [("letterbox:48x96+24+0",), (), (), ("letterbox:48x96+24+0",)]
    assert len(by_clip(answers)) == 4


def test_clips_that_overlap_have_the_bars_of_all_of_them():
    data = film(*[{"top": 24}] * 6, *[{"top": 16}] * 6)
    opened, answers, ended = everything(request_of(data, frames=5, size="32x32", select="slide:3", crop="letterbox"))
    assert {plan.warnings for plan in opened.clips} == {("letterbox:96x80+0+16",)}
    for plan in opened.clips:
        shown = planes_of(by_clip(answers)[plan.index])[:, 0, -1, 0]
        assert shown.tolist() == [luma_of(plan.start + n + 4) for n in range(5)]
    assert ended.frames_decoded == 2 * 11


def test_content_of_its_full_size_is_not_scaled():
    data = film(*[{"top": 16, "bottom": 16}] * 5, size=(96, 64))
    opened, planes, _ = cut(request_of(data, frames=5, size="64x64", crop="letterbox"))
    plan = opened.clips[0]
    assert (plan.scaled_height, plan.scaled_width, plan.crop_top, plan.crop_left) == (96, 64, 16, 0)
    assert np.array_equal(planes["base"], whole_frames_of(data, 5, 96, 64)[:, :, 16:80])


def test_clips_whose_content_is_too_small_are_rejected_and_the_others_cut():
    data = film(*[{"top": 32, "bottom": 32}] * 5, *[{}] * 5)
    opened, answers, _ = everything(request_of(data, frames=5, size="64x64", select="tile", crop="letterbox"))
    assert [plan.start for plan in opened.clips] == [5]
    assert [(plan.index, plan.warnings) for plan in opened.clips] == [(0, ())]
    (reject,) = opened.rejects
    assert (reject.reason, reject.policy) == ("too_small", True)
    assert "1 clips show 32x96 pixels inside black bars" in reject.message
    assert list(by_clip(answers)) == [0]
    opened, _, _ = everything(
        request_of(data, frames=5, size="64x64", select="tile", crop="letterbox", upscale=True, variants="flip")
    )
    assert [plan.start for plan in opened.clips] == [0, 0, 5, 5]
    assert opened.rejects == ()


def test_a_dark_clip_is_not_taken_for_one_with_bars():
    luma = np.full((96, 96), 16, np.uint8)
    luma[40:50, 40:50] = 200
    assert content_box(luma) == (40, 50, 40, 50)
    bars = BlackBars(np.arange(3), 96, 96)
    bars._boxes_N4[:] = content_box(luma)
    assert bars.inside(np.arange(3)) is None
    assert content_box(np.full((96, 96), 24, np.uint8)) is None
    luma[5, 7] = 200  # a speck in the bar
    assert content_box(luma) == (40, 50, 40, 50)


def test_a_decoder_answers_while_it_looks_for_bars(monkeypatch):
    """So that a long video is not taken for one that hangs; the plan, which cuts nothing, gets the same clips."""
    monkeypatch.setattr("pipeline.engine.decoders.lane_worker.limit_address_space", lambda extra_bytes: None)
    monkeypatch.setattr("os.nice", lambda value: 0)
    monkeypatch.setattr("gc.freeze", lambda: None)
    monkeypatch.setattr(black_bars, "FRAMES_AT_ONCE", 4)
    data = film(*[{"top": 24, "bottom": 24}] * 10)
    request = request_of(data, frames=5, size="32x32", select="tile", crop="letterbox")
    found = {}
    for headers_only in (True, False):
        worker = LaneWorker(1 << 40, 0)
        answers = [worker.open(dataclasses.replace(request, headers_only=headers_only))]
        while not isinstance(answers[-1], OpenedVideo):
            answers.append(worker.pull())
        assert [type(answer) for answer in answers] == [StillOpening] * 3 + [OpenedVideo]
        found[headers_only] = answers[-1].clips
        assert isinstance(worker.pull(), VideoEnded if headers_only else FrameChunk)
        worker.close()
    assert found[True] == found[False]
    assert len(found[True]) == 2


def test_storage_that_fails_while_bars_are_looked_for_is_not_damage(monkeypatch):
    def refused(self, index):
        raise SourceRefused("no permission")

    cutter = Cutter(request_of(film(*[{"top": 24}] * 5), frames=5, size="32x32", crop="letterbox"))
    assert isinstance(cutter.open(), StillOpening)
    monkeypatch.setattr(Video, "show", refused)
    with pytest.raises(SourceRefused):
        cutter.next()
