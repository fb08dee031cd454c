"""Shards as people make them: WebDataset's rules, and every pitfall handled and counted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import webdataset

from pipeline.config import StorageConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import SourceChanged, StorageUnavailable
from pipeline.reader import ShardReader, read_samples
from pipeline.records import Reject, Sample, Shard, SourceObject
from pipeline.storage import open_store, stat_uri
from tests.faulty_proxy import Fault, FaultyProxy, always, first

if TYPE_CHECKING:
    from tests.conftest import S3Server

MiB = 1024 * 1024
LIMIT = 1 << 30
Entry = tuple[str, Any]


def pack(path: Path, entries: list[Entry], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) or (name, (type, link target))."""
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def shard_of(*uris: str | Path, config: StorageConfig | None = None, kind: Any = "tar") -> Shard:
    infos = [(str(uri), stat_uri(str(uri), config or StorageConfig())) for uri in uris]
    return Shard(kind, "shard", tuple(SourceObject(uri, info.size, info.etag) for uri, info in infos))


def read(path: Path, **fields: Any) -> tuple[list[Sample | Reject], dict[str, int]]:
    """All items of a tar, twice, which must agree."""
    limit = fields.pop("max_video_bytes", LIMIT)
    counters: dict[str, int] = {}
    shard, config = shard_of(path), StorageConfig(**fields)
    items = list(read_samples(shard, config, max_video_bytes=limit, counters=counters))
    again = list(read_samples(shard, config, max_video_bytes=limit))
    if all(isinstance(item, Reject) or isinstance(item.video, bytes) for item in items):
        assert items == again
    return items, counters


def brief(items: list[Sample | Reject]) -> list[tuple[Any, ...]]:
    return [
        (item.key, item.video, item.caption) if isinstance(item, Sample) else (item.key, item.reason, item.policy)
        for item in items
    ]


def test_a_shard_of_video2dataset(tmp_path: Path) -> None:
    failed = {"status": "failed_to_download", "error_message": "HTTP 404", "url": "x"}
    path = pack(
        tmp_path / "00000.tar",
        [
            ("000000.json", json.dumps({"status": "success", "fps": 25}).encode()),
            ("000000.mp4", b"video"),
            ("000000.txt", b"a cat\n"),
            ("000001.json", json.dumps(failed).encode()),
            ("000001.txt", b"a dog"),
            ("000002.json", b'{"caption": "from json"}'),
            ("000002.webm", b"other"),
        ],
    )
    items, counters = read(path)
    first, second, third = sorted(items, key=lambda item: item.key or "")
    assert first == Sample("000000", 0, str(path), b"video", "mp4", "a cat", {"status": "success", "fps": 25})
    assert isinstance(second, Reject)
    assert (second.key, second.stage, second.reason, second.policy) == ("000001", "read", "no_video", True)
    assert "failed_to_download" in second.message
    assert "HTTP 404" in second.message
    assert isinstance(third, Sample)
    assert (third.index, third.video_ext, third.caption) == (2, "webm", "from json")
    assert counters == {}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset's own
def test_keys_and_fields_are_those_of_webdataset(tmp_path: Path) -> None:
    entries = [
        (name, name.encode())
        for name in (
            "a.mp4",
            "a.txt",
            "dir/a.mp4",
            "dir/a.final.mp4",
            "v1.2/clip.orig.mp4",
            "v1.2/clip.json",
            "x/y/z.MP4",
            "é" * 60 + ".mp4",
        )
    ] + [("l" * 180 + ".mp4", b"long"), ("n" * 120 + "/" + "m" * 150 + ".mp4", b"long")]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = pack(tmp_path / f"{form}.tar", entries, form=form)
        theirs = {sample["__key__"] for sample in webdataset.WebDataset(str(path), shardshuffle=False)}
        items, _ = read(path)
        assert {item.key for item in items} == theirs
        assert all(isinstance(item, Sample) for item in items)
        assert sorted(item.index for item in items if isinstance(item, Sample)) == list(range(len(theirs)))


