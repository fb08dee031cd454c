"""`lathe plan`: the numbers it promises are those that cutting gives, and it decodes next to nothing."""

from __future__ import annotations

import json

import pytest

from pipeline.clips import resolve_rules
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.cutting import CutRequest, Cutter
from pipeline.plan import CorpusPlan, LatentSize, plan_corpus
from pipeline.records import ClipRules, FrameChunk, Reject, Sample, VideoEnded
from tests.video_files import encode, textured

FAST = {"preset": "ultrafast"}
LIMITS: DecodeConfig = validate(DecodeConfig, {})
LATENT = LatentSize(channels=16, bytes_per_element=2, time_stride=4, space_stride=8)


def rules_of(**values: object) -> ClipRules:
    return resolve_rules(validate(ClipConfig, {"size": "48x48", **values}), 4, 8, "leanvae")


@pytest.fixture(scope="module")
def corpus() -> list[Sample | Reject]:
    videos = [
        encode(30, options=FAST),
        encode(50, size=(64, 96), fps=25, options=FAST),
        encode(4, options=FAST),
        encode(30, size=(32, 32), options=FAST),
        b"garbage",
        encode(60, picture=textured, options=FAST, container_options={"movflags": "faststart"})[:12000],
    ]
    samples: list[Sample | Reject] = [Sample(f"{n}", n, "u", video, "mp4") for n, video in enumerate(videos)]
    return [
        *samples,
        Reject("6", "read", "no_video", "no video", True),
        Reject(None, "read", "truncated_tar", "", False, uri="u"),
    ]


def plan(corpus: list[Sample | Reject], **values: object) -> CorpusPlan:
    return plan_corpus(iter(corpus), rules_of(**values), LIMITS, LATENT)


def test_it_reconciles_and_names_reasons_with_keys(corpus):
    found = plan(corpus, frames=[5, 17], select="tile")
    assert (found.samples, found.with_clips, found.without_clips) == (7, 3, 4)
    dropped = {reason: (item.count, item.policy, item.keys) for reason, item in found.dropped.items()}
    assert dropped == {
        "too_short": (1, True, ["2"]),
        "too_small": (1, True, ["3"]),
        "undecodable": (1, False, ["4"]),
        "truncated": (1, False, ["5"]),
        "no_video": (1, True, ["6"]),
        "truncated_tar": (1, False, ["u"]),
    }
    assert found.dropped["too_short"].message.startswith("4 frames")
    assert found.warnings["untagged_color"] == 5
    json.dumps(found.to_dict())


@pytest.mark.parametrize("select", ["head", "tile", "slide:7", "uniform:2", "whole"])
@pytest.mark.parametrize("fps", ["source", 12.0])
def test_it_promises_what_cutting_gives(corpus, select, fps):
    intact = corpus[:4]
    found = plan(intact, frames=[5, 17], select=select, fps=fps)
    clips, frames, latent_bytes = 0, 0, 0
    for sample in intact:
        assert isinstance(sample, Sample)
        cutter = Cutter(
            CutRequest(sample, rules_of(frames=[5, 17], select=select, fps=fps), LIMITS, 0, validate(DrillConfig, {}))
        )
        cutter.open()
        while not isinstance(chunk := cutter.next(), VideoEnded):
            assert isinstance(chunk, FrameChunk)
            length = len(chunk.planes_T3HW)
            clips, frames = clips + 1, frames + length
            latent_bytes += 16 * ((length - 1) // 4 + 1) * 6 * 6 * 2
    assert (found.clips, found.frames, found.latent_bytes) == (clips, frames, latent_bytes)
    assert clips > 0
    assert sum(fill.clips for fill in found.buckets.values()) == clips


def test_it_decodes_one_frame_a_video(corpus, monkeypatch):
    decoded = []
    close = Cutter.close

    def closing(self: Cutter) -> None:
        close(self)
        decoded.append(self._frames_decoded)

    monkeypatch.setattr(Cutter, "close", closing)
    plan(corpus[:2], select="whole")
    assert decoded == [1, 1]


def test_moments_double_the_bytes():
    assert (
        LatentSize(16, 2, 4, 8, tensors=2).num_bytes(17, 48, 48)
        == 2 * LATENT.num_bytes(17, 48, 48)
        == 2 * 16 * 5 * 36 * 2
    )
