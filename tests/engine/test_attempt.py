"""One shard attempt: what it waits for, what counts as progress, how it ends."""

import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.engine.worker import clip_writing
from pipeline.engine.worker.progress_counter import ProgressCounter
from pipeline.errors import SourceChanged, SourceRefused, StorageUnavailable
from pipeline.ledger.receipts import Ledger
from pipeline.records import Bucket, Reject
from pipeline.storage.local import LocalStore
from tests.engine.attempts import HeldStore, context_of, encode, latent_for, opened, read_all, shards_of, start, until
from tests.tiny_corpus import receipts, rows, write_tar

BIG = {"bucket": Bucket(5, 256, 256)}  # 32 KiB a latent


@pytest.fixture
def corpus(tmp_path):
    return write_tar(tmp_path / "a.tar", {f"{n}": {"mp4": b"video" * 1000} for n in range(3)})


@pytest.fixture
def context(corpus, tmp_path):
    return context_of(corpus, tmp_path / "out")


@pytest.fixture
def shard(context):
    return shards_of(context)[0]


def commit_elsewhere(shard, context):
    """Another build's attempt, from start to receipt."""
    other = context_of(context.job.inputs[0], context.job.output)
    attempt = start(shard, other)
    encode(attempt, read_all(attempt, 3))
    return until(attempt.poll)


def no_threads_of(attempt):
    return not [thread for thread in threading.enumerate() if attempt.name in thread.name or thread.name == "upload"]