def test_what_is_no_sample_is_passed_over_and_counted(tmp_path: Path) -> None:
    entries = [
        ("s", (tarfile.DIRTYPE, "")),
        ("s/._000.mp4", b"apple"),
        ("./s/000.mp4", b"video"),
        ("s/._000.txt", b"apple"),
        ("s/000.txt", b"words"),
        ("__MACOSX/s/000.mp4", b"apple"),
        ("s/.DS_Store", b"x"),
        ("s/README", b"x"),
        ("__meta__", b"x"),
        ("s/001.mp4", (tarfile.SYMTYPE, "000.mp4")),
        ("s/001.json", b"{}"),
        ("s/fifo.mp4", (tarfile.FIFOTYPE, "")),
        ("s/002.wav", b"sound"),
        ("s/002.mp4", b"video 2"),
    ]
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert brief(items) == [("s/000", b"video", "words"), ("s/001", "no_video", True), ("s/002", b"video 2", None)]
    assert counters == {
        "skipped_directory": 1,
        "skipped_appledouble": 3,
        "skipped_hidden": 1,
        "no_extension": 1,
        "skipped_meta": 1,
        "skipped_symlink": 1,
        "skipped_special": 1,
        "ignored_fields": 1,
    }


def test_scattered_members_come_together(tmp_path: Path) -> None:
    names = [f"{n:03d}" for n in range(50)]
    for order in (("mp4", "json", "txt"), ("json", "mp4", "txt"), ("txt", "json", "mp4")):
        path = pack(tmp_path / "x.tar", [(f"{name}.{field}", b'{"n": 1}') for field in order for name in names])
        items, counters = read(path)
        assert [(item.key, item.index) for item in items if isinstance(item, Sample)] == list(
            zip(names, range(50), strict=True)
        )
        assert all(isinstance(item, Sample) and item.caption and item.metadata for item in items)
        assert counters == {"reopened_keys": 100}


def test_parts_that_come_too_late_are_rejected_never_a_second_sample(tmp_path: Path) -> None:
    complete = [("a.mp4", b"1"), ("a.txt", b"one"), ("b.mp4", b"2"), ("b.txt", b"two")]
    late = [("a.mp4", b"3"), ("a.txt", b"three"), ("c.mp4", b"4"), ("a.json", b"{}"), ("c.txt", b"x")]
    items, counters = read(pack(tmp_path / "x.tar", complete + late))
    assert brief(items) == [("a", b"1", "one"), ("b", b"2", "two"), ("a", "duplicate_key", False), ("c", b"4", "x")]
    assert counters["late_members"] == 3


def test_the_window_is_bounded_in_bytes(tmp_path: Path) -> None:
    big = [(f"{n}.mp4", bytes(20 * MiB)) for n in range(4)]
    items, _ = read(pack(tmp_path / "x.tar", [*big, ("0.txt", b"late"), ("3.txt", b"in time")]))
    assert [item.key for item in items] == ["0", "1", "2", "0", "3"]
    assert isinstance(items[3], Reject)
    assert isinstance(items[4], Sample)
    assert items[4].caption == "in time"


def test_fields_that_repeat_and_videos_to_choose_from(tmp_path: Path) -> None:
    entries = [
        ("a.mp4", b"first"),
        ("a.MP4", b"second"),
        ("b.webm", b"webm"),
        ("b.orig.mp4", b"orig"),
        ("b.mp4", b"mp4"),
        ("b.mov", b"mov"),
        ("b.txt", b"x"),
        ("b.txt", b"y"),
    ]
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert sorted(brief(items)) == [("a", b"first", None), ("b", b"mp4", "x")]
    assert counters == {"duplicate_fields": 2, "extra_videos": 3}


