"""`lathe plan`: its numbers equal those of cutting, it decodes one frame per video, and no video can stop it."""

from __future__ import annotations

import json
import os
import signal
import struct
from dataclasses import asdict
from pathlib import Path

import pytest

import pipeline
from pipeline.cli.wording import _compile_text, plan_lines
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig, validate
from pipeline.encoder import known_spec
from pipeline.encoder.compiling import _SAVED_CORE_S
from pipeline.engine.decoders import sample_stream
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.errors import BadDataError, ConfigError, PolicyReject
from pipeline.forecast import survey
from pipeline.forecast.compile_forecast import compile_choice, forecast_compiling
from pipeline.forecast.totals import BucketFill, Forecast, ForecastTotals, LatentSize
from pipeline.records import ClipRules, FrameChunk, Reject, Sample, Shard, SourceObject, VideoEnded
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from tests.tiny_corpus import tiny_job, video_bytes, write_tar
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


def request(sample: Sample, rules: ClipRules) -> CutRequest:
    return CutRequest(sample.encoded_video, rules, LIMITS, 0, DrillConfig(), headers_only=True)


def plan(corpus: list[Sample | Reject], **values: object) -> Forecast:
    rules = rules_of(**values)
    tally = ForecastTotals(rules, LATENT)
    for item in corpus:
        if isinstance(item, Reject):
            tally.rejected(item)
            continue
        cutter = Cutter(request(item, rules))
        try:
            tally.opened(item, cutter.open())
        except BadDataError as error:
            tally.rejected(Reject(item.key, "decode", error.reason, error.message, isinstance(error, PolicyReject)))
        finally:
            cutter.close()
    return tally.result()


def test_counts_add_up_and_reasons_name_keys(corpus):
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
    assert (found.warnings["untagged_color"], found.warnings["no_caption"]) == (3, 3), (
        "of videos that give clips, as in a build"
    )
    json.dumps(found.to_dict())


