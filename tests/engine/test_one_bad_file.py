"""One file of a group whose reading fails, below the decoder or in the reader: the other files are encoded.

The decoders are real processes; a `sitecustomize` on their path makes reads of one file fail with EIO, always or once.
"""

from types import SimpleNamespace

import pytest

import pipeline
from pipeline.errors import ShardsFailed, StorageUnavailable
from pipeline.storage import open_store
from tests.engine.attempts import context_of, encode, read_all, shards_of, start, until
from tests.faulty_proxy import FaultyProxy
from tests.tiny_corpus import receipts, tiny_job, video_bytes

FAULT = """
import os, sys
if "pipeline.engine.decoders.lane_process" in " ".join(sys.orig_argv):
    import errno, time
    import pipeline.video.decode.encoded_file as encoded_file
    marker, mode = os.environ["BAD_FILE_MARKER"], os.environ["BAD_FILE_MODE"]
    class Bad:
        def __init__(self, raw):
            self.seek, self.tell, self.close = raw.seek, raw.tell, raw.close
        def read(self, size=-1):
            time.sleep(3600 if mode == "hangs once" else 0)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    def open_bad(path, *arguments, **options):
        raw = open(path, *arguments, **options)
        if not path.endswith("bad.mp4") or (mode != "always" and os.path.exists(marker)):
            return raw
        open(marker, "w").close()
        return Bad(raw)
    encoded_file.open = open_bad
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for n, name in enumerate(("a", "b", "bad", "c", "d", "e")):
        (tmp_path / "in" / f"{name}.mp4").write_bytes(video_bytes(10, seed=n))
    return tmp_path


def break_reads(folder, monkeypatch, mode):
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(FAULT)
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    monkeypatch.setenv("BAD_FILE_MARKER", str(folder / "failed"))
    monkeypatch.setenv("BAD_FILE_MODE", mode)


def covered(output):
    return sorted(source.uri.rpartition("/")[2] for receipt in receipts(output) for source in receipt.shard.objects)


def test_file_that_always_fails_below_the_decoder_fails_alone(folder, monkeypatch):
    break_reads(folder, monkeypatch, "always")
    with pytest.raises(ShardsFailed) as caught:
        pipeline.encode(tiny_job(folder / "in", folder / "out", "engine.outage_s=1", "engine.attempts=2"))
    assert covered(folder / "out") == ["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"]
    assert caught.value.report.counts.encoded == 5
    assert len(caught.value.report.failed) == 1
    assert "bad.mp4" in str(caught.value.report.failed)


@pytest.mark.parametrize("mode", ["once", "hangs once"])
def test_a_file_whose_reading_fails_or_hangs_once_is_encoded_in_the_same_run_and_never_rejected(
    folder, monkeypatch, mode
):
    break_reads(folder, monkeypatch, mode)
    report = pipeline.encode(tiny_job(folder / "in", folder / "out", "decode.timeout_s=4"))
    assert report.ok
    assert report.rejects == {}
    assert (report.counts.encoded, report.shards_done, report.shards_total) == (6, 2, 2)
    assert covered(folder / "out") == ["a.mp4", "b.mp4", "bad.mp4", "c.mp4", "d.mp4", "e.mp4"]


@pytest.mark.s3
def test_object_that_always_answers_503_becomes_a_shard_of_its_own(s3, tmp_path):
    store = open_store(s3.root, s3.config())
    for n in range(3):
        store.write(f"videos/{n}.mp4", b"video")
    with FaultyProxy(s3.address) as proxy:
        options = f"storage.endpoint_url={proxy.endpoint}", "storage.patience_s=0.5"
        context = context_of(f"{s3.root}/videos/", tmp_path / "out", *options)
        (shard,) = shards_of(context)
        with proxy.fault("throttle", keys=r"1\.mp4"):
            attempt = start(shard, context)
            encode(attempt, read_all(attempt, 2))
            result = until(attempt.poll)
    assert [source.uri[-5:] for source in result.aside] == ["1.mp4"]
    assert covered(tmp_path / "out") == ["0.mp4", "2.mp4"]


def test_a_file_is_not_set_aside_while_its_store_does_not_answer(folder, monkeypatch):
    """Each further file would take all the patience of the storage layer."""
    error = StorageUnavailable("no answer")

    def fail():
        raise error

    context = context_of(folder / "in", folder / "out")
    (shard,) = shards_of(context)
    attempt = start(shard, context)
    monkeypatch.setattr(
        "pipeline.engine.worker.shard_reading.open_store", lambda *arguments: SimpleNamespace(probe=fail)
    )
    assert not attempt._reading._go_on_without(shard.objects[0], error)
    attempt.abort()
    assert attempt.ended(60)