def test_texts_that_are_none(tmp_path: Path) -> None:
    entries = [
        ("a.mp4", b"1"), ("a.txt", b"caf\xe9"), ("a.json", b"{not json"),
        ("b.mp4", b"1"), ("b.txt", b"\xef\xbb\xbf  bom \n"), ("b.json", b"[1, 2]"),
        ("c.mp4", b"1"), ("c.txt", b" \n"), ("c.json", b"[" * 100_000),
        ("d.mp4", b"1"), ("d.json", b'{"text": "half \\ud800 pair", "n": 1}'),
        ("e.mp4", b"1"), ("e.json", b"1" * 5000),
        ("f.mp4", b"1"), ("f.txt", bytes(17 * MiB)),
    ]  # fmt: skip
    items, counters = read(pack(tmp_path / "x.tar", entries))
    found = {item.key: item for item in items if isinstance(item, Sample)}
    assert found["a"].caption == "caf\ufffd"
    assert (found["b"].caption, found["b"].metadata) == ("bom", {})
    assert found["c"].caption is None
    assert found["d"].caption == "half ? pair"
    assert found["f"].caption is None
    assert len(found) == 6
    assert counters == {"non_utf8_captions": 1, "bad_json": 3, "json_not_an_object": 1, "oversized_texts": 1} | (
        {"reopened_keys": counters["reopened_keys"]} if "reopened_keys" in counters else {}
    )


def test_limits_are_checked_before_bytes_are_read(tmp_path: Path) -> None:
    items, _ = read(
        pack(tmp_path / "x.tar", [("a.mp4", b"x" * 100), ("b.mp4", b"x" * 101), ("c.mp4", b"")]), max_video_bytes=100
    )
    assert brief(items) == [("a", b"x" * 100, None), ("b", "too_large", True), ("c", "empty_video", False)]
    # A header that promises eight exabytes over an archive of two kilobytes allocates nothing.
    info = tarfile.TarInfo("huge.mp4")
    info.size = 8 << 60
    path = tmp_path / "huge.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    tracemalloc.start()
    items, _ = read(path, max_video_bytes=9 << 60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert brief(items) == [("huge", "truncated_shard", False)]
    assert peak < 8 * MiB


def test_names_are_keys_and_never_paths(tmp_path: Path) -> None:
    victim = tmp_path / "victim.mp4"
    entries = [("../victim.mp4", b"x"), (str(victim), b"y"), ("/etc/passwd.mp4", b"z"), ("a/../../b.mp4", b"w")]
    (tmp_path / "in").mkdir()
    before = set(tmp_path.rglob("*"))
    items, counters = read(pack(tmp_path / "in" / "x.tar", entries))
    assert {item.key for item in items} == {"../victim", str(victim)[:-4], "/etc/passwd", "a/../../b"}
    assert counters == {"unsafe_names": 4}
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "in" / "x.tar"}


def test_names_that_are_no_utf8_are_spelled_out(tmp_path: Path) -> None:
    items, counters = read(
        pack(tmp_path / "x.tar", [("caf\udce9.mp4", b"1"), ("caf\udce8.mp4", b"2")], form=tarfile.GNU_FORMAT)
    )
    assert brief(items) == [("caf\\xe9", b"1", None), ("caf\\xe8", b"2", None)]
    assert counters == {"non_utf8_names": 2}


def test_hard_links_are_followed_in_the_archive(tmp_path: Path) -> None:
    link = tarfile.LNKTYPE
    entries = [
        ("a.mp4", b"video"), ("a.txt", b"words"),
        ("b.mp4", (link, "a.mp4")), ("b.txt", (link, "a.txt")),
        ("c.mp4", (link, "b.mp4")), ("d.mp4", (link, "nowhere.mp4")), ("e.mp4", (link, "/etc/passwd")),
    ]  # fmt: skip
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert sorted(brief(items)) == [
        ("a", b"video", "words"),
        ("b", b"video", "words"),
        ("c", b"video", None),
        ("d", "unresolved_hardlink", False),
        ("e", "unresolved_hardlink", False),
    ]
    assert counters == {"resolved_hardlinks": 3, "unresolved_hardlinks": 2}
    items, _ = read(pack(tmp_path / "x.tar.gz", entries, "w:gz"))
    assert ("b", "unresolved_hardlink", False) in brief(items), "no ranges inside a compressed archive"


