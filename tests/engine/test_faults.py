"""A fault of one shard attempt is tried again or given up, and the build continues."""

import errno
import os
import signal
import threading
import time

import numpy as np
import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.encoder import Encoder
from pipeline.engine.decoders import losses
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.engine.driver import encode as driver
from pipeline.engine.driver.progress import Silent
from pipeline.engine.driver.report import BuildReport
from pipeline.engine.worker import latent_spool
from pipeline.errors import AccessError, BuildError, InputError, ShardsFailed, StorageUnavailable
from pipeline.ledger.receipts import Ledger
from pipeline.operate import listed_inputs
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import receipts, rows, tiny_job, video_bytes, write_tar


@pytest.fixture
def shard(tmp_path):
    content = {f"{n:03d}": {"mp4": video_bytes(29, seed=n % 3), "txt": b"x"} for n in range(12)}
    return write_tar(tmp_path / "a.tar", content)


@pytest.fixture
def busy_encoder(monkeypatch):
    """A network that takes time, so that what happens meanwhile is met in the middle of a batch."""
    launch = Encoder.launch

    def slow(self, chunks, states):
        time.sleep(0.05)
        return launch(self, chunks, states)

    monkeypatch.setattr(Encoder, "launch", slow)
    monkeypatch.setattr(Encoder, "largest_batch", lambda self, shape: 1)


def test_a_read_that_fails_while_clips_are_encoded_is_tried_again(shard, tmp_path, busy_encoder):
    drill = ("drill.point=after_fetch", "drill.action=raise", f"drill.marker_dir={tmp_path / 'markers'}")
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", *drill))
    assert (tmp_path / "markers" / "after_fetch-0").exists()
    assert report.ok
    assert report.counts.encoded == 12
    assert len(rows(tmp_path / "out")) == report.counts.clips == 60


def test_store_that_refuses_upload_and_deletion_fails_an_attempt_not_the_build(shard, tmp_path, monkeypatch):
    upload, delete = LocalStore.upload, LocalStore.delete
    left = {"upload": 1, "delete": 1}

    def failing_upload(self, path, key, **options):
        left["upload"] -= 1
        if left["upload"] >= 0:
            upload(self, path, key, **options)
            raise StorageUnavailable("the answer was lost")
        return upload(self, path, key, **options)

    def failing_delete(self, key):
        if key.startswith("data/"):
            left["delete"] -= 1
            if left["delete"] >= 0:
                raise StorageUnavailable("503")
        return delete(self, key)

    monkeypatch.setattr(LocalStore, "upload", failing_upload)
    monkeypatch.setattr(LocalStore, "delete", failing_delete)
    report = pipeline.encode(tiny_job(shard, tmp_path / "out"))
    assert left["delete"] <= 0
    assert report.ok
    assert len(rows(tmp_path / "out")) == 60


def test_source_deleted_after_the_listing_fails_its_shard_only(shard, tmp_path, monkeypatch):
    gone = write_tar(tmp_path / "gone.tar", {"a": {"mp4": video_bytes(9), "txt": b"x"}})
    listed = listed_inputs.resolve_inputs

    def list_then_lose(*arguments):
        shards = listed(*arguments)
        gone.unlink()
        return shards

    monkeypatch.setattr(listed_inputs, "resolve_inputs", list_then_lose)
    with pytest.raises(ShardsFailed, match=r"gone\.tar.*run again") as caught:
        pipeline.encode(tiny_job([gone, shard], tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert caught.value.report.shards_done == 1
    assert len(rows(tmp_path / "out")) == 60


def test_a_clip_that_failed_keeps_its_reason_when_its_video_is_decoded_again(tmp_path, monkeypatch):
    """Clip 0 is not finite, then the decoder is killed and the video starts again: clip 0 keeps its reject."""
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(200, 256, 256), "txt": b"x"}})
    lanes = []
    spawn, launch = ProcessLanes.__init__, Encoder.launch

    def remember(self, *arguments):
        lanes.append(self)
        spawn(self, *arguments)

    def absurd_then_dead(self, chunks, states):
        launched = launch(self, chunks, states)
        for chunk, result in zip(chunks, launched.results(), strict=True):
            if chunk.clip == 0:
                result.mean_Cthw[:] = np.nan
                for pid in lanes.pop().pids() if lanes else []:
                    os.kill(pid, signal.SIGKILL)
        return launched

    monkeypatch.setattr(ProcessLanes, "__init__", remember)
    monkeypatch.setattr(Encoder, "launch", absurd_then_dead)
    # 16 MiB of frames are a third of the video, so that the decoder is still at it.
    overrides = ("clips.size=256x256", "engine.frame_bytes=16777216", "engine.decoders=1")
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", *overrides))
    assert not lanes
    assert (report.counts.clips_planned, report.counts.clips, report.counts.clips_rejected) == (40, 39, 1)
    assert report.rejects == {"non_finite_latent": 1}
    assert report.counts.damaged == 1


