"""Clips of annotated spans: what is cut, in one pass, also where spans overlap; bad annotations cost their own clips and say why."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import ClipConfig, validate
from pipeline.errors import ConfigError
from pipeline.reader.annotations import annotated
from pipeline.reader.spans import MOST_SPANS, spans_of
from pipeline.records import (
    Bucket,
    ClipFailed,
    FrameChunk,
    ImageRules,
    Reject,
    Sample,
    Shard,
    SourceObject,
    TimeSpan,
    stable_hash,
)
from pipeline.records.annotation_rows import AnnotationRow, packed, record
from pipeline.video import clips
from pipeline.video.clips import MOST_AT_ONCE, resolve_rules
from pipeline.video.cutting import CutRequest
from tests.pipeline.test_cutting import Answer, by_clip, cut, frames_of, planes_of, request_of
from tests.video_files import encode, textured

CONFIG = validate(ClipConfig, {"select": "spans"})


@pytest.fixture(scope="module")
def video() -> bytes:
    """100 frames of 25 per second; 16 recognisable pictures in turn."""
    return encode(100, options={"preset": "fast", "g": "10"}, fps=25)


@pytest.fixture(scope="module")
def texture() -> bytes:
    return encode(100, size=(64, 96), options={"preset": "fast", "g": "10"}, fps=25, picture=textured)


def request(data: bytes, spans: list[TimeSpan], **clips: object) -> CutRequest:
    made = request_of(data, **{"select": "spans", "frames": 5, **clips})
    return dataclasses.replace(made, video=dataclasses.replace(made.video, time_spans=tuple(spans)))


def seconds(*bounds: tuple[float, float]) -> list[TimeSpan]:
    return [TimeSpan(start, end) for start, end in bounds]


def starts(request: CutRequest) -> list[tuple[int | None, int]]:
    return [(plan.span, plan.start) for plan in cut(request)[0].clips]


# --- what is cut ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("spans", [(0, 10), (1, 50)]),
        ("spans:head", [(0, 10), (1, 50)]),
        ("spans:tile", [(0, 10), (0, 15), (1, 50)]),
        ("spans:uniform:2", [(0, 10), (0, 17), (1, 50)]),
    ],
)
def test_a_rule_holds_inside_each_span(video, rule, expected):
    """Frames 10 to 22 and 50 to 57, with clips of 5."""
    opened, answers, _ = cut(request(video, seconds((0.4, 0.88), (2.0, 2.28)), select=rule))
    assert [(plan.span, plan.start) for plan in opened.clips] == expected
    for plan, chunks in zip(opened.clips, by_clip(answers).values(), strict=True):
        assert frames_of(chunks) == [n % 16 for n in range(plan.start, plan.start + 5)]


def test_a_whole_span_is_one_clip_that_ends_in_it(video):
    opened, answers, _ = cut(request(video, seconds((0.4, 0.88)), select="spans:whole"))
    assert frames_of(by_clip(answers)[0]) == [10, 11, 12, 13, 14, 15, 0, 1, 2]
    assert (opened.clips[0].stop, opened.clips[0].bucket.frames) == (22, 0)


def test_seconds_at_another_rate_and_frames_name_the_same_pictures(video):
    of_seconds = cut(request(video, seconds((0.4, 2.0)), fps=12.5, frames=9))
    of_frames = cut(request(video, [TimeSpan(10, 50, "frames")], fps=12.5, frames=9))
    assert of_seconds[0].clips == of_frames[0].clips
    assert frames_of(by_clip(of_seconds[1])[0]) == [n % 16 for n in range(10, 28, 2)]


def test_spans_that_overlap_are_cut_in_one_pass_with_the_pixels_of_each_alone(texture):
    """Of two bucket sizes, with and without crops, out of order, one inside another, two alike."""
    spans = seconds((1.0, 3.6), (0.2, 3.9), (1.2, 1.6), (1.0, 3.6))
    options = {"select": "spans:tile", "buckets": ["5x32x32", "33x48x48", "65x48x48"], "variants": ["flip"]}
    opened, answers, ended = cut(dataclasses.replace(request(texture, spans, **options), first_frame=True))
    assert ended.frames_decoded <= 100
    assert all((chunk.first_frame is not None) == chunk.first for chunk in answers if isinstance(chunk, FrameChunk))
    assert [plan.start for plan in opened.clips] == sorted(plan.start for plan in opened.clips)
    together = by_clip(answers)
    for number, span in enumerate(spans):
        alone, chunks, _ = cut(request(texture, [span], **options))
        own = [plan for plan in opened.clips if plan.span == number]
        assert [(plan.start, plan.bucket) for plan in own] == [(plan.start, plan.bucket) for plan in alone.clips]
        for plan, cut_alone in zip(own, by_clip(chunks).values(), strict=True):
            assert np.array_equal(planes_of(together[plan.index]), planes_of(cut_alone))
            assert [chunk.first for chunk in together[plan.index]] == [True] + [False] * (len(cut_alone) - 1)


def test_many_spans_are_one_pass(video):
    spans = [TimeSpan(start, start + 5, "frames") for start in range(0, 95, 5)]
    opened, answers, ended = cut(request(video, spans))
    assert len(opened.clips) == 19
    assert ended.frames_decoded <= 100
    assert [frames_of(chunks)[0] for chunks in by_clip(answers).values()] == [n * 5 % 16 for n in range(19)]


def test_damage_fails_the_clips_that_show_it(video):
    """The same frames as with the rule for a video: the clips before and behind are whole."""
    broken = bytearray(video)
    middle = len(broken) // 2
    broken[middle : middle + 200] = b"\xff" * 200
    spans = [TimeSpan(start, start + 5, "frames") for start in range(0, 100, 5)]
    of_spans = cut(request(bytes(broken), spans))[1]
    of_video = cut(request_of(bytes(broken), select="tile", frames=5))[1]
    assert any(isinstance(answer, ClipFailed) for answer in of_video)

    def outcome(answers: list[Answer]) -> dict[int, str]:
        failed = {answer.clip: answer.reject.reason for answer in answers if isinstance(answer, ClipFailed)}
        return {answer.clip: "" for answer in answers} | failed

    assert outcome(of_spans) == outcome(of_video)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "reason", "policy", "named"),
    [
        ([], "no_spans", True, "'clips'"),
        (seconds((4.2, 5.0)), "span_outside", False, "span 0 is 4.2 to 5 seconds"),
        (seconds((3.0, 4.6)), "span_outside", False, "ends at 4.000 s"),
        (seconds((-1.0, 1.0)), "span_outside", False, "1 of 1"),
        ([TimeSpan(90, 130, "frames")], "span_outside", False, "has 100 frames"),
        (seconds((1.0, 1.1)), "too_short", True, "needs 5 frames; the first: span 0 has 3"),
        ([TimeSpan(0, 0, fault="span 0 is 9 to 7; expected …")], "bad_span", False, "span 0 is 9 to 7"),
        (seconds(*[(1.0, 3.0)] * (MOST_AT_ONCE + 1)), "overlapping_spans", True, "more than 16 clips"),
    ],
)
def test_a_span_that_cannot_be_cut_is_rejected_with_its_reason(video, spans, reason, policy, named):
    opened, answers, _ = cut(request(video, spans))
    assert not opened.clips
    assert not answers
    (reject,) = opened.rejects
    assert (reject.key, reject.reason, reject.policy) == ("key", reason, policy)
    assert named in reject.message


def test_ten_thousand_spans_that_overlap_are_refused_before_their_clips_are_planned(video, monkeypatch):
    made = []
    real = clips.plan_variants
    monkeypatch.setattr(clips, "plan_variants", lambda *given: made.append(given) or real(*given))
    (reject,) = cut(request(video, seconds(*[(0.0, 4.0)] * 10_000), select="spans:tile"))[0].rejects
    assert reject.reason == "overlapping_spans"
    assert len(made) == MOST_AT_ONCE


def test_a_bad_span_costs_only_its_own_clips(video):
    spans = [*seconds((1.0, 1.4), (9.0, 9.5)), TimeSpan(0, 0, fault="span 2 is odd"), *seconds((2.0, 2.4))]
    opened, _, _ = cut(request(video, spans))
    assert [(plan.span, plan.start) for plan in opened.clips] == [(0, 25), (3, 50)]
    assert sorted(reject.reason for reject in opened.rejects) == ["bad_span", "span_outside"]


def test_a_span_that_ends_a_little_late_is_cut_at_the_end_with_a_warning(video):
    opened, _, _ = cut(request(video, seconds((3.0, 4.3)), select="spans:tile"))
    assert [plan.start for plan in opened.clips] == [75, 80, 85, 90, 95]
    assert {plan.warnings for plan in opened.clips} == {("span_cut:0.300",)}


def test_a_rule_that_is_not_one_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"clips.select|select: expected .*spans.*got 'spans:slide:4'"):
        validate(ClipConfig, {"select": "spans:slide:4"})


def test_rules_without_spans_have_the_fingerprint_they_had():
    """The hash is that of the version before spans."""
    rules = resolve_rules(validate(ClipConfig, {"size": "48x48", "select": "tile"}), 4, 8, "leanvae")
    assert not {"spans", "spans_field", "spans_unit"} & set(rules.to_dict())
    assert stable_hash(rules.to_dict()) == "b4b33b4f7de683dfa3fe7813a93d945d"
    with_spans = [validate(ClipConfig, {"select": "spans:tile", **more}) for more in ({}, {"spans_unit": "frames"})]
    hashes = {stable_hash(resolve_rules(config, 4, 8, "leanvae").to_dict()) for config in with_spans}
    assert len({*hashes, stable_hash(rules.to_dict())}) == 3


def test_images_beside_the_videos_need_no_spans():
    rules = resolve_rules(validate(ClipConfig, {"select": "spans:tile"}), 4, 8, "leanvae")
    images = ImageRules("keep", (Bucket(1, 32, 32),), None, 16, False, 4.0, (255, 255, 255))
    of_images = dataclasses.replace(rules, images=images).of_images()
    assert (of_images.spans, of_images.select) == (False, "head")


# --- how they are written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"start": 1, "end": 2.5}], (1.0, 2.5)),
        ([[1, 2.5]], (1.0, 2.5)),
        ([["1", "2.5"]], (1.0, 2.5)),
        ([{"start": "00:00:01", "end": "0:01:02.500"}], (1.0, 62.5)),
        ([["00:01", "1:02,5"]], (1.0, 62.5)),
        ("[[1, 2.5]]", (1.0, 2.5)),
        ("[['0:00:01.000', '0:00:02.500']]", (1.0, 2.5)),
        ({"start": 1, "end": 2.5}, (1.0, 2.5)),
    ],
)
def test_seconds_and_timecodes_are_read_as_corpora_write_them(value, expected):
    (span,), _ = spans_of(value, None, CONFIG)
    assert (span.start, span.end, span.unit, span.fault) == (*expected, "seconds", "")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([{"start": 9, "end": 7}], "span 0 is 9 to 7; expected a start before the end"),
        ([[2, 2]], "span 0 is 2 to 2"),
        ([{"start": 1}], "span 0 is 1 to missing"),
        ([[1, None]], "missing"),  # NaN in JSON
        ([["nan", 3]], "'nan' to 3"),
        ([[True, 3]], "True to 3"),
        ([["1:2:3:4", 3]], "'1:2:3:4'"),
        (["x"], "span 0 is 'x'; expected {start, end}"),
        ("all of it", "span 0 is 'all of it'"),
        (f'[{{"start": 0, "end": 1{"0" * 400}}}]', "span 0 is 0 to 1000"),
        ("[{'start': 0, 'end': 1, (1, 2): 3}]", "span 0 is"),
        (f"[{'[0, 1], ' * 70_000}]", "must be JSON"),
        (7, "span 0 is 7"),
    ],
)
def test_a_span_that_is_none_says_what_was_found_and_expected(value, named):
    (span,), _ = spans_of(value, None, CONFIG)
    assert named in span.fault


def test_plain_numbers_are_frames_on_request():
    config = validate(ClipConfig, {"select": "spans", "spans_unit": "frames"})
    spans, _ = spans_of([[10, 20], ["0:01", "0:02"], [1.5, 3], [1, "0:02"]], None, config)
    assert [(span.start, span.end, span.unit) for span in spans[:2]] == [(10, 20, "frames"), (1, 2, "seconds")]
    assert ["whole frames" in span.fault for span in spans] == [False, False, True, True]


def test_captions_and_fields_of_a_span_go_to_its_rows():
    value = [{"start": 0, "end": 1, "text": "a dog", "score": 0.5}, [1, 2]]
    spans, texts = spans_of(value, None, CONFIG)
    sample = Sample("k", 0, "u", b"v", "mp4", "all", {"lens": 35}, time_spans=spans, span_texts=texts)
    first, second, other = (sample.texts_of(span) for span in (0, 1, None))
    assert (first.caption, first.metadata["score"], first.metadata["lens"]) == ("a dog", 0.5, 35)
    assert (second.caption, second.metadata) == ("all", {"lens": 35, "start": 1, "end": 2})
    assert (other.caption, other.metadata, other.video, other.time_spans) == ("all", {"lens": 35}, b"", ())
    image = replace(sample, time_spans=spans[:1], span_texts=texts[:1]).texts_of(None)
    assert (image.caption, image.metadata["score"]) == ("a dog", 0.5)


# --- rows of tables ---------------------------------------------------------------------------------------------------


class Reader:
    """The samples of a shard, as `ShardReader` yields them."""

    def __init__(self, *items: Sample | Reject) -> None:
        self.items, self.released = items, []

    def __iter__(self):
        return iter(self.items)

    def release(self, sample):
        self.released.append(sample.key)


def sample_of(key: str, uri: str = "/c/a.tar", **metadata: object) -> Sample:
    return Sample(key, 0, uri, b"v", "mp4", "own", metadata)


def shard_of(*rows: tuple[str, str], uri: str = "/c/a.tar") -> Shard:
    records = [record(AnnotationRow(uri, key, text.encode())) for key, text in rows]
    kind = "tar" if uri.endswith(".tar") else "files"
    return Shard(kind, "a", (SourceObject(uri, 1, "e", "digest"),), rows=packed(records))


def test_a_row_gives_its_sample_caption_fields_and_spans():
    shard = shard_of(("k1", '{"caption": "of the table", "score": 1, "clips": [[0, 1]]}'))
    first, second = annotated(Reader(sample_of("k1", lens=35), sample_of("k2", clips=[[2, 3]])), shard, CONFIG)
    assert first.named_captions == (("caption", "of the table"), ("caption", "own"))
    assert (first.caption, first.metadata) == ("of the table", {"lens": 35, "caption": "of the table", "score": 1})
    assert (first.time_spans, second.time_spans) == ((TimeSpan(0, 1),), (TimeSpan(2, 3),))
    assert (second.caption, second.metadata) == ("own", {})


def test_rows_with_a_start_and_an_end_are_spans_in_their_order():
    shard = shard_of(
        ("k", '{"start": "3", "end": "4", "caption": "b"}'),
        ("k", '{"start": 1, "end": 2, "text": "a"}'),
        ("k", '{"caption": "whole", "clips": [[7, 8]]}'),
    )
    (sample,) = annotated(Reader(sample_of("k")), shard, CONFIG)
    assert sample.time_spans == (TimeSpan(3, 4), TimeSpan(1, 2))
    assert [text.captions[0][1] for text in sample.span_texts] == ["b", "a"]
    assert sample.caption == "whole"


def test_a_list_of_captions_beside_the_list_of_spans_is_theirs():
    """As Panda-70M has them, in cells of a CSV. The list itself is the caption of no row."""
    timestamps = "[['0:00:01.0', '0:00:02.0'], ['0:00:03.0', '0:00:04.0']]"

    def made(captions: str) -> Sample:
        row = json.dumps({"clips": timestamps, "caption": captions, "lens": 35})
        (sample,) = annotated(Reader(replace(sample_of("k"), caption=None)), shard_of(("k", row)), CONFIG)
        return sample

    first, second = (made("['a cat', 'it sleeps']").texts_of(span) for span in (0, 1))
    assert (first.caption, second.caption) == ("a cat", "it sleeps")
    assert made("['a cat', '']").texts_of(1).caption is None
    assert made("['a cat', None]").texts_of(1).metadata == {"lens": 35, "start": "0:00:03.0", "end": "0:00:04.0"}
    short = made("['a cat']")
    assert (short.texts_of(0).caption, short.warnings) == (None, ("span_captions:1/2",))
    assert short.metadata["caption"] == "['a cat']"
    assert made("[a cat]").texts_of(0).caption == "[a cat]"


def test_a_second_video_of_a_key_does_not_take_the_row_of_the_first():
    reject = Reject("k", "read", "duplicate_key", "twice", policy=False, uri="/c/a.tar")
    shard = shard_of(("k", '{"caption": "of the table"}'), ("bad", "{}"))
    found = list(annotated(Reader(reject, replace(reject, key="bad"), sample_of("k")), shard, validate(ClipConfig, {})))
    assert [item.key for item in found] == ["k", "bad", "k"]
    assert found[2].caption == "of the table"


def test_rows_that_contradict_each_other_reject_their_sample():
    plain = validate(ClipConfig, {})
    same, other = '{"caption": "a"}', '{"caption": "b"}'
    reader = Reader(sample_of("k1"), sample_of("k2"))
    first, second = annotated(reader, shard_of(("k1", same), ("k1", same), ("k2", same), ("k2", other)), plain)
    assert first.caption == "a"
    assert (second.key, second.reason, second.policy, reader.released) == ("k2", "ambiguous_rows", False, ["k2"])
    assert "2 different rows" in second.message


def test_a_row_without_its_sample_is_rejected():
    found = list(annotated(Reader(sample_of("k")), shard_of(("k", "{}"), ("gone", "{}"), ("", "{}")), CONFIG))
    assert [(item.key, item.reason) for item in found[1:]] == [("gone", "unmatched_row"), ("", "unmatched_row")]
    assert "column 'key'" in found[2].message


def test_rows_of_a_plain_video_need_no_key():
    shard = shard_of(("", '{"caption": "x"}'), uri="/c/a.mp4")
    (sample,) = annotated(Reader(sample_of("a", uri="/c/a.mp4")), shard, validate(ClipConfig, {}))
    assert sample.caption == "x"


def test_more_spans_than_the_limit_reject_the_sample():
    reader = Reader(sample_of("k", clips=[[0, 1]] * (MOST_SPANS + 1)))
    (reject,) = annotated(reader, shard_of(), CONFIG)
    assert (reject.reason, reader.released) == ("too_many_spans", ["k"])
    assert f"limit is {MOST_SPANS}" in reject.message