def test_sparse_files_of_gnu_tar(tmp_path: Path) -> None:
    sparse = tmp_path / "s.mp4"
    with sparse.open("wb") as file:
        file.truncate(MiB)
        file.seek(500_000)
        file.write(b"island")
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, "-C", tmp_path, "s.mp4"], check=True)
        assert path.stat().st_size < 100_000
        items, _ = read(path)
        assert brief(items) == [("s", sparse.read_bytes(), None)]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compression_is_told_by_content(tmp_path: Path, mode: str) -> None:
    entries = [
        (f"{n}.{field}", os.urandom(20_000) if field == "mp4" else b"words")
        for n in range(20)
        for field in ("mp4", "txt")
    ]
    items, counters = read(pack(tmp_path / "lies.tar", entries, f"w:{mode}"))
    assert [item.video for item in items if isinstance(item, Sample)] == [
        data for name, data in entries if name.endswith("mp4")
    ]
    assert counters == {}
    two = tmp_path / "two.tar"
    two.write_bytes(
        (tmp_path / "lies.tar").read_bytes() + pack(tmp_path / "b.tar", [("z.mp4", b"z")], f"w:{mode}").read_bytes()
    )
    items, counters = read(two)
    assert len(items) == 21, "streams joined by cat"
    assert counters == {"concatenated_archives": 1}


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


def test_what_a_killed_reader_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.mp4", bytes(MiB + 1))])
    temp = tmp_path / "tmp"
    temp.mkdir()
    code = (
        "import os, signal, sys; from pipeline.config import StorageConfig; from pipeline.reader import ShardReader\n"
        "from tests.pipeline.test_reader import shard_of\n"
        "reader = ShardReader(shard_of(sys.argv[1]), StorageConfig(spool_bytes=1 << 20), max_video_bytes=1 << 30)\n"
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


def test_plain_files_are_handed_out_by_path_and_never_deleted(tmp_path: Path) -> None:
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


def test_plain_files_of_one_name_get_keys_of_their_own(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "b/x.mp4", "b/x.webm", "b/y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"v")
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())
    keys = [item.key for item in read_samples(shard, StorageConfig(), max_video_bytes=LIMIT)]
    assert keys == ["a/x.mp4", "b/x.mp4", "b/x.webm", "y"]


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


def test_memory_is_flat_in_the_length_of_a_shard(tmp_path: Path) -> None:
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


def test_a_large_video_is_held_once(tmp_path: Path) -> None:
    shard = shard_of(pack(tmp_path / "x.tar", [("a.mp4", bytes(64 * MiB))]))
    tracemalloc.start()
    (sample,) = read_samples(shard, StorageConfig(), max_video_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(sample, Sample)
    assert len(sample.video) == 64 * MiB
    assert peak < 80 * MiB


# --- object storage -------------------------------------------------------------------------------------------------------


@pytest.mark.s3
def test_a_shard_from_s3_reads_as_from_a_file_even_over_a_bad_line(s3: S3Server, tmp_path: Path) -> None:
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
def test_a_dead_store_is_no_truncated_shard(s3: S3Server, tmp_path: Path) -> None:
    open_store(s3.root, s3.config()).upload(pack(tmp_path / "x.tar", [("a.mp4", bytes(MiB))]), "x.tar")
    (shard,) = resolve_inputs([f"{s3.root}/x.tar"], s3.config())
    with FaultyProxy(s3.address, always(Fault("cut", after_bytes=0))) as proxy:
        config = s3.config(endpoint_url=proxy.endpoint, max_attempts=2)
        with pytest.raises(StorageUnavailable):
            list(read_samples(shard, config, max_video_bytes=LIMIT))


@pytest.mark.s3
def test_plain_videos_in_a_bucket_bring_their_captions(s3: S3Server) -> None:
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