@pytest.mark.parametrize("memory_bytes", [100, 1 << 24])
def test_video_whose_latents_exceed_memory_is_rejected_alone(tmp_path, monkeypatch, memory_bytes):
    """Mapped from a file or in memory; 1e6 is infinite in float16."""
    shard = write_tar(tmp_path / "a.tar", {f"{n}": {"mp4": video_bytes(9 + 20 * (n > 0), seed=n)} for n in range(3)})
    launch = Encoder.launch

    def overflow(self, chunks, states):
        launched = launch(self, chunks, states)
        for chunk, result in zip(chunks, launched.results(), strict=True):
            if len(chunk.pts_s) == 9:  # video 0, in one chunk
                result.mean_Cthw[1, 0, 0, 0] = 1e6
        return launched

    monkeypatch.setattr(latent_spool, "MEMORY_BYTES", memory_bytes)
    monkeypatch.setattr(Encoder, "launch", overflow)
    job = tiny_job(shard, tmp_path / "out", "clips.select=whole", "write.dtype=float16", "write.max_abs=1e9")
    report = pipeline.encode(job)
    assert report.rejects == {"non_finite_latent": 1}
    (receipt,) = receipts(tmp_path / "out")
    assert (receipt.rejects[0].key, receipt.rejects[0].clip) == ("0", 0)
    assert "to inf in channel 1" in receipt.rejects[0].message
    assert sorted(row["source_key"] for row in rows(tmp_path / "out").values()) == ["1", "2"]


def test_files_refused_after_the_listing_are_left_to_the_next_run(tmp_path, monkeypatch):
    for n in range(4):
        (tmp_path / f"{n}.mp4").write_bytes(video_bytes(9, seed=n))
    listed, results = listed_inputs.resolve_inputs, []

    def list_then_break(*arguments):
        shards = listed(*arguments)
        if not results:
            (tmp_path / "1.mp4").unlink()
            (tmp_path / "1.mp4").symlink_to("1.mp4")  # ELOOP: refused, also to root
            (tmp_path / "2.mp4").unlink()
        return shards

    add = BuildReport.add
    monkeypatch.setattr(
        BuildReport, "add", lambda self, result, ours: (results.append(result), add(self, result, ours=ours))
    )
    monkeypatch.setattr(listed_inputs, "resolve_inputs", list_then_break)
    with pytest.raises(ShardsFailed, match="2 inputs could not be read, the rest is committed"):
        pipeline.encode(tiny_job(tmp_path, tmp_path / "out"))
    assert [text.split(": ")[0] for text in results[0].refused] == [str(tmp_path / f"{n}.mp4") for n in (1, 2)]
    assert sorted(row["source_key"] for row in rows(tmp_path / "out").values()) == ["0", "3"]
    report = verify_output(open_store(str(tmp_path / "out"), StorageConfig()))
    assert report.ok, report.problems


def test_an_output_inside_its_input_is_not_encoded_when_the_run_is_repeated(shard, tmp_path):
    job = tiny_job(tmp_path, tmp_path / "latents", "write.format=tar", "clips.select=head")
    assert pipeline.encode(job).counts.samples == 12
    again = pipeline.encode(job)
    assert (again.shards_total, again.shards_before, again.counts.samples) == (1, 1, 0)
    with pytest.raises(InputError, match="name the videos"):
        pipeline.encode(tiny_job(tmp_path / "latents", tmp_path / "latents", "write.format=tar"))


def test_shards_of_one_name_that_fail_are_all_reported(tmp_path):
    tars = [tmp_path / folder / "x" / "0.tar" for folder in "ab"]
    for n, path in enumerate(tars):
        path.parent.mkdir(parents=True)
        write_tar(path, {"a": {"mp4": video_bytes(9, seed=n), "txt": b"x"}})
    drill = ("drill.point=before_commit", "drill.action=raise", "drill.times=99", f"drill.marker_dir={tmp_path / 'm'}")
    with pytest.raises(ShardsFailed, match="2 of 2 shards failed") as caught:
        pipeline.encode(tiny_job(tars, tmp_path / "out", *drill))
    assert len(caught.value.report.failed) == 2


def test_full_spool_disk_fails_an_attempt_not_the_build(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(60), "txt": b"x"}})
    make, left = latent_spool.tempfile.TemporaryFile, [1]

    def full_once(*arguments, **options):
        if left.pop() if left else 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(*arguments, **options)

    monkeypatch.setattr(latent_spool, "MEMORY_BYTES", 100)
    monkeypatch.setattr(latent_spool.tempfile, "TemporaryFile", full_once)
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", "clips.select=whole", "engine.chunk_frames=4"))
    assert not left
    assert report.ok
    assert [row["num_frames"] for row in rows(tmp_path / "out").values()] == [57]


