"""Samples of an evaluation: corpus order whatever the decoders do, shards closed after use, sources that change."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from model.arithmetic import own_arithmetic
from pipeline.config import build_job
from pipeline.corpus import resolve_inputs
from pipeline.engine.decoders.losses import Restarted
from pipeline.engine.decoders.sample_stream import SampleEvent, SampleStream, _OpenShard
from pipeline.errors import ConfigError, NonFiniteLatent, SourceChanged
from pipeline.evaluation import measuring
from pipeline.evaluation.measuring import ClipMeasurement, Findings, Instruments
from pipeline.evaluation.rows import ClipRows
from pipeline.evaluation.samples import SamplesInProgress
from pipeline.records import (
    Bucket,
    ClipFailed,
    ClipPlan,
    FrameChunk,
    OpenedVideo,
    Reject,
    Sample,
    VideoEnded,
    VideoInfo,
)
from pipeline.video.clips import resolve_rules
from tests.tiny_corpus import TINY_NETWORK, video_bytes, write_tar

INFO = VideoInfo("h264", "yuv420p", 32, 32, 32, 32, 0, (1, 1), 8.0, 9, 1.0, "bt601", "limited", "00")


def tiny_job(folder, **flags):
    values = {"inputs": [str(folder)], "output": str(folder / "out"), "model.name": "leanvae", "model.untrained": 0}
    values |= {"model.config": TINY_NETWORK, "clips.frames": "5", "clips.size": "32x32", "clips.select": "tile"}
    return build_job({**values, "engine.decoders": 1, **flags})


@pytest.fixture
def instruments(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Instruments(tiny_job(tmp_path), "cpu", "float32")
    torch.set_num_threads(before)


def plan(index):
    return ClipPlan(index, 5 * index, Bucket(5, 32, 32), 8.0, 5 * index / 8, 32, 32, 0, 0)


def chunk(index, seed=0, frames=5, first=True, last=True):
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(16, 236, (frames, 3, 32, 32), dtype=torch.uint8, generator=generator).numpy()
    return FrameChunk(index, planes, tuple(map(float, range(frames))), "bt601", first, last)


def sample(number):
    return Sample(f"s{number}", number, "file:x.tar", b"", "mp4")


def reject(key, clip=None):
    return Reject(key, "decode", "broken", "it broke", policy=False, clip=clip)


def written(instruments, tmp_path, events):
    """Keys and clips of rows, and of rejects, after these events."""
    findings = Findings("float16")
    with ClipRows(tmp_path / "clips.parquet", tmp_path / "rejects.jsonl") as rows:
        samples = SamplesInProgress(instruments, findings, rows)
        added, rejected = [], []
        add, refuse = rows.add, rows.reject
        rows.add = lambda s, p, r: (added.append((s.key, p.index)), add(s, p, r))
        rows.reject = lambda r: (rejected.append((r.key, r.clip)), refuse(r))
        for event in events:
            samples.take(event)
    return added, rejected, samples, findings


def opening(*indices, rejects=()):
    return OpenedVideo(INFO, tuple(plan(i) for i in indices), tuple(rejects))


def test_samples_are_written_in_corpus_order(instruments, tmp_path):
    """One of them from a file whose name is not UTF-8."""
    misnamed = replace(sample(2), uri="/v/\udcff.mp4")
    events = [
        SampleEvent(2, misnamed, opening(0)),
        SampleEvent(0, sample(0), opening(0, 1)),
        SampleEvent(2, misnamed, chunk(0)),
        SampleEvent(2, misnamed, VideoEnded(5, 0.0)),
        SampleEvent(0, sample(0), chunk(0)),
        SampleEvent(1, None, replace(reject("s1"), uri="/v/\udcfe.mp4")),
        SampleEvent(0, sample(0), chunk(1)),
        SampleEvent(0, sample(0), VideoEnded(10, 0.0)),
    ]
    added, rejected, samples, findings = written(instruments, tmp_path, events)
    assert added == [("s0", 0), ("s0", 1), ("s2", 0)]
    assert rejected == [("s1", None)]
    assert (samples.videos, findings.clips) == (3, 3)
    assert pq.read_table(tmp_path / "clips.parquet")["source"].to_pylist()[-1] == r"/v/\udcff.mp4"
    assert json.loads((tmp_path / "rejects.jsonl").read_text())["uri"] == r"/v/\udcfe.mp4"


def test_a_video_whose_decoder_died_counts_every_clip_and_reject_once(instruments, tmp_path):
    tail = reject("s0")
    begin = [SampleEvent(0, sample(0), opening(0, 1, 2, rejects=[tail])), SampleEvent(0, sample(0), chunk(0, 1))]
    half = SampleEvent(0, sample(0), chunk(1, 2, frames=1, last=False))
    rest = SampleEvent(0, sample(0), chunk(1, 3, frames=4, first=False))
    failed = SampleEvent(0, sample(0), ClipFailed(2, reject("s0", 2)))
    plain = [*begin, half, rest, failed, SampleEvent(0, sample(0), VideoEnded(9, 0.0))]
    died = [*begin, half, SampleEvent(0, sample(0), Restarted()), *plain]
    results = [written(instruments, tmp_path, events) for events in (plain, died)]
    for added, rejected, _, _ in results:
        assert added == [("s0", 0), ("s0", 1)]
        assert rejected == [("s0", None), ("s0", 2)]
    assert results[0][3].summary()["overall"] == results[1][3].summary()["overall"]


def test_metric_networks_run_in_true_float32_on_cuda(instruments, monkeypatch):
    """By default torch runs float32 convolutions on CUDA as tf32. The switches exist without a GPU."""
    seen = []

    def lpips(original, other):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return torch.zeros(len(original))

    monkeypatch.setattr(measuring, "own_arithmetic", lambda device: own_arithmetic(torch.device("cuda")))
    instruments.lpips, instruments.i3d = lpips, lambda video: lpips(video, video)[:, None]
    run = ClipMeasurement(instruments, sample(0), plan(0))
    run.push(chunk(0, frames=17))
    assert len(seen) > 2
    assert set(seen) == {("ieee", "ieee")}
    assert run.result().features.original


def test_non_finite_values_name_the_clip(instruments):
    run = ClipMeasurement(instruments, sample(0), plan(3))
    instruments.vae.encode_planes = lambda planes, matrices, state: (
        type("Posterior", (), {"mean": torch.full((1, 4, 2, 4, 4), torch.nan)})(),
        None,
    )
    with pytest.raises(NonFiniteLatent, match=r"clip 3: the encoder returned latents that are not finite.*key=s0"):
        run.push(chunk(0))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no more"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")], ids=str
)
def test_out_of_memory_names_the_setting(instruments, error):
    run = ClipMeasurement(instruments, sample(0), plan(0))

    def full(*arguments):
        raise error

    instruments.vae.encode_planes = full
    with pytest.raises(ConfigError, match=r"5 frames of 32x32 do not fit .* smaller engine\.chunk_frames"):
        run.push(chunk(0))


def test_a_shard_is_closed_by_its_last_user():
    class Reader:
        def __init__(self):
            self.log = []

        def release(self, sample):
            self.log.append(sample.key)

        def close(self):
            self.log.append("closed")

    reader = Reader()
    opened = set()
    open_shard = _OpenShard(reader, opened)
    open_shard.take()
    open_shard.take()
    open_shard.give_back(sample(0))
    open_shard.give_back()  # the one who reads
    assert reader.log == ["s0"]
    assert opened == {open_shard}
    open_shard.give_back(sample(1))
    assert reader.log == ["s0", "s1", "closed"]
    assert opened == set()


def test_a_shard_that_changes_while_it_is_read_stops_the_evaluation(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(9)}})
    job = tiny_job(tmp_path)
    shards = resolve_inputs(job.inputs, job.storage)
    write_tar(path, {"b": {"mp4": video_bytes(9, seed=1)}, "c": {"txt": b"more"}})
    rules = resolve_rules(job.clips, 4, 8, "leanvae", 1)
    with SampleStream(job, shards, rules, 16, "cpu") as footage, pytest.raises(SourceChanged):
        list(footage)


def test_the_sample_stream_can_be_left_early(tmp_path):
    write_tar(tmp_path / "a.tar", {f"k{i}": {"mp4": video_bytes(9)} for i in range(12)})
    job = tiny_job(tmp_path)
    rules = resolve_rules(job.clips, 4, 8, "leanvae", 1)
    with SampleStream(job, resolve_inputs(job.inputs, job.storage), rules, 16, "cpu") as footage:
        first = next(iter(footage))
    assert isinstance(first.what, OpenedVideo)
    assert not footage._thread.is_alive()
    assert all(open_shard.reader._closed for open_shard in footage._open)