def test_bytes_done_follow_the_clips_of_each_file_up_to_the_size_of_the_shard(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.mp4").write_bytes(b"v" * (100 * (n + 1)))
    context = context_of(tmp_path, tmp_path / "out")
    attempt = start(shards_of(context)[0], context)
    first, second, third = read_all(attempt, 3)
    assert attempt.bytes_done == 0
    encode(attempt, [first])
    assert attempt.bytes_done == 100
    attempt.opened(second, opened(second, 4))
    attempt.clip_done(latent_for(second, 0))
    assert attempt.bytes_done == 100 + 200 // 4
    attempt.sample_rejected(
        second, Reject(second.key, "decode", "decode_timeout", "late", policy=False, uri=second.uri)
    )
    assert attempt.bytes_done == 300
    encode(attempt, [third])
    assert attempt.bytes_done == 600
    until(attempt.poll)
    assert attempt.bytes_done == attempt.shard.num_bytes == 600


# --- progress -------------------------------------------------------------------------------------------------------------


def test_a_slow_upload_is_progress_byte_by_byte(shard, context):
    store, progress = HeldStore(context.job.output), ProgressCounter()
    attempt = start(shard, context, store, progress)
    encode(attempt, read_all(attempt, 3))
    until(store.begun.is_set, attempt)
    seen = []
    for _ in range(5):
        store.step()
        assert attempt.poll() is None
        seen.append(progress.value)
    assert seen == sorted(set(seen))
    store.go_on.set()
    until(attempt.poll)
    assert progress.value > seen[-1]


def test_fetched_bytes_are_progress_before_a_sample_is_complete(shard, context):
    progress = ProgressCounter()
    attempt = start(shard, context, progress=progress)
    samples = read_all(attempt, 3)
    assert progress.value >= sum(len(sample.video) for sample in samples)
    before = progress.value
    attempt.abort()
    assert attempt.ended(60)
    assert progress.value >= before  # a closed attempt takes nothing back


def test_plain_files_that_decoders_read_are_progress(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.mp4").write_bytes(b"v")
    progress = ProgressCounter()
    context = context_of(tmp_path, tmp_path / "out")
    attempt = start(shards_of(context)[0], context, progress=progress)
    read_all(attempt, 3)
    assert progress.value >= 3
    attempt.abort()
    assert attempt.ended(60)


def test_progress_never_shrinks_and_is_safe_between_threads():
    progress, kept = ProgressCounter(), [0]
    progress.watch(lambda: kept[0])

    def count():
        for _ in range(2000):
            progress.add()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        kept[0] += 1
        seen.append(progress.value)
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert progress.value == 8000 + kept[0]


# --- waiting --------------------------------------------------------------------------------------------------------------


def test_encode_loop_never_waits_for_a_hanging_store(tmp_path, corpus, monkeypatch):
    """Clips are taken, however many; instead, no further sample is given out while more than the bound wait."""
    monkeypatch.setattr(clip_writing, "BACKLOG_BYTES", 4 * clip_writing.CLIP_BYTES)
    small_files = ("write.row_group_bytes=65536", "write.file_bytes=1048576")
    context = context_of(corpus, tmp_path / "out", *small_files)
    store = HeldStore(context.job.output)
    attempt = start(shards_of(context)[0], context, store)
    sample = until(attempt.next_sample, attempt)
    attempt.opened(sample, opened(sample, 400))
    for clip in range(400):  # 8 files' worth; returns at once although nothing is uploaded
        attempt.clip_done(latent_for(sample, clip, array=np.zeros((4, 2, 32, 32), np.float32), **BIG))
    attempt.sample_ended(sample)
    until(store.begun.is_set, attempt)
    assert attempt.backlogged
    assert attempt.next_sample() is None
    store.go_on.set()
    until(lambda: not attempt.backlogged, attempt)
    encode(attempt, read_all(attempt, 2))
    result = until(attempt.poll)
    assert (result.counts.clips, result.files) == (402, len(receipts(tmp_path / "out")[0].files))


def test_encoded_videos_are_freed_before_their_latents_are_written(shard, context):
    store = HeldStore(context.job.output)
    attempt = start(shard, context, store)
    samples = read_all(attempt, 3)
    attempt.opened(samples[0], opened(samples[0], 2))
    attempt.clip_done(latent_for(samples[0]))
    attempt.sample_ended(samples[0])  # one clip is still in the network
    assert attempt._accounts.open(samples[0]).sample.video == b""
    store.go_on.set()
    attempt.abort()
    assert attempt.ended(60)


# --- failures -------------------------------------------------------------------------------------------------------------


def test_failed_upload_ends_the_attempt_before_its_next_clip(shard, context, tmp_path, monkeypatch):
    def refuse(self, local_path, key, **options):
        raise StorageUnavailable("503")

    small_files = ("write.row_group_bytes=65536", "write.file_bytes=1048576")
    context = context_of(context.job.inputs[0], tmp_path / "out", *small_files)
    monkeypatch.setattr(LocalStore, "upload", refuse)
    attempt = start(shard, context)
    sample = until(attempt.next_sample, attempt)
    attempt.opened(sample, opened(sample, 500))
    for clip in range(70):
        attempt.clip_done(latent_for(sample, clip, array=np.zeros((4, 2, 32, 32), np.float32), **BIG))
    with pytest.raises(StorageUnavailable, match="503"):
        until(lambda: False, attempt)
    attempt.abort()
    assert attempt.ended(60)
    assert no_threads_of(attempt)
    assert not os.path.exists(attempt.spool_dir)


def test_abort_does_not_wait_and_a_late_upload_deletes_its_file(shard, context, monkeypatch):
    monkeypatch.setattr("pipeline.engine.worker.attempt.JOIN_S", 0.2)
    monkeypatch.setattr("pipeline.writer.upload_queue.STOP_S", 0.2)
    store = HeldStore(context.job.output)
    attempt = start(shard, context, store)
    encode(attempt, read_all(attempt, 3))
    until(store.begun.is_set, attempt)
    attempt.abort()
    assert attempt.ended(60)
    assert not os.path.exists(attempt.spool_dir)
    store.go_on.set()
    until(lambda: no_threads_of(attempt))
    assert list(store.list()) == []


def test_abort_at_any_moment_leaves_no_thread_and_no_file(shard, context):
    for moment in range(4):
        attempt = start(shard, context)
        if moment:
            samples = read_all(attempt, 3)
            encode(attempt, samples[:moment])
        attempt.abort()
        assert attempt.ended(60)
        assert no_threads_of(attempt)
        assert not os.path.exists(attempt.spool_dir)
        assert list(LocalStore(context.job.output).list()) == []


# --- receipts -------------------------------------------------------------------------------------------------------------


def test_shard_with_a_receipt_is_not_read(shard, context, corpus):
    assert commit_elsewhere(shard, context).ours
    corpus.unlink()  # reading would fail
    attempt = start(shard, context)
    result = until(attempt.poll)
    assert (result.ours, result.shard_id) == (False, shard.id(context.fingerprint))
    assert (result.counts.clips, result.files) == (3, 1)
    assert no_threads_of(attempt)
    assert not os.path.exists(attempt.spool_dir)


def test_attempt_after_an_unanswered_commit_counts_as_ours_and_encodes_nothing(shard, context, monkeypatch):
    load, left = Ledger.load, [1]

    def lose_the_answer(self, key):
        receipt = load(self, key)
        if left.pop() if left else 0:
            raise StorageUnavailable("connection reset")
        return receipt

    monkeypatch.setattr(Ledger, "load", lose_the_answer)
    first = start(shard, context)
    encode(first, read_all(first, 3))
    with pytest.raises(StorageUnavailable, match="reset"):
        until(lambda: False, first)
    first.abort()
    assert first.ended(60)
    again = start(shard, context)
    result = until(again.poll)
    assert (result.ours, result.counts.clips) == (True, 3)
    assert len(rows(context.job.output)) == 3  # the files of the first try are there


def test_second_attempt_that_cannot_delete_its_files_still_ends_with_a_note(shard, context, monkeypatch):
    attempt = start(shard, context)
    samples = read_all(attempt, 3)
    commit_elsewhere(shard, context)

    def refuse(self, key):
        raise StorageUnavailable("no delete today")

    monkeypatch.setattr(LocalStore, "delete", refuse)
    encode(attempt, samples)
    result = until(attempt.poll)
    assert not result.ours
    assert "no delete today" in result.notes[0]
    assert no_threads_of(attempt)


def test_second_attempt_of_the_same_build_counts_as_ours(shard, context):
    slow, fast = start(shard, context), start(shard, context)
    samples = read_all(slow, 3)
    encode(fast, read_all(fast, 3))
    until(fast.poll)
    encode(slow, samples)
    assert until(slow.poll).ours


def test_second_attempt_deletes_its_files(shard, context):
    attempt = start(shard, context)
    samples = read_all(attempt, 3)
    commit_elsewhere(shard, context)
    encode(attempt, samples)
    result = until(attempt.poll)
    assert (result.ours, result.notes) == (False, ())
    assert not [info for info in LocalStore(context.job.output).list() if attempt.name in info.key]


# --- absurd latents -------------------------------------------------------------------------------------------------------


def test_non_finite_clip_is_rejected_and_the_rest_of_its_sample_written(shard, context, tmp_path):
    attempt = start(shard, context)
    samples = read_all(attempt, 3)
    encode(attempt, samples[1:])
    attempt.opened(samples[0], opened(samples[0], 2))
    values = np.full((4, 2, 4, 4), 3.0, np.float32)
    values[2, 0, 0, 0] = -3e5
    attempt.clip_done(latent_for(samples[0], 0, array=values))
    attempt.clip_done(latent_for(samples[0], 1))
    attempt.sample_ended(samples[0])  # before the writer has looked at either
    result = until(attempt.poll)
    (receipt,) = receipts(tmp_path / "out")
    assert (result.counts.clips_planned, result.counts.clips, result.counts.clips_rejected) == (4, 3, 1)
    assert (result.counts.samples, result.counts.encoded, result.counts.damaged) == (3, 3, 1)
    (reject,) = receipt.rejects
    assert (reject.stage, reject.reason, reject.clip, reject.policy) == ("encode", "non_finite_latent", 0, False)
    assert "-300000 to 3 in channel 2" in reject.message
    assert (reject.buckets, reject.video) == ({"v5x32x32": 1}, {})
    assert [sum(counts.values()) - counts["ms"] for counts in receipt.videos] == [2 * 3]  # a length and a size each
    assert len(rows(tmp_path / "out")) == 3


def test_clip_with_the_writer_is_kept_when_its_decoder_dies(shard, context, tmp_path):
    """The video is decoded again and rejected in the end: a clip that was handed over counts as the writer reports it."""
    attempt = start(shard, context)
    samples = read_all(attempt, 3)
    encode(attempt, samples[1:])
    attempt.opened(samples[0], opened(samples[0], 3))
    attempt.clip_done(latent_for(samples[0], 0))
    attempt.opened(samples[0], opened(samples[0], 3))
    assert attempt.has_clip(samples[0], 0)
    attempt.sample_rejected(samples[0], Reject("0", "decode", "decoder_crashed", "twice", policy=False))
    result = until(attempt.poll)
    assert (result.counts.clips_planned, result.counts.clips, result.counts.clips_rejected) == (5, 3, 2)
    (reject,) = receipts(tmp_path / "out")[0].rejects
    assert (reject.clips, reject.buckets, reject.video) == (2, {"v5x32x32": 2}, {})
    assert len(rows(tmp_path / "out")) == 3


# --- sources that cannot be read ------------------------------------------------------------------------------------------


def break_one(path, how):
    path.unlink()
    if how == "refused":  # root may read files of any mode, but not a socket
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif how == "replaced":
        path.write_bytes(b"another")


@pytest.mark.parametrize("how", ["refused", "gone", "replaced"])
def test_unreadable_file_of_a_group_does_not_fail_the_others(tmp_path, how):
    for n in range(3):
        (tmp_path / f"{n}.mp4").write_bytes(b"video")
    context = context_of(tmp_path, tmp_path / "out")
    (shard,) = shards_of(context)
    break_one(tmp_path / "1.mp4", how)
    attempt = start(shard, context)
    samples = read_all(attempt, 2)
    assert [sample.key for sample in samples] == ["0", "2"]
    encode(attempt, samples)
    result = until(attempt.poll)
    assert result.shard_id == shard.id(context.fingerprint)
    assert len(result.refused) == 1
    assert result.refused[0].startswith(f"{tmp_path / '1.mp4'}: ")
    (receipt,) = receipts(tmp_path / "out")
    assert [source.uri for source in receipt.shard.objects] == [str(tmp_path / f"{n}.mp4") for n in (0, 2)]
    assert receipt.shard_id == receipt.shard.id(context.fingerprint) != result.shard_id
    assert (receipt.counts.samples, receipt.rejects) == (2, ())


@pytest.mark.parametrize(("how", "error"), [("refused", SourceRefused), ("gone", SourceChanged)])
def test_shard_without_a_readable_file_fails(tmp_path, corpus, how, error):
    (tmp_path / "videos").mkdir()
    for n in range(3):
        (tmp_path / "videos" / f"{n}.mp4").write_bytes(b"video")
    context = context_of([tmp_path / "videos", corpus], tmp_path / "out")
    shards = shards_of(context)
    assert {shard.kind for shard in shards} == {"tar", "files"}
    for shard in shards:
        for source in shard.objects:
            break_one(Path(source.uri), how)
        attempt = start(shard, context)
        with pytest.raises(error) as caught:
            until(lambda: False, attempt)
        assert caught.value.uri in {source.uri for source in shard.objects}
        attempt.abort()
        assert attempt.ended(60)
        assert no_threads_of(attempt)
