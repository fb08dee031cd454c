"""Whole builds over plain files: subsets, two builds at once, touched files, retried rejects, repeated verdicts."""

import atexit
import json
import os
import sys

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.errors import NothingEncoded, RejectBudgetExceeded
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.status import status
from pipeline.operate.takedown import take_down, undo
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests import forked_command
from tests.careless_store import CarelessStore
from tests.engine.test_inline import assert_same_rows
from tests.tiny_corpus import receipts, rows, tiny_flags, tiny_job, video_bytes, write_tar

FRAMES = {"a": 9, "b": 29, "c": 13, "d": 17}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("videos")
    for n, (name, frames) in enumerate(FRAMES.items()):
        (made / f"{name}.mp4").write_bytes(video_bytes(frames, seed=n))
    return made


@pytest.fixture(scope="module")
def clean(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    pipeline.encode(tiny_job(folder, output))
    return rows(output)


def assert_sound(output, clean):
    assert_same_rows(clean, rows(output))
    report = verify_output(open_store(str(output), StorageConfig()))
    assert report.ok, report.problems
    assert report.rows == len(clean)


def lathe(*arguments, **options):
    return forked_command.run(*arguments, **options)


def test_run_over_one_file_between_two_full_runs_doubles_no_row(folder, clean, tmp_path):
    output = tmp_path / "out"
    drill = ["--set", "drill.point=before_commit", "--set", f"drill.marker_dir={tmp_path / 'm'}"]
    command = ["encode", folder, output, *tiny_flags("--executor", "inline")]
    assert lathe(*command, *drill).returncode == -9
    pipeline.encode(tiny_job([folder / "b.mp4"], output))
    report = pipeline.encode(tiny_job(folder, output))
    assert (report.counts.samples, report.ok) == (3, True)
    assert_sound(output, clean)


def test_rows_do_not_depend_on_how_files_are_grouped(folder, clean, tmp_path):
    pipeline.encode(tiny_job(folder, tmp_path / "out", "storage.files_per_shard=3"))
    assert_sound(tmp_path / "out", clean)
    again = pipeline.encode(tiny_job(folder, tmp_path / "out", "storage.files_per_shard=1"))
    assert (again.shards_done, again.shards_before) == (0, 2)


def two_at_once(folder, output, environment=None):
    """Two builds with other listings and groups that begin together."""
    flags = tiny_flags("--executor", "inline")
    listings = [[folder], [folder / f"{name}.mp4" for name in "bcd"]]
    runs = [
        forked_command.start("encode", *listing, output, *flags, *size, env=environment)
        for listing, size in zip(listings, (["--set", "storage.files_per_shard=3"], []), strict=True)
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr


def test_two_builds_at_once_with_other_groups_count_each_file_once(folder, clean, tmp_path):
    two_at_once(folder, tmp_path / "out")
    report = verify_output(open_store(str(tmp_path / "out"), StorageConfig()))
    assert (report.ok, report.rows) == (True, len(clean)), report.problems
    found = status(open_store(str(tmp_path / "out"), StorageConfig()))
    assert (found["samples"], found["encoded"], found["clips"]) == (4, 4, len(clean))
    assert pipeline.encode(tiny_job(folder, tmp_path / "out")).counts.samples == 0


@pytest.mark.s3
def test_two_builds_at_once_on_a_store_without_conditional_writes(folder, clean, s3):
    two_at_once(folder, s3.root + "/out", dict(os.environ))
    report = verify_output(open_store(s3.root + "/out", StorageConfig()))
    assert (report.ok, report.rows) == (True, len(clean)), report.problems


def test_a_store_that_refuses_conditions_takes_builds_snapshots_and_takedowns(folder, clean, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    with CarelessStore(put_answers=(501,) * 999) as server:
        storage = StorageConfig(endpoint_url=server.endpoint)
        job = tiny_job(folder, "s3://bucket/out", f"storage.endpoint_url={server.endpoint}")
        report = pipeline.encode(job)
        assert any("the store has no conditional writes" in notice for notice in report.notices)
        assert pipeline.encode(job).shards_done == 0
        assert_same_rows(clean, rows("s3://bucket/out", storage))
        store = open_store("s3://bucket/out", storage)
        published = publish(store, PublishOptions())
        assert any("cannot refuse a second publisher" in notice for notice in published.notices)
        assert published.snapshot.counts["rows"] == len(clean)
        record = take_down(store, [str(folder / "a.mp4")], reason="asked", by="ann")["record"]
        assert undo(store, record, reason="mistake", by="ann")
        assert len(server.put_answers) > 900, "each command asks once"


def test_a_touched_file_gives_no_second_row(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.mp4").write_bytes(video_bytes(9, seed=ord(name)))
    tar = write_tar(tmp_path / "t.tar", {"x": {"mp4": video_bytes(9, seed=9), "txt": b"x"}})
    output = tmp_path / "out"
    pipeline.encode(tiny_job(tmp_path, output))
    before = rows(output)
    for path in (tmp_path / "a.mp4", tar):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 5_000_000_000))
    report = pipeline.encode(tiny_job(tmp_path, output))
    assert report.counts.samples == 0
    assert any("2 inputs have a new modification time" in text for text in report.notices)
    assert rows(output) == before
    assert verify_output(open_store(str(output), StorageConfig())).ok


@pytest.mark.parametrize("content", [b"", b'{"attempt": "x", "cou'])
def test_truncated_receipt_is_written_again(folder, clean, tmp_path, content):
    output = tmp_path / "out"
    pipeline.encode(tiny_job(folder, output))
    (key,) = (path for path in (output / "_receipts").iterdir())
    key.write_bytes(content)
    report = verify_output(open_store(str(output), StorageConfig()))
    assert "run the build again" in report.problems[0].expected
    assert pipeline.encode(tiny_job(folder, output)).counts.samples == 4
    assert_sound(output, clean)
    assert pipeline.encode(tiny_job(folder, output)).counts.samples == 0


def test_build_over_its_reject_budget_fails_when_run_again(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.mp4").write_bytes(video_bytes(9) if n == 0 else b"not a video")
    job = tiny_job(tmp_path, tmp_path / "out")
    for _ in range(2):
        with pytest.raises(RejectBudgetExceeded, match="3 of 4 samples are damaged"):
            pipeline.encode(job)
    assert pipeline.encode(tiny_job(tmp_path, tmp_path / "out", "reject_budget=0.9")).ok
    for n in (2, 3):
        (tmp_path / f"{n}.mp4").write_bytes(video_bytes(9, seed=n))
    assert pipeline.encode(job).ok  # one damaged file is left, of four


def test_a_build_that_encoded_nothing_fails_also_when_run_again(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"a": {"txt": b"no video"}, "b": {"mp4": video_bytes(3), "txt": b"x"}})
    for _ in range(2):
        with pytest.raises(NothingEncoded, match="2 samples in, 0 clips out"):
            pipeline.encode(tiny_job(shard, tmp_path / "out"))


def test_raised_limits_give_a_notice_and_are_retried_by_option(folder, clean, tmp_path):
    tar = write_tar(
        tmp_path / "t.tar",
        {f"{n}": {"mp4": video_bytes(9 + 8 * n, seed=n), "txt": b"x"} for n in range(4)},
    )
    output, inputs = tmp_path / "out", [folder, tar]
    assert pipeline.encode(tiny_job(inputs, output, "decode.max_frames=16")).rejects == {"too_many_frames": 5}
    second = pipeline.encode(tiny_job(inputs, output))
    assert second.counts.samples == 0
    assert any("5 inputs of finished shards were rejected by limits" in text for text in second.notices)
    run = lathe("encode", *inputs, output, *tiny_flags("--executor", "inline"), "--retry-rejects")
    assert run.returncode == 0, run.stderr
    assert "5 inputs of finished shards are encoded again" in run.stderr
    found = rows(output)
    assert_same_rows(clean, {name: row for name, row in found.items() if not row["source_uri"].endswith(".tar")})
    pipeline.encode(tiny_job(inputs, tmp_path / "at-once"))
    assert_same_rows(rows(tmp_path / "at-once"), found)
    whole = status(open_store(str(output), StorageConfig()))
    once = status(open_store(str(tmp_path / "at-once"), StorageConfig()))
    assert {
        name: whole[name] for name in ("samples", "encoded", "rejected", "clips", "frames", "rejects", "shards")
    } == {name: once[name] for name in ("samples", "encoded", "rejected", "clips", "frames", "rejects", "shards")}
    assert verify_output(open_store(str(output), StorageConfig())).ok
    assert (
        pipeline.encode(tiny_job(inputs, output)).notices == second.notices[1:]
    )  # only the notice of untrained weights


def test_clips_rejected_by_a_limit_are_retried_and_the_others_kept(tmp_path):
    """`write.max_abs` rejects single clips: a retry encodes these and no clip that is there."""
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(29), "txt": b"x"}})
    pipeline.encode(tiny_job(shard, tmp_path / "all"))
    every = rows(tmp_path / "all")
    sizes = sorted(largest(row) for row in every.values())
    limit = (sizes[0] + sizes[-1]) / 2
    first = pipeline.encode(tiny_job(shard, tmp_path / "out", f"write.max_abs={limit}", "reject_budget=1"))
    assert 0 < first.counts.clips < len(every)
    before = rows(tmp_path / "out")
    retried = pipeline.encode(tiny_job(shard, tmp_path / "out", retry_rejects=""))
    assert retried.counts.clips == len(every) - len(before)
    assert_same_rows(every, rows(tmp_path / "out"))
    found = status(open_store(str(tmp_path / "out"), StorageConfig()))
    assert (found["samples"], found["encoded"], found["clips_planned"], found["clips_rejected"]) == (
        1,
        1,
        len(every),
        0,
    )
    assert found["rejects"] == {}


