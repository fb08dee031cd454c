"""A fault that belongs to one shard attempt stays there: it is tried again or given up, and the build goes on."""

import time

import pytest

import pipeline
from pipeline.encoder import Encoder
from pipeline.engine import driver
from pipeline.errors import ShardsFailed, StorageUnavailable
from pipeline.storage.local import LocalStore
from tests.tiny_corpus import rows, tiny_job, video_bytes, write_tar


@pytest.fixture
def shard(tmp_path):
    content = {f"{n:03d}": {"mp4": video_bytes(29, seed=n % 3), "txt": b"x"} for n in range(12)}
    return write_tar(tmp_path / "a.tar", content)


@pytest.fixture
def busy_encoder(monkeypatch):
    """A network that takes time, so that what happens meanwhile is met in the middle of a batch."""
    encode = Encoder.encode

    def slow(self, chunks, states):
        time.sleep(0.05)
        return encode(self, chunks, states)

    monkeypatch.setattr(Encoder, "encode", slow)
    monkeypatch.setattr(Encoder, "largest_batch", lambda self, shape: 1)


def test_a_read_that_fails_while_clips_are_encoded_is_tried_again(shard, tmp_path, busy_encoder):
    drill = ("drill.point=after_fetch", "drill.action=raise", f"drill.marker_dir={tmp_path / 'markers'}")
    report = pipeline.encode(tiny_job(shard, tmp_path / "out", *drill))
    assert (tmp_path / "markers" / "after_fetch-0").exists()
    assert report.ok
    assert report.counts.encoded == 12
    assert len(rows(tmp_path / "out")) == report.counts.clips == 60


def test_a_store_that_refuses_upload_and_clean_up_costs_an_attempt_not_the_build(shard, tmp_path, monkeypatch):
    upload, delete = LocalStore.upload, LocalStore.delete
    left = {"upload": 1, "delete": 1}

    def failing_upload(self, path, key):
        left["upload"] -= 1
        if left["upload"] >= 0:
            upload(self, path, key)
            raise StorageUnavailable("the answer was lost")
        return upload(self, path, key)

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


def test_a_source_that_vanishes_after_the_listing_fails_its_shard_only(shard, tmp_path, monkeypatch):
    gone = write_tar(tmp_path / "gone.tar", {"a": {"mp4": video_bytes(9), "txt": b"x"}})
    listed = driver.resolve_inputs

    def list_then_lose(*arguments):
        shards = listed(*arguments)
        gone.unlink()
        return shards

    monkeypatch.setattr(driver, "resolve_inputs", list_then_lose)
    with pytest.raises(ShardsFailed, match=r"gone\.tar.*run again") as caught:
        pipeline.encode(tiny_job([gone, shard], tmp_path / "out"))
    assert caught.value.exit_code == 1
    assert caught.value.report.shards_done == 1
    assert len(rows(tmp_path / "out")) == 60
