"""Reading of tars: WebDataset's rules, and oddities that are handled and counted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import webdataset

from pipeline.config import StorageConfig
from pipeline.reader import read_samples
from pipeline.records import Reject, Sample, Shard, SourceObject
from pipeline.storage import stat_uri

if TYPE_CHECKING:
    pass

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
    """All items of a tar, read twice with equal results."""
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


def test_a_shard_of_video2dataset_is_read(tmp_path: Path) -> None:
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
    described = {"status": "success", "fps": 25}
    named = (("txt", "a cat"),)
    expected = Sample("000000", 0, str(path), b"video", "mp4", "a cat", described, "000000.mp4", captions=named)
    assert first == expected
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


def test_members_that_are_not_samples_are_skipped_and_counted(tmp_path: Path) -> None:
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
    assert brief(items) == [
        ("s/000", b"video", "words"),
        ("s/001", "unresolved_symlink", False),
        ("s/002", b"video 2", None),
    ]
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


def test_scattered_members_of_a_key_become_one_sample(tmp_path: Path) -> None:
    names = [f"{n:03d}" for n in range(50)]
    for order in (("mp4", "json", "txt"), ("json", "mp4", "txt"), ("txt", "json", "mp4")):
        path = pack(tmp_path / "x.tar", [(f"{name}.{field}", b'{"n": 1}') for field in order for name in names])
        items, counters = read(path)
        assert [(item.key, item.index) for item in items if isinstance(item, Sample)] == list(
            zip(names, range(50), strict=True)
        )
        assert all(isinstance(item, Sample) and item.caption and item.metadata for item in items)
        assert counters == {"reopened_keys": 100}


def test_late_members_are_rejected_and_make_no_second_sample(tmp_path: Path) -> None:
    complete = [("a.mp4", b"1"), ("a.txt", b"one"), ("b.mp4", b"2"), ("b.txt", b"two")]
    late = [("a.mp4", b"3"), ("a.txt", b"three"), ("c.mp4", b"4"), ("a.json", b"{}"), ("c.txt", b"x")]
    items, counters = read(pack(tmp_path / "x.tar", complete + late))
    assert brief(items) == [("a", b"1", "one"), ("b", b"2", "two"), ("a", "duplicate_key", False), ("c", b"4", "x")]
    assert counters["late_members"] == 2, "the caption and json of the second a"


def test_the_window_is_bounded_in_bytes(tmp_path: Path) -> None:
    big = [(f"{n}.mp4", bytes(20 * MiB)) for n in range(4)]
    items, counters = read(pack(tmp_path / "x.tar", [*big, ("0.txt", b"late"), ("3.txt", b"in time")]))
    assert [(item.key, item.caption) for item in items if isinstance(item, Sample)] == [
        ("0", None),
        ("1", None),
        ("2", None),
        ("3", "in time"),
    ]
    assert (len(items), counters["late_members"]) == (4, 1)


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


def test_names_that_are_not_utf8_are_escaped(tmp_path: Path) -> None:
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


def test_sparse_files_of_gnu_tar_are_expanded(tmp_path: Path) -> None:
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
def test_compression_is_detected_by_content(tmp_path: Path, mode: str) -> None:
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