def largest(row) -> float:
    import numpy as np

    return float(np.abs(np.frombuffer(row["vae_latent_bytes"], "<f4")).max())


def test_a_group_of_long_videos_ends_after_its_seconds_and_the_rest_is_another_shard(tmp_path):
    """Three videos of 25 s and 30 s a shard. The frames of one do not fit into the budget, so no decoder runs ahead of the loop."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.mp4").write_bytes(video_bytes(200, 256, 256, seed=n))
    sizes = ("clips.size=256x256", "engine.frame_bytes=16777216", "engine.decoders=1")
    report = pipeline.encode(tiny_job(folder, tmp_path / "out", *sizes, "engine.shard_video_s=30"))
    assert (report.ok, report.shards_total, report.shards_done) == (True, 2, 2)
    covered = [[source.uri[-5:] for source in receipt.shard.objects] for receipt in receipts(tmp_path / "out")]
    assert sorted(covered) == [["0.mp4", "1.mp4"], ["2.mp4"]]
    assert len(rows(tmp_path / "out")) == 120
    assert pipeline.encode(tiny_job(folder, tmp_path / "out", *sizes)).counts.samples == 0


def forbid_networks():
    """Networks cannot be built in this process, which prints at its end whether Ray was imported."""
    import pipeline.encoder.running as running

    running.load_vae = None
    atexit.register(lambda: print(json.dumps("ray" in sys.modules)))


def test_resume_of_a_finished_build_starts_no_ray_and_builds_no_network(folder, tmp_path):
    pipeline.encode(tiny_job(folder, tmp_path / "out"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = ["encode", folder, tmp_path / "out", *tiny_flags("--executor", "ray")]
    run = lathe(*command, env=environment, prepare="tests.engine.test_exactly_once:forbid_networks")
    assert run.returncode == 0, run.stderr
    assert "0 of 1 shard encoded" in run.stdout
    assert json.loads(run.stdout.splitlines()[-1]) is False
