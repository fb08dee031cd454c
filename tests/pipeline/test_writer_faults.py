"""What a shard writer leaves behind when it fails, is aborted, or meets a full disk: nothing."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DrillConfig, WriteConfig
from pipeline.errors import BuildError, StorageUnavailable, TransientError
from pipeline.records import Bucket, LatentClip
from pipeline.storage import Store
from pipeline.storage.local import LocalStore
from pipeline.writer import ShardWriter
from tests.pipeline.latent_clips import latent_clip, local_store, shard_writer

FORMATS = ("parquet", "tar")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def add_all(writer: ShardWriter, clips: list[LatentClip], store: Store) -> None:
    for clip in clips:
        writer.add(clip)
    while not list(store.list("_index/")):  # the rolled one goes up meanwhile
        writer.check_uploads()
        time.sleep(0.01)
    writer.add(clips[0])


@pytest.mark.parametrize("format", FORMATS)
def test_leaving_by_an_exception_or_without_finish_removes_everything(store: Store, spool: Path, format: str) -> None:
    config = WriteConfig(format=format, row_group_bytes=64 * 1024, file_bytes=1024 * 1024)
    clips = [latent_clip(n, bucket=Bucket(17, 512, 512)) for n in range(9)] + [latent_clip(20)]
    writer = shard_writer(store, spool, config)
    with pytest.raises(BuildError, match="occurs twice"), writer:
        add_all(writer, clips, store)
    with shard_writer(store, spool, config, attempt="a2") as writer:
        for clip in clips:
            writer.add(clip)
    assert list(store.list()) == []
    assert list(spool.iterdir()) == []


def test_abort_after_finish_takes_the_files_back(store: Store, spool: Path) -> None:
    with shard_writer(store, spool, WriteConfig()) as writer:
        writer.add(latent_clip(0))
        writer.finish()
        assert len(list(store.list())) == 2
        writer.abort()
    assert list(store.list()) == []


@pytest.mark.parametrize("point", ["before_upload", "in_upload", "after_upload"])
def test_fire_drills_are_reached_and_cleaned_up(store: Store, spool: Path, tmp_path: Path, point: str) -> None:
    drill = DrillConfig(point=point, action="raise", marker_dir=str(tmp_path / "markers"))
    with shard_writer(store, spool, WriteConfig(), drill=drill) as writer:
        writer.add(latent_clip(0))
        with pytest.raises(TransientError, match=point):
            writer.finish()
    assert (tmp_path / "markers" / f"{point}-0").exists()
    assert list(store.list()) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("limit", [0, 3000, 100_000])
def test_a_full_spool_disk_is_said_so_and_leaves_nothing(store: Store, spool: Path, format: str, limit: int) -> None:
    """The kernel refuses to let a file grow past `limit`, as a full disk would: in a header, in the data, in the
    footer.
    """
    clips = [latent_clip(n, bucket=Bucket(17, 256, 192)) for n in range(4)]  # 30 KiB each
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = shard_writer(store, spool, WriteConfig(format=format, row_group_bytes=64 * 1024))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageUnavailable, match=r"spool folder .* cannot be written"), writer:
            write_all(writer, clips)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(store.list()) == []
    assert list(spool.iterdir()) == []


def write_all(writer: ShardWriter, clips: list[LatentClip]) -> None:
    for clip in clips:
        writer.add(clip)
    writer.finish()


@pytest.mark.parametrize("failing", ["data/", "_index/"])
def test_an_upload_that_fails_leaves_nothing(tmp_path: Path, spool: Path, failing: str) -> None:
    class Refusing(LocalStore):
        def upload(self, local_path: Any, key: str, *, progress: Any = None) -> Any:
            if key.startswith(failing):
                raise StorageUnavailable("503")
            return super().upload(local_path, key, progress=progress)

    store = Refusing(str(tmp_path / "out"))
    with pytest.raises(StorageUnavailable, match="503"), shard_writer(store, spool, WriteConfig()) as writer:
        write_all(writer, [latent_clip(0)])
    assert list(store.list()) == []
    assert list(spool.iterdir()) == []