@pytest.mark.parametrize("select", ["head", "tile", "slide:7", "uniform:2", "whole"])
@pytest.mark.parametrize("fps", ["source", 12.0])
def test_planned_clips_are_those_that_cutting_gives(corpus, select, fps):
    intact = corpus[:4]
    found = plan(intact, frames=[5, 17], select=select, fps=fps)
    clips, frames, latent_bytes = 0, 0, 0
    for sample in intact:
        assert isinstance(sample, Sample)
        cutter = Cutter(request(sample, rules_of(frames=[5, 17], select=select, fps=fps)))
        cutter.open()
        while not isinstance(chunk := cutter.next(), VideoEnded):
            assert isinstance(chunk, FrameChunk)
            length = len(chunk.planes_T3HW)
            clips, frames = clips + 1, frames + length
            latent_bytes += 16 * ((length - 1) // 4 + 1) * 6 * 6 * 2
    assert (found.clips, found.frames, found.latent_bytes) == (clips, frames, latent_bytes)
    assert clips > 0
    assert sum(fill.clips for fill in found.buckets.values()) == clips


def test_moments_double_the_bytes():
    assert (
        LatentSize(16, 2, 4, 8, tensors=2).num_bytes(17, 48, 48)
        == 2 * LATENT.num_bytes(17, 48, 48)
        == 2 * 16 * 5 * 36 * 2
    )


# --- the whole of it, over real decoder processes --------------------------------------------------------------------


def bomb() -> bytes:
    """A GIF of 33 bytes whose picture has 9000x9000 pixels: more memory than `decode.memory_bytes` may be set to at least."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 9000, 9000, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"


SMALL = ("decode.memory_bytes=268435456", "decode.max_pixels=100000000")


def corpus_of(folder: Path, videos: dict[str, bytes]) -> Path:
    return write_tar(folder / "a.tar", {key: {"mp4": video} for key, video in videos.items()})


def reasons(dropped: object) -> dict[str, int]:
    assert isinstance(dropped, dict)
    return {reason: item.count for reason, item in dropped.items()}


def test_plan_equals_encode_and_is_repeatable(tmp_path):
    videos = {f"k{n}": video_bytes(5 + 4 * (n % 3), seed=n) for n in range(9)}
    tar = corpus_of(tmp_path, {**videos, "big": bomb(), "bad": b"garbage" * 99, "short": video_bytes(3)})
    job = tiny_job(tar, tmp_path / "out", *SMALL, "reject_budget=1", "engine.decoders=3")
    first, second = survey.forecast_job(job), survey.forecast_job(job)
    assert json.dumps(first.to_dict()) == json.dumps(second.to_dict())
    report = pipeline.encode(job)
    assert (first.samples, first.with_clips, first.clips) == (12, 9, report.counts.clips)
    assert reasons(first.dropped) == report.rejects
    assert set(report.rejects) == {"decoder_memory", "undecodable", "too_short"}


class _Crashing(ProcessLanes):
    """Kills the process of a lane by the signal that a crash in a codec raises, as soon as a video of some name is sent there."""

    def open(self, lane, ticket, request):
        super().open(lane, ticket, request)
        if request.video.key.startswith("crash"):
            os.kill(self._children[lane].process.pid, signal.SIGSEGV)
        if request.video.key.startswith("hang"):
            os.kill(self._children[lane].process.pid, signal.SIGSTOP)


def test_crash_or_hang_of_a_codec_rejects_one_video(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_stream, "ProcessLanes", _Crashing)
    tar = corpus_of(tmp_path, {key: video_bytes(5) for key in ("a", "crash", "b", "hang", "c")})
    plan = survey.forecast_job(tiny_job(tar, tmp_path / "out", "decode.timeout_s=1", "engine.decoders=1"))
    assert (plan.samples, plan.with_clips) == (5, 3)
    drops = {reason: (item.count, item.keys, item.message) for reason, item in plan.dropped.items()}
    assert drops == {
        "decoder_crashed": (1, ["crash"], "decoder process ended: segmentation fault (SIGSEGV), 2 times"),
        "decode_timeout": (1, ["hang"], "no answer from the decoder in 1 s, 2 times"),
    }


def test_each_video_costs_one_decoded_frame(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(video_bytes(29))
    asked = []

    class Asked(ProcessLanes):
        def pull(self, lane, ticket):
            asked.append(lane)

    monkeypatch.setattr(sample_stream, "ProcessLanes", Asked)
    plan = survey.forecast_job(tiny_job(tmp_path, tmp_path / "out"))
    assert (plan.clips, asked) == (5, [])


def test_a_plain_file_that_cannot_be_read_is_named_and_the_rest_is_planned(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(video_bytes(5))
    resolve = survey.resolve_inputs

    def vanishing(*arguments):
        shards = resolve(*arguments)
        (tmp_path / "b.mp4").unlink()
        return shards

    monkeypatch.setattr(survey, "resolve_inputs", vanishing)
    plan = survey.forecast_job(tiny_job(tmp_path, tmp_path / "out"))
    assert (plan.samples, plan.with_clips) == (1, 1)
    (notice,) = plan.notices
    assert notice.startswith("not planned: ")
    assert "b.mp4" in notice


# --- whether the network would be compiled ----------------------------------------------------------------------------


def compile_of(job):
    """The forecast of `job`, without its clips, and the line of `lathe plan`."""
    spec = known_spec(job.model)
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    shards = [Shard("files", "a", tuple(SourceObject(f"/{n}.mp4", 2_000_000, "e") for n in range(100)))] * 10_000
    fills = {
        "17x256x256": BucketFill(clips=2, frames=34),
        "5x256x256": BucketFill(1, 5),
        "17x128x256": BucketFill(1, 17),
    }
    found = forecast_compiling(compile_choice(job, spec, rules, shards), job, spec, fills)
    return found, _compile_text(asdict(found))


def test_plan_says_that_few_inputs_are_not_compiled_as_the_build_does(tmp_path):
    tar = corpus_of(tmp_path, {"a": video_bytes(5)})
    job = tiny_job(tar, tmp_path / "out", "model.device=cpu")
    planned = survey.forecast_job(job)
    report = pipeline.encode(job)
    assert (planned.compile.on, planned.compile.reason) == (report.compiled, report.compile_reason)
    assert "1 size are too few" in planned.compile.reason
    (line,) = [line for line in plan_lines(planned.to_dict()) if line.startswith("  compile")]
    assert line == f"  compile   off in a new output, {report.compile_reason}"


def test_plan_says_what_compiling_takes_and_saves(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "true")  # found; nothing is compiled here
    many = tiny_job(tmp_path, tmp_path, "clips.size=256x256,128x256", "model.device=cpu")
    found, line = compile_of(many)
    assert (found.on, found.sizes, found.compile_s) == (True, 2, 120.0)
    assert found.saved_core_s == pytest.approx(0.066 * (39 * 256 * 256 + 17 * 128 * 256) / 1e6)
    assert line.startswith("on in a new output, about 100,000,000 frames of 2 sizes: it takes about 120 s")
    assert "; planned clips have 2 sizes, 2m00s for each encoder" in line
    monkeypatch.delitem(_SAVED_CORE_S, "leanvae")
    unmeasured, line = compile_of(tiny_job(tmp_path, tmp_path, "engine.compile=on", "model.device=cpu"))
    assert (unmeasured.on, unmeasured.compile_s, unmeasured.saved_core_s) == (True, 120.0, 0.0)
    assert "save" not in line
    asked, line = compile_of(tiny_job(tmp_path, tmp_path, "engine.compile=off"))
    assert (asked.on, asked.compile_s, line) == (False, 0.0, "off in a new output, engine.compile=off")


def test_plan_names_a_missing_compiler_where_compiling_is_asked_for_and_refuses_a_network_of_diffusers(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found, line = compile_of(tiny_job(tmp_path, tmp_path, "engine.compile=on", "model.device=cpu"))
    assert found.on
    assert "engine.compile=on; here no C++ compiler was found (no-such-compiler)" in line
    monkeypatch.setenv("CXX", "false")  # found, and compiles nothing
    found, line = compile_of(tiny_job(tmp_path, tmp_path, "model.device=cpu"))
    assert found.on
    assert "; here the C++ compiler false does not work: it ended with status 1" in line
    job = tiny_job(tmp_path, tmp_path, "engine.compile=on", **{"model.name": "taesd", "model.config": None})
    with pytest.raises(ConfigError, match="taesd is a network of diffusers"):
        compile_of(job)
