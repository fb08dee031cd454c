"""Objects of an S3 corpus that the store refuses: which shards fail."""

import pytest

from pipeline.engine.worker.progress_counter import ProgressCounter
from pipeline.errors import AccessError, SourceRefused
from pipeline.storage import open_store
from tests.engine.attempts import context_of, encode, read_all, shards_of, start, until
from tests.faulty_proxy import FaultyProxy
from tests.tiny_corpus import receipts, write_tar

pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(s3):
    with FaultyProxy(s3.address) as proxy:
        yield proxy


def overrides(proxy):
    return f"storage.endpoint_url={proxy.endpoint}", "storage.patience_s=0.5"


def test_refused_video_of_a_group_does_not_fail_the_others(s3, proxy, tmp_path):
    store = open_store(s3.root, s3.config())
    for n in range(3):
        store.write(f"videos/{n}.mp4", b"video")
    context = context_of(f"{s3.root}/videos/", tmp_path / "out", *overrides(proxy))
    (shard,) = shards_of(context)
    with proxy.fault("refuse", keys=r"1\.mp4", code="InvalidObjectState"):
        attempt = start(shard, context)
        encode(attempt, read_all(attempt, 2))
        result = until(attempt.poll)
    assert len(result.refused) == 1
    assert result.refused[0].startswith(f"{s3.root}/videos/1.mp4: ")
    assert "archived" in result.refused[0]
    (receipt,) = receipts(tmp_path / "out")
    assert [source.uri[-5:] for source in receipt.shard.objects] == ["0.mp4", "2.mp4"]


def test_refused_tar_fails_its_shard_and_names_the_object(s3, proxy, tmp_path):
    open_store(s3.root, s3.config()).upload(write_tar(tmp_path / "a.tar", {"a": {"mp4": b"v"}}), "tars/a.tar")
    context = context_of(f"{s3.root}/tars/a.tar", tmp_path / "out", *overrides(proxy))
    (shard,) = shards_of(context)
    with proxy.fault("refuse", keys=r"a\.tar"):
        attempt = start(shard, context)
        with pytest.raises(SourceRefused, match=r"tars/a\.tar") as caught:
            until(lambda: False, attempt)
    assert caught.value.uri == f"{s3.root}/tars/a.tar"
    attempt.abort()
    assert attempt.ended(60)


def test_refused_output_is_not_reported_as_a_refused_source(s3, proxy, tmp_path):
    source = write_tar(tmp_path / "a.tar", {"a": {"mp4": b"v"}})
    context = context_of(source, f"{s3.root}/out", *overrides(proxy))
    store = open_store(context.job.output, context.job.storage)
    (shard,) = shards_of(context)
    with proxy.fault("refuse", keys=r"/data/", methods="PUT"):
        attempt = start(shard, context, store)
        encode(attempt, read_all(attempt, 1))
        with pytest.raises(AccessError, match="403"):
            until(lambda: False, attempt)
    attempt.abort()
    assert attempt.ended(60)
    assert [info.key for info in store.list("data/")] == []


def test_bytes_sent_through_a_slow_connection_are_progress(s3, proxy, tmp_path):
    """Between the first byte of an upload and its end, only the connection moves."""
    source = write_tar(tmp_path / "a.tar", {"a": {"mp4": b"v"}})
    context = context_of(source, f"{s3.root}/out", *overrides(proxy))
    progress, seen = ProgressCounter(), set()
    attempt = start(shards_of(context)[0], context, open_store(context.job.output, context.job.storage), progress)
    samples = read_all(attempt, 1)
    with proxy.fault("slow", latency_s=0.0, bytes_per_s=100e3):
        encode(attempt, samples, clips=400)  # about half a megabyte
        while attempt.poll() is None:
            seen.add(progress.value)
    assert len(seen) > 5
