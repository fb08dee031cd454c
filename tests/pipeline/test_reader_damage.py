"""Broken, hostile and truncated archives: each gives rejects; none raises, hangs or changes a sample."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import StorageConfig
from pipeline.reader import read_samples
from pipeline.records import Reject, Sample
from tests.pipeline.test_reader import LIMIT, brief, pack, read, shard_of

BLOCK = tarfile.BLOCKSIZE
SAMPLES = 5
FIELDS = ("json", "mp4", "txt")
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(n: int, field: str) -> bytes:
    return {"json": b'{"n": %d}' % n, "mp4": bytes([n + 1]) * (700 + n), "txt": b"caption %d" % n}[field]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Five samples of three members; offsets are in `places`."""
    entries = [(f"{n:03d}.{field}", content(n, field)) for n in range(SAMPLES) for field in FIELDS]
    return pack(tmp_path_factory.mktemp("whole") / "x.tar", entries).read_bytes()


def places(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


def items_of(tmp_path: Path, data: bytes) -> tuple[list[Sample | Reject], dict[str, int]]:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    return read(path)


def check_samples(items: list[Sample | Reject]) -> list[Sample]:
    """Checks that each sample equals one that was packed, and that no key comes twice."""
    samples = [item for item in items if isinstance(item, Sample)]
    for sample in samples:
        n = int(sample.key)
        assert (sample.video, sample.caption, sample.metadata) == (content(n, "mp4"), f"caption {n}", {"n": n})
    assert max(Counter(item.key for item in items if item.key is not None).values(), default=1) == 1
    return samples


def rejects(items: list[Sample | Reject]) -> list[Reject]:
    return [item for item in items if isinstance(item, Reject)]


def test_every_cut_is_reported_and_loses_only_the_members_behind_it(tmp_path: Path, whole: bytes) -> None:
    members = places(whole)
    end = members[-1].offset_data + BLOCK
    for cut in sorted(
        {
            0,
            1,
            511,
            512,
            513,
            *(
                at
                for member in members
                for at in (member.offset, member.offset + 100, member.offset_data, member.offset_data + 5)
            ),
        }
    ):
        items, _ = items_of(tmp_path, whole[:cut])
        samples = check_samples(items)
        complete = sum(member.offset_data + member.size <= cut for member in members if member.name.endswith("txt"))
        assert len(samples) == complete, cut
        (reject,) = rejects(items)
        assert (reject.reason, reject.policy, reject.stage) == ("truncated_shard", False, "read")
        begun = sum(member.offset_data <= cut for member in members if member.name.endswith("json"))
        assert reject.key == (f"{complete:03d}" if begun > complete else None), cut
    for cut, expected in (
        (end, {}),
        (end + 512, {"short_end_marker": 1}),
        (end + 700, {"short_end_marker": 1}),
        (end + 1024, {}),
    ):
        items, counters = items_of(tmp_path, whole[:cut])
        assert len(check_samples(items)) == SAMPLES
        assert counters == expected
        assert [reject.key for reject in rejects(items)] == [None] * (cut == end)


def test_a_sample_whose_caption_is_cut_is_rejected(tmp_path: Path) -> None:
    data = pack(tmp_path / "a.tar", [(f"{n}.{e}", b"x") for n in range(3) for e in ("mp4", "txt")]).read_bytes()
    cut = next(member.offset for member in places(data) if member.name == "2.txt")
    items, _ = items_of(tmp_path, data[:cut])
    assert brief(items) == [("0", b"x", "x"), ("1", b"x", "x"), ("2", "truncated_shard", False)]


def test_a_cut_between_videos_without_texts_keeps_the_last_one(tmp_path: Path) -> None:
    data = pack(tmp_path / "a.tar", [(f"{n}.mp4", b"x") for n in range(3)]).read_bytes()
    items, _ = items_of(tmp_path, data[: places(data)[2].offset])
    assert sorted(brief(items), key=str) == [("0", b"x", None), ("1", b"x", None), (None, "truncated_shard", False)]


def test_zero_blocks_between_archives_are_skipped(tmp_path: Path, whole: bytes) -> None:
    second = pack(tmp_path / "b.tar", [("zz.mp4", b"z"), ("zz.txt", b"z")]).read_bytes()
    items, counters = items_of(tmp_path, whole + second)
    assert [item.key for item in items] == [*(f"{n:03d}" for n in range(SAMPLES)), "zz"]
    assert counters == {"concatenated_archives": 1}


@pytest.mark.parametrize("junk", [b"\xff", b"\0", b"ustar "])
def test_a_broken_header_costs_its_member_only(tmp_path: Path, whole: bytes, junk: bytes) -> None:
    for member in places(whole):
        block = (junk * BLOCK)[:BLOCK]
        items, counters = items_of(tmp_path, whole[: member.offset] + block + whole[member.offset_data :])
        n, field = int(member.name[:3]), member.name[4:]
        untouched = [item for item in items if isinstance(item, Sample) and item.key != f"{n:03d}"]
        assert len(check_samples(list(untouched))) == SAMPLES - 1
        (mine,) = [item for item in items if item.key == f"{n:03d}"]
        if field == "mp4":
            assert isinstance(mine, Reject)
            assert (mine.reason, mine.policy) == ("corrupt_header", False), "not the policy reject of a failed download"
        else:
            assert isinstance(mine, Sample)
            assert mine.video == content(n, "mp4")
        (reject,) = [item for item in rejects(items) if item.key is None]
        assert reject.reason == "corrupt_header"
        assert counters["resynced_headers"] == 1
        assert counters["resynced_bytes"] >= member.size


def test_reading_goes_on_behind_lost_or_inserted_bytes(tmp_path: Path, whole: bytes) -> None:
    middle = places(whole)[6].offset
    for damaged in (whole[: middle + 100] + whole[middle + 333 :], whole[:middle] + b"x" * 777 + whole[middle:]):
        items, counters = items_of(tmp_path, damaged)
        assert {"000", "001", "003", "004"} <= {item.key for item in items if isinstance(item, Sample)}
        assert [reject.reason for reject in rejects(items) if reject.key is None] == ["corrupt_header"]
        assert counters["resynced_headers"] == 1


def test_a_file_that_is_not_a_tar_is_rejected_as_such(tmp_path: Path) -> None:
    for data, reason in {
        b"<!DOCTYPE html><html>404</html>" * 100: "not_a_tar",
        os.urandom(5000): "not_a_tar",
        b"PK\x03\x04" + bytes(2000): "not_a_tar",
        b"\x28\xb5\x2f\xfd" + os.urandom(2000): "unsupported_compression",
        b"short": "truncated_shard",
        b"": "truncated_shard",
        gzip.compress(b"plain text, no tar" * 100): "not_a_tar",
        b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 3000: "corrupt_compression",
    }.items():
        items, counters = items_of(tmp_path, data)
        assert [reject.reason for reject in rejects(items)] == [reason], data[:20]
        assert reason not in counters, "a reject says it"
        assert len(items) == 1
    items, counters = items_of(tmp_path, bytes(10240))
    assert (items, counters) == ([], {"empty_archives": 1})


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_damage_of_compressed_archives_is_reported(tmp_path: Path, mode: str) -> None:
    entries = [
        (f"{n:03d}.{e}", os.urandom(30_000) if e == "mp4" else b"words") for n in range(10) for e in ("mp4", "txt")
    ]
    data = pack(tmp_path / "a.tar", entries, f"w:{mode}").read_bytes()
    items, counters = items_of(tmp_path, data[: len(data) // 2])
    assert [reject.reason for reject in rejects(items)] == ["truncated_shard"]
    assert counters == {}, "a reject says it"
    broken = bytearray(data)
    broken[len(data) // 2 : len(data) // 2 + 50] = os.urandom(50)
    items, _ = items_of(tmp_path, bytes(broken))
    reasons = {reject.reason for reject in rejects(items)}
    assert reasons, "the damage is reported"
    assert reasons <= {"corrupt_compression", "truncated_shard", "corrupt_header"}
    items, counters = items_of(tmp_path, data[:-3])
    assert len([item for item in items if isinstance(item, Sample)]) == 10
    assert rejects(items) == []
    assert counters == {"cut_compression_trailer": 1}


@fuzz
@given(cut=st.integers(0, 20_000))
def test_any_cut_gives_whole_samples_and_rejects(tmp_path: Path, whole: bytes, cut: int) -> None:
    items, _ = items_of(tmp_path, whole[:cut])
    check_samples(items)
    end = places(whole)[-1].offset_data + BLOCK
    # Without one whole zero block behind the last member it is unknown whether it was the last.
    assert len(rejects(items)) == (cut < end + BLOCK)


@fuzz
@given(
    header=st.integers(0, SAMPLES * len(FIELDS) - 1),
    edits=st.dictionaries(st.integers(0, 499), st.integers(0, 255), min_size=1, max_size=12),
)
def test_false_headers_with_a_valid_checksum_keep_the_samples_before(
    tmp_path: Path, whole: bytes, header: int, edits: dict[int, int]
) -> None:
    # Any sizes, types, links, sparse maps, long-name chains: reading ends and the samples before are whole.
    member = places(whole)[header]
    block = bytearray(whole[member.offset : member.offset_data])
    for at, value in edits.items():
        block[at] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    items, _ = items_of(tmp_path, whole[: member.offset] + bytes(block) + whole[member.offset_data :])
    before = [
        item
        for item in items
        if isinstance(item, Sample) and item.key.isdigit() and int(item.key) < int(member.name[:3])
    ]
    assert len(check_samples(list(before))) == int(member.name[:3])


@fuzz
@given(data=st.binary(max_size=3000), at=st.integers(0, 12_000))
def test_any_bytes_in_the_middle_keep_the_samples_before(tmp_path: Path, whole: bytes, data: bytes, at: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    for item in read_samples(shard_of(path), StorageConfig(), max_video_bytes=LIMIT):
        assert isinstance(item, (Sample, Reject))


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"".join(_header("././@LongLink", 0, b"L") for _ in range(5000)),  # a chain of long names
        lambda: _header("x", 1 << 40, b"x") + bytes(4096),  # a terabyte of attributes
        lambda: b"".join(_global(f"key{n}", "v" * 300) for n in range(3000)),  # global headers without end
        lambda: _header("neg", -512, b"0") + bytes(2048),  # a size that goes back
        lambda: (
            _header("pax", 512, b"x")
            + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
            + _header("s", 512, b"0")
            + b"9" * 512
        ),
        lambda: (
            _header("map", 512, b"x")
            + b"29 GNU.sparse.map=5,5,0,oops\n".ljust(512, b"\0")
            + _header("s", 512, b"0")
            + bytes(512)
        ),
    ],
    ids=["names", "attributes", "globals", "negative", "sparse-endless", "sparse-map"],
)
def test_hostile_headers_end_quickly(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    items, _ = items_of(tmp_path, make() + bytes(1024))
    assert rejects(items)
    assert all(not isinstance(item, Sample) for item in items)


def _header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")
    if size < 0:
        block[124] = 0xFF
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _global(key: str, value: str) -> bytes:
    return tarfile.TarInfo.create_pax_global_header({key: value})
