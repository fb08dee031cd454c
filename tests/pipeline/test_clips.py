"""Choice of clips: buckets, modes, the sampling grid, and policy rejects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ClipConfig, validate
from pipeline.errors import ConfigError
from pipeline.records import Bucket, ClipPlan, ClipRules, Reject, VideoInfo
from pipeline.video.clips import (
    choose_clips,
    frames_on_screen,
    grid_length,
    resolve_rules,
    uncovered_tail,
    whole_frames,
)


def rules_of(**values: object) -> ClipRules:
    return resolve_rules(validate(ClipConfig, values), 4, 8, "leanvae")


def info_of(frames: int, fps: float, height: int = 360, width: int = 640) -> VideoInfo:
    return VideoInfo(
        codec="h264",
        pixel_format="yuv420p",
        width=width,
        height=height,
        coded_width=width,
        coded_height=height,
        rotation=0,
        sample_aspect=(1, 1),
        fps=fps,
        num_frames=frames,
        duration_s=frames / fps,
        color_matrix="bt709",
        color_range="limited",
        content_hash="0" * 32,
    )


def planned(
    rules: ClipRules, frames: int = 100, fps: float = 25.0, height: int = 360, width: int = 640
) -> tuple[tuple[ClipPlan, ...], tuple[Reject, ...]]:
    info = info_of(frames, fps, height, width)
    return choose_clips(info, np.arange(frames) / fps, frames / fps, rules, key="k", uri="u")


def spans(clips: tuple[ClipPlan, ...]) -> list[tuple[int, int]]:
    return [(clip.start, clip.start + clip.bucket.frames) for clip in clips]


# --- rules ------------------------------------------------------------------------------------------------------------


def test_defaults_resolve():
    rules = rules_of()
    assert rules.buckets == (Bucket(17, 256, 256),)
    assert (rules.select, rules.select_arg, rules.fps, rules.area, rules.frame_counts) == ("head", 0, None, None, (17,))


def test_frames_times_sizes_and_explicit_buckets():
    rules = rules_of(frames=[17, 5], size=["128x128", "64x192"])
    assert rules.frame_counts == (5, 17)
    assert len(rules.buckets) == 4
    rules = rules_of(buckets=["49x128x128", "17x256x256"], select="slide:8")
    assert (rules.buckets, rules.select_arg) == ((Bucket(17, 256, 256), Bucket(49, 128, 128)), 8)
    assert rules_of(select="whole", frames=17).buckets == (Bucket(0, 256, 256),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 16}, r"^clips\.frames: leanvae takes 4n\+1 frames, got 16; counts near it that fit: 13 or 17$"),
        (
            {"size": "250x256"},
            r"^clips\.size: leanvae takes sides that are multiples of 8, got 250x256; near it: 248x256$",
        ),
        ({"buckets": "18x256x256"}, r"^clips\.buckets: .* got 18; counts near it that fit: 17 or 21$"),
        ({"buckets": "17x256x4"}, r"^clips\.buckets: .* got 256x4; near it: 256x8$"),
        ({"size": "area:256x256", "multiple_of": 12}, r"^clips\.multiple_of: .* got 12; near it: 16$"),
        ({"size": "area:8x8", "multiple_of": 16}, r"^clips\.size: an area of 64 pixels holds no 16x16 block$"),
    ],
)
def test_frame_counts_and_sizes_that_the_network_does_not_take_are_config_errors(values, message):
    with pytest.raises(ConfigError, match=message):
        rules_of(**values)


# --- the sampling grid ------------------------------------------------------------------------------------------------


def test_source_rate_is_every_frame():
    assert grid_length(7, 99.0, None) == 7
    assert frames_on_screen(np.array([0, 0.1, 5.0]), 0, 3, None).tolist() == [0, 1, 2]


def test_on_screen_is_the_last_frame_not_after_the_time():
    times_s = np.array([0.0, 0.01, 0.02, 0.5, 0.51, 1.4])
    assert grid_length(6, 1.5, 4.0) == 6
    assert frames_on_screen(times_s, 0, 6, 4.0).tolist() == [0, 2, 3, 4, 4, 4]


@pytest.mark.parametrize("fps", [24.0, 30.0, 29.97, 60.0, 25.0])
def test_times_rounded_to_milliseconds_lose_and_repeat_nothing(fps):
    # Matroska stores 0.033, 0.067, 0.1: sampled at its own rate every frame must come exactly once.
    times_s = np.round(np.arange(300) / fps, 3)
    end_s = round(300 / fps, 3)
    assert grid_length(300, end_s, fps) == 300
    assert frames_on_screen(times_s, 0, 300, fps).tolist() == list(range(300))


def test_2997_to_16_keeps_real_time():
    times_s = np.arange(300) * 1001 / 30000
    frames = frames_on_screen(times_s, 0, grid_length(300, 300 * 1001 / 30000, 16.0), 16.0)
    assert frames[80] == math.floor(5.0 * 30000 / 1001)
    assert frames[-1] <= 299


@given(
    gaps=st.lists(st.floats(0.001, 0.4), min_size=1, max_size=60),
    fps=st.floats(1.0, 120.0),
)
def test_grid_ascends_within_the_video_and_shows_the_last_frame_before_each_time(gaps, fps):
    times_s = np.concatenate([[0.0], np.cumsum(gaps[:-1])])
    end_s = float(times_s[-1] + gaps[-1])
    length = grid_length(len(times_s), end_s, fps)
    frames = frames_on_screen(times_s, 0, length, fps)
    assert frames[0] == 0 or times_s[frames[0]] <= 0.001
    assert (np.diff(frames) >= 0).all()
    assert frames[-1] < len(times_s)
    due_s = np.arange(length) / fps
    assert (due_s < end_s).all()
    assert (times_s[frames] <= due_s + 0.001).all()
    following = frames + 1 < len(times_s)
    assert (times_s[frames[following] + 1] > due_s[following]).all()
    # The next position would lie at or past the end, to within the tolerance for rounded times.
    assert length / fps >= end_s - 0.001


# --- modes ------------------------------------------------------------------------------------------------------------


def test_head():
    clips, rejects = planned(rules_of(frames=[5, 17, 33]))
    assert spans(clips) == [(0, 33)]
    assert not rejects


def test_tile_takes_the_longest_buckets_without_gaps():
    clips, _ = planned(rules_of(frames=[5, 17, 33], select="tile"), frames=94)
    assert spans(clips) == [(0, 33), (33, 66), (66, 83), (83, 88), (88, 93)]
    assert [clip.index for clip in clips] == [0, 1, 2, 3, 4]
    assert uncovered_tail(clips, 94, rules_of(select="tile")) == 1


def test_slide():
    rules = rules_of(select="slide:20")
    clips, _ = planned(rules, frames=70)
    assert spans(clips) == [(0, 17), (20, 37), (40, 57)]
    assert uncovered_tail(clips, 70, rules) == 13


def test_uniform_spreads_from_start_to_end_without_overlap():
    assert spans(planned(rules_of(select="uniform:3"), frames=101)[0]) == [(0, 17), (42, 59), (84, 101)]
    assert spans(planned(rules_of(select="uniform:9"), frames=40)[0]) == [(0, 17), (23, 40)]
    assert spans(planned(rules_of(select="uniform:4"), frames=17)[0]) == [(0, 17)]


def test_a_whole_clip_has_no_bucket_length():
    rules = rules_of(select="whole")
    (clip,), _ = planned(rules, frames=100)
    assert clip.bucket == Bucket(0, 256, 256)
    assert whole_frames(100, 4) == 97
    assert uncovered_tail((clip,), 100, rules) == 3
    assert [whole_frames(n, 4) for n in (1, 4, 5, 8, 9)] == [1, 1, 5, 5, 9]


def test_networks_without_a_lead_frame_take_multiples_of_their_stride():
    """Networks that take groups (`4n` frames), and single frames (`n`)."""
    with pytest.raises(
        ConfigError, match=r"clips\.frames: net takes 4n frames, got 17; counts near it that fit: 16 or 20"
    ):
        resolve_rules(validate(ClipConfig, {}), 4, 8, "net", lead_frames=0)
    with pytest.raises(ConfigError, match="4n frames, got 2; counts near it that fit: 4"):
        resolve_rules(validate(ClipConfig, {"frames": 2}), 4, 8, "net", lead_frames=0)
    groups = resolve_rules(validate(ClipConfig, {"select": "whole"}), 4, 8, "net", lead_frames=0)
    assert [whole_frames(n, 4, 0) for n in (4, 7, 8)] == [4, 4, 8]
    (clip,), _ = planned(groups, frames=103)
    assert uncovered_tail((clip,), 103, groups) == 3
    none, (reject,) = planned(groups, frames=3)
    assert (none, reject.reason) == ((), "too_short")
    single = resolve_rules(validate(ClipConfig, {"frames": 6}), 1, 8, "net")
    assert spans(planned(single, frames=100)[0]) == [(0, 6)]


def test_start_time_and_rate_follow_the_grid():
    clips, _ = planned(rules_of(select="tile", fps=10.0), frames=100, fps=25.0)
    assert [(clip.start_s, clip.fps) for clip in clips] == [(0.0, 10.0), (1.7, 10.0)]
    clips, _ = planned(rules_of(select="tile"), frames=40, fps=25.0)
    assert [(clip.start_s, clip.fps) for clip in clips] == [(0.0, 25.0), (0.68, 25.0)]


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_nearest_aspect_ratio_then_largest():
    rules = rules_of(size=["256x256", "192x320", "320x192", "96x160"])
    assert planned(rules, height=360, width=640)[0][0].bucket == Bucket(17, 192, 320)
    assert planned(rules, height=640, width=360)[0][0].bucket == Bucket(17, 320, 192)
    assert planned(rules, height=400, width=420)[0][0].bucket == Bucket(17, 256, 256)
    assert planned(rules, height=190, width=320)[0][0].bucket == Bucket(17, 96, 160)  # the larger would be enlarged


def test_a_shorter_bucket_is_taken_if_the_longer_one_needs_upscaling():
    rules = rules_of(buckets=["49x480x832", "17x256x256"])
    assert planned(rules, height=300, width=500)[0][0].bucket == Bucket(17, 256, 256)
    assert planned(rules, height=480, width=854)[0][0].bucket == Bucket(49, 480, 832)


def test_scale_covers_and_crop_is_centred():
    clip = planned(rules_of(size="256x256"), height=360, width=640)[0][0]
    assert (clip.scaled_height, clip.scaled_width, clip.crop_top, clip.crop_left) == (256, 455, 0, 99)


@pytest.mark.parametrize(
    ("height", "width", "bucket"), [(360, 640, (192, 336)), (640, 360, (336, 192)), (500, 500, (256, 256))]
)
def test_derived_bucket_keeps_area_and_aspect(height, width, bucket):
    clip = planned(rules_of(size="area:256x256"), height=height, width=width)[0][0]
    assert (clip.bucket.height, clip.bucket.width) == bucket


@given(
    frames=st.integers(1, 400),
    fps=st.floats(5, 120),
    height=st.integers(16, 2000),
    width=st.integers(16, 2000),
    select=st.sampled_from(["head", "tile", "slide:3", "slide:40", "uniform:1", "uniform:7", "whole"]),
    target=st.sampled_from(["source", 8.0, 24.0]),
    size=st.sampled_from(["64x64", "area:128x128", "128x96,96x128,64x64"]),
    lengths=st.sampled_from([(1,), (5,), (17, 33), (5, 9, 81)]),
    upscale=st.booleans(),
)
def test_clips_lie_inside_the_video_and_cover_their_bucket(
    frames, fps, height, width, select, target, size, lengths, upscale
):
    rules = rules_of(frames=lengths, size=size, select=select, fps=target, upscale=upscale, min_fps_ratio=0)
    clips, rejects = planned(rules, frames, fps, height, width)
    available = grid_length(frames, frames / fps, rules.fps)
    assert bool(clips) != bool(rejects)
    if rejects:
        assert rejects[0].policy
        assert (rejects[0].key, rejects[0].uri, rejects[0].stage, rejects[0].clip) == ("k", "u", "clips", None)
        assert rejects[0].reason in ("too_short", "too_small")
        assert not (upscale and select == "whole")
    position = 0
    for index, clip in enumerate(clips):
        length = clip.bucket.frames or whole_frames(available - clip.start, 4)
        assert clip.index == index
        assert 0 <= clip.start <= clip.start + length <= available
        assert (length - 1) % 4 == 0
        assert clip.bucket.height % 8 == clip.bucket.width % 8 == 0
        assert 0 <= clip.crop_top <= clip.scaled_height - clip.bucket.height
        assert 0 <= clip.crop_left <= clip.scaled_width - clip.bucket.width
        assert min(clip.scaled_height - clip.bucket.height, clip.scaled_width - clip.bucket.width) == 0
        assert upscale or (clip.bucket.height <= height and clip.bucket.width <= width)
        assert upscale or (clip.scaled_height <= height + 1 and clip.scaled_width <= width + 1)
        if rules.select in ("tile", "uniform"):
            assert clip.start >= position
        if rules.select == "tile":
            assert clip.start == position
        position = clip.start + length
    if clips:
        tail = uncovered_tail(clips, available, rules)
        assert tail >= 0
        if rules.select == "tile":
            assert position + tail == available
            assert tail < min(lengths) or not upscale
        if rules.select == "uniform":
            assert len(clips) <= rules.select_arg


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_too_short_names_the_frames_found_and_needed():
    _, (reject,) = planned(rules_of(frames=[17, 33], fps=8.0), frames=40, fps=25.0)
    assert reject.reason == "too_short"
    assert reject.message == "13 frames at the sampling rate, the shortest clip needs 17"
    assert reject.buckets == {"v17x256x256": 1}


def test_too_small_unless_upscaling_is_allowed():
    _, (reject,) = planned(rules_of(size="256x256"), height=144, width=192)
    assert reject.reason == "too_small"
    assert reject.message.startswith("144x192 pixels")
    assert "256x256" in reject.message
    assert reject.buckets == {"v17x256x256": 1}
    (clip,), _ = planned(rules_of(size="256x256", upscale=True), height=144, width=192)
    assert (clip.scaled_height, clip.scaled_width) == (256, 341)


def test_a_source_slower_than_the_ratio_is_fps_too_low():
    _, (reject,) = planned(rules_of(fps=24.0), fps=15.0)
    assert (reject.reason, reject.policy) == ("fps_too_low", True)
    assert "15 frames per second" in reject.message
    assert list(reject.buckets.values()) == [1]
    assert planned(rules_of(fps=24.0, min_fps_ratio=0.5), fps=15.0)[0]
    assert planned(rules_of(fps=24.0), fps=23.976)[0]