def test_access_lost_during_a_build_fails_it_with_its_report(shard, tmp_path, monkeypatch):
    small = write_tar(tmp_path / "b.tar", {"a": {"mp4": video_bytes(9), "txt": b"x"}})
    commit = Ledger.commit

    heard = threading.Event()

    class Listening(Silent):
        def update(self, progress):
            if progress.shards_done == 1:
                heard.set()

    def refuse_the_second(self, receipt):
        if receipt.shard.name.endswith("b.tar"):
            return commit(self, receipt)
        assert heard.wait(240)
        raise AccessError("the store answered 403")

    monkeypatch.setattr(Ledger, "commit", refuse_the_second)
    with pytest.raises(BuildError, match=r"403.*resumes") as caught:
        driver.encode(tiny_job([shard, small], tmp_path / "out"), Listening())
    assert caught.value.exit_code == 1
    assert caught.value.report.shards_done == 1


def test_decoders_killed_twice_in_the_middle_of_one_video_lose_no_clip(tmp_path, monkeypatch):
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(300, 256, 256), "txt": b"x"}})
    lanes, killed = [], []
    spawn, launch = ProcessLanes.__init__, Encoder.launch

    def remember(self, *arguments):
        lanes.append(self)
        spawn(self, *arguments)

    def kill_then_launch(self, batch, states):
        # 16 MiB are 17 clips of 60: what is decoded ahead ends before the next kill, and before the end of the video.
        if len(killed) < 2 and batch[0].clip >= (3, 30)[len(killed)]:
            killed.append(lanes[0].pids()[0])
            os.kill(killed[-1], signal.SIGKILL)
        return launch(self, batch, states)

    monkeypatch.setattr(ProcessLanes, "__init__", remember)
    monkeypatch.setattr(Encoder, "launch", kill_then_launch)
    overrides = ("clips.size=256x256", "engine.frame_bytes=16777216", "engine.decoders=1")
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", *overrides))
    assert len(set(killed)) == 2
    assert report.ok
    assert (report.counts.clips, report.counts.clips_rejected, report.rejects) == (60, 0, {})
    assert len(rows(tmp_path / "out")) == 60
    verified = verify_output(open_store(str(tmp_path / "out"), StorageConfig()))
    assert verified.ok, verified.problems


def test_a_video_that_crashes_its_decoder_twice_is_rejected_with_the_signal_named(tmp_path):
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(29), "txt": b"x"}})
    drill = ("drill.point=in_decoder", "drill.action=crash", "drill.times=2", f"drill.marker_dir={tmp_path / 'm'}")
    with pytest.raises(BuildError, match="decoder_crashed 1"):  # it was the only video
        pipeline.encode(tiny_job(shard, tmp_path / "out", *drill))
    (receipt,) = receipts(tmp_path / "out")
    (reject,) = receipt.rejects
    assert reject.message == "decoder process ended: segmentation fault (SIGSEGV), 2 times"


def test_video_whose_decoders_are_always_killed_fails_its_shard_and_is_not_rejected(tmp_path, monkeypatch):
    """As the kernel's memory killer does: it is unknown whether the video is at fault."""
    monkeypatch.setattr(losses, "KILL_PAUSE_S", 0.01)
    shard = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(29), "txt": b"x"}})
    drill = ("drill.point=in_decoder", "drill.times=99", f"drill.marker_dir={tmp_path / 'm'}", "engine.attempts=1")
    with pytest.raises(ShardsFailed, match=r"5 decoders were lost on a, none by a crash; .*SIGKILL") as caught:
        pipeline.encode(tiny_job(shard, tmp_path / "out", *drill))
    assert caught.value.exit_code == 1
    assert receipts(tmp_path / "out") == []


SICK_MOUNT = """
import builtins, errno, io, os
marker, healthy_open = os.environ["SICK_MOUNT"], io.open

class Sick(io.FileIO):
    def read(self, size=-1):
        if self.tell() < 1000 or not os.path.exists(marker):
            return super().read(size)
        os.unlink(marker)
        raise OSError(errno.ESTALE, "Stale file handle")

    def readinto(self, buffer):
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

def sick_open(path, mode="r", *arguments, **options):
    if str(path).endswith("sick.mp4") and os.path.exists(marker):
        return Sick(path) if options.get("buffering") == 0 else io.BufferedReader(Sick(path))
    return healthy_open(path, mode, *arguments, **options)

io.open = builtins.open = sick_open
"""


def test_failed_read_below_a_decoder_fails_an_attempt_and_rejects_no_video(tmp_path, monkeypatch):
    (tmp_path / "videos").mkdir()
    for name in ("sick", "well"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(video_bytes(29, 128, 128))
    hiccup = tmp_path / "hiccup"
    hiccup.touch()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SICK_MOUNT)
    monkeypatch.setenv("SICK_MOUNT", str(hiccup))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))  # of the decoder processes
    report = pipeline.encode(tiny_job(tmp_path / "videos", tmp_path / "out"))
    assert not hiccup.exists()
    assert report.ok
    assert report.rejects == {}
    assert len(rows(tmp_path / "out")) == report.counts.clips == 10
