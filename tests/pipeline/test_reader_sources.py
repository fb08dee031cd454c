"""Sources of samples: temporary files, plain video files, object storage; memory for a long shard."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import SourceChanged, StorageUnavailable
from pipeline.reader import ShardReader, read_samples
from pipeline.records import Sample
from pipeline.storage import open_store
from tests.faulty_proxy import Fault, FaultyProxy, always, first

if TYPE_CHECKING:
    from tests.conftest import S3Server

from tests.pipeline.test_reader import LIMIT, MiB, brief, pack, read, shard_of

# --- temporary files and plain files --------------------------------------------------------------------------------------


def test_large_videos_wait_in_files_until_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    data = [os.urandom(MiB + 1 + n) for n in range(3)]
    path = pack(
        tmp_path / "x.tar", [(f"{n}.{e}", d) for n, d in enumerate(data) for e, d in (("mp4", d), ("txt", b"x"))]
    )
    with ShardReader(shard_of(path), StorageConfig(spool_bytes=MiB), max_video_bytes=LIMIT) as reader:
        samples = [item for item in reader if isinstance(item, Sample)]
        paths = [Path(str(sample.video)) for sample in samples]
        assert [path.read_bytes() for path in paths] == data
        reader.release(samples[1])
        reader.release(samples[1])
        assert [path.exists() for path in paths] == [True, False, True]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_files_of_a_killed_reader_are_removed_and_those_of_a_live_one_are_not(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.mp4", bytes(MiB + 1))])
    temp = tmp_path / "tmp"
    temp.mkdir()
    code = (
        "import os, signal, sys; from pipeline.config import StorageConfig; from pipeline.reader import ShardReader\n"
        "from pipeline.corpus import resolve_inputs\n"
        "(shard,) = resolve_inputs(sys.argv[1:], StorageConfig())\n"
        "reader = ShardReader(shard, StorageConfig(spool_bytes=1 << 20), max_video_bytes=1 << 30)\n"
        "print(next(iter(reader)).video, flush=True); sys.stdin.read(1); os.kill(os.getpid(), signal.SIGKILL)"
    )

    def start() -> tuple[subprocess.Popen[bytes], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(temp)},
        )
        assert process.stdout is not None
        return process, Path(process.stdout.readline().decode().strip())

    killed, orphan = start()
    killed.communicate(b"x")
    assert orphan.exists()
    living, kept = start()
    assert not orphan.exists()
    other, _ = start()
    assert kept.exists()
    for process in (living, other):
        process.communicate(b"x")


def test_plain_files_are_read_in_place_and_never_deleted(tmp_path: Path) -> None:
    for name, content in {
        "b.mp4": b"v",
        "b.txt": b"words",
        "b.json": b'{"caption": "other", "n": 1}',
        "c.mp4": b"v",
        "c.json": b'{"text": "t"}',
        "d.mp4": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())
    with ShardReader(shard, StorageConfig(), max_video_bytes=LIMIT) as reader:
        items = list(reader)
        for item in items:
            if isinstance(item, Sample):
                reader.release(item)
    assert brief(items) == [
        ("b", str(tmp_path / "b.mp4"), "words"),
        ("c", str(tmp_path / "c.mp4"), "t"),
        ("d", "empty_video", False),
    ]
    assert isinstance(items[0], Sample)
    assert items[0].metadata["n"] == 1
    assert (tmp_path / "b.mp4").exists()
    assert (tmp_path / "c.mp4").exists()


def test_the_key_of_a_plain_file_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "b/x.mp4", "b/x.webm", "b/y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"v")
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())
    samples = list(read_samples(shard, StorageConfig(), max_video_bytes=LIMIT))
    assert [item.key for item in samples] == ["x", "x", "x", "y"]
    assert len({item.uri for item in samples}) == 4
    for source, item in zip(shard.objects, samples, strict=True):
        (alone,) = read_samples(replace(shard, objects=(source,)), StorageConfig(), max_video_bytes=LIMIT)
        assert (alone.key, alone.uri, alone.source_index) == (item.key, item.uri, item.source_index)


def test_a_file_replaced_after_listing_stops_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old")
    path = pack(tmp_path / "x.tar", [("a.mp4", b"old")])
    shards = [shard_of(tmp_path / "a.mp4", kind="files"), shard_of(path)]
    os.utime(tmp_path / "a.mp4", ns=(1, 1))
    os.utime(path, ns=(1, 1))
    for shard in shards:
        with pytest.raises(SourceChanged):
            list(read_samples(shard, StorageConfig(), max_video_bytes=LIMIT))


def test_closing_from_another_thread_ends_iteration(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [(f"{n}.{e}", b"x") for n in range(50) for e in ("mp4", "txt")])
    reader = ShardReader(shard_of(path), StorageConfig(), max_video_bytes=LIMIT)
    seen = 0
    for _ in reader:
        seen += 1
        if seen == 3:
            reader.close()
    assert seen == 3


def test_memory_does_not_grow_with_the_length_of_a_shard(tmp_path: Path) -> None:
    def peak(samples: int) -> int:
        path = pack(
            tmp_path / f"{samples}.tar",
            [(f"{n:05d}.{e}", d) for n in range(samples) for e, d in (("mp4", bytes(MiB)), ("txt", b"x"))],
        )
        shard = shard_of(path)
        tracemalloc.start()
        for _ in read_samples(shard, StorageConfig(), max_video_bytes=LIMIT):
            pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    few, many = peak(5), peak(60)
    assert many < few + MiB
    assert many < 8 * MiB


def test_a_large_video_is_in_memory_once(tmp_path: Path) -> None:
    shard = shard_of(pack(tmp_path / "x.tar", [("a.mp4", bytes(64 * MiB))]))
    tracemalloc.start()
    (sample,) = read_samples(shard, StorageConfig(spool_bytes=256 * MiB), max_video_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(sample, Sample)
    assert len(sample.video) == 64 * MiB
    assert peak < 80 * MiB


# --- object storage -------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_shard_from_s3_equals_the_local_one_despite_broken_connections(s3: S3Server, tmp_path: Path) -> None:
    entries = [
        (f"{n:03d}.{e}", os.urandom(150_000) if e == "mp4" else b"words")
        for n in range(20)
        for e in ("json", "mp4", "txt")
    ]
    path = pack(tmp_path / "x.tar", [*entries, ("zz.mp4", (tarfile.LNKTYPE, "003.mp4"))])
    store = open_store(s3.root, s3.config())
    store.upload(path, "in/x.tar")
    local, _ = read(path)
    with FaultyProxy(s3.address, first(10, Fault("cut", after_bytes=40_000))) as proxy:
        config = s3.config(endpoint_url=proxy.endpoint, part_bytes=256 * 1024, read_ahead_bytes=MiB)
        (shard,) = resolve_inputs([f"{s3.root}/in"], config)
        with ShardReader(shard, config, max_video_bytes=LIMIT) as reader:
            remote = list(reader)
            assert reader.wait_s > 0
        assert proxy.faults == 10
    as_tuples = [
        [(item.key, item.video, item.caption, item.index) for item in items if isinstance(item, Sample)]
        for items in (local, remote)
    ]
    assert as_tuples[0] == as_tuples[1]
    assert len(remote) == 21
    store.write("in/x.tar", b"other")
    with pytest.raises(SourceChanged):
        list(read_samples(shard, s3.config(), max_video_bytes=LIMIT))


@pytest.mark.s3
def test_a_store_that_does_not_answer_is_not_a_truncated_shard(s3: S3Server, tmp_path: Path) -> None:
    open_store(s3.root, s3.config()).upload(pack(tmp_path / "x.tar", [("a.mp4", bytes(MiB))]), "x.tar")
    (shard,) = resolve_inputs([f"{s3.root}/x.tar"], s3.config())
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=0))) as proxy:
        config = s3.config(endpoint_url=proxy.endpoint, max_attempts=2)
        with pytest.raises(StorageUnavailable):
            list(read_samples(shard, config, max_video_bytes=LIMIT))


@pytest.mark.s3
def test_plain_videos_in_a_bucket_have_their_captions(s3: S3Server) -> None:
    store = open_store(f"{s3.root}/v", s3.config())
    for name, content in {
        "a.mp4": b"small",
        "a.txt": b"words",
        "b.webm": bytes(MiB + 5),
        "b.json": b'{"prompt": "p"}',
    }.items():
        store.write(name, content)
    config = s3.config(spool_bytes=MiB)
    (shard,) = resolve_inputs([f"{s3.root}/v"], config)
    with ShardReader(shard, config, max_video_bytes=LIMIT) as reader:
        a, b = list(reader)
        assert isinstance(a, Sample)
        assert isinstance(b, Sample)
        assert (a.key, a.video, a.caption) == ("a", b"small", "words")
        assert (b.key, b.video_ext, b.caption) == ("b", "webm", "p")
        assert Path(str(b.video)).stat().st_size == MiB + 5
    assert not Path(str(b.video)).exists()
