"""Paired videos of a tar as the reader gives them: whole pairs as samples, one reject for each other one, nothing in silence."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import SourceChanged
from pipeline.reader import ShardReader, grouping, read_samples
from pipeline.records import ImagePolicy, MemberRule, Reject, Sample, Shard, SourceObject
from pipeline.storage import open_store
from tests.conftest import S3Server

MiB = 1024 * 1024

RULE = MemberRule((("control", "depth.mp4"), ("mask", "mask.mkv")), "mp4")
ALL = dataclasses.replace(RULE, unpaired=True)


def packed(names: list[str], size: int = 700) -> bytes:
    """A tar of members whose contents begin with their names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            data = name.encode().ljust(size if not name.endswith("txt") else 10, b".")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def read(path, data: bytes, rule: MemberRule = RULE, images: ImagePolicy = "skip") -> list[Sample | Reject]:
    path.write_bytes(data)
    shard = Shard("tar", "x.tar", (SourceObject(str(path), len(data), f"{path.stat().st_mtime_ns}-{len(data)}"),))
    options = {"max_video_bytes": 1 << 20, "members": rule, "images": images}
    once, again = (list(read_samples(shard, StorageConfig(), **options)) for _ in range(2))
    assert once == again
    return once


def described(items: list[Sample | Reject]) -> list[tuple]:
    return [
        (item.key, item.reason)
        if isinstance(item, Reject)
        else (item.key, item.caption, [item.file_name, *(member.file_name for member in item.members)])
        for item in items
    ]


def test_members_are_found_by_their_suffixes_in_any_order_and_case(tmp_path):
    names = ["d/a.MASK.mkv", "d/a.mp4", "d/a.txt", "d/a.Depth.mp4", "b.mp4", "b.depth.mp4", "b.mask.mkv", "b.txt"]
    items = read(tmp_path / "x.tar", packed(names))
    assert described(items) == [
        ("d/a", "d/a.txt...", ["d/a.mp4", "d/a.Depth.mp4", "d/a.MASK.mkv"]),
        ("b", "b.txt.....", ["b.mp4", "b.depth.mp4", "b.mask.mkv"]),
    ]
    for item in items:
        for name, video in [(item.file_name, item.video), *((each.file_name, each.video) for each in item.members)]:
            assert video.startswith(name.encode())


def test_without_a_rule_each_video_is_a_sample_of_its_own(tmp_path):
    items = read(tmp_path / "x.tar", packed(["a.mp4", "a.depth.mp4", "a.mask.mkv"]), MemberRule())
    assert [(item.key, item.members) for item in items] == [("a", ()), ("a.depth", ()), ("a.mask", ())]


def test_every_video_that_is_not_encoded_is_a_reject(tmp_path):
    names = ["a.mp4", "a.depth.mp4", "a.other.mp4", "a.webm", "b.depth.mp4", "c.mp4", "c.depth.mp4", "c.mask.mkv"]
    names += ["c.DEPTH.mp4", "c.depth.mp4"]
    items = read(tmp_path / "x.tar", packed(names))
    assert described(items) == [
        ("a.webm", "unnamed_video"),
        ("c.DEPTH.mp4", "extra_video"),
        ("c.depth", "duplicate_key"),
        ("a", "missing_member"),
        ("a.other", "no_members"),
        ("b", "missing_member"),
        ("c", None, ["c.mp4", "c.depth.mp4", "c.mask.mkv"]),
    ]
    messages = [item.message for item in items if isinstance(item, Reject)]
    assert messages[0].startswith(
        "a.webm is none of the videos of a sample that `members` names: mp4, depth.mp4, mask.mkv"
    )
    assert messages[3].startswith("a.mp4 has no mask (a.mask.mkv)")
    assert messages[5].startswith("b.mp4 is not beside b.depth.mp4")


def test_samples_that_share_a_webdataset_key_are_told_apart_and_held_within_the_window(tmp_path, monkeypatch):
    names = [f"v1.{n}.{end}" for n in range(9) for end in ("mp4", "depth.mp4", "mask.mkv", "txt")]
    monkeypatch.setattr(grouping, "WINDOW_BYTES", 4000)
    items = read(tmp_path / "x.tar", packed(names))
    assert [(item.key, item.caption) for item in items] == [(f"v1.{n}", f"v1.{n}.txt..") for n in range(9)]
    monkeypatch.setattr(grouping, "WINDOW_BYTES", 1 << 25)
    assert [item.key for item in read(tmp_path / "y.tar", packed(names))] == [f"v1.{n}" for n in range(9)]


@pytest.mark.parametrize("cut_after", [1, 2, 3, 4])
def test_an_archive_that_ends_early_costs_one_reject_of_the_pair(tmp_path, cut_after):
    names = ["a.mp4", "a.depth.mp4", "a.mask.mkv", "a.txt", "b.mp4", "b.depth.mp4", "b.mask.mkv", "b.txt"]
    whole = packed(names)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        at = archive.getmembers()[3 + cut_after].offset_data + 5
    items = read(tmp_path / "x.tar", whole[:at])
    assert described(items) == [("a", "a.txt.....", ["a.mp4", "a.depth.mp4", "a.mask.mkv"]), ("b", "truncated_shard")]


def test_videos_without_members_and_images_are_samples_where_the_rule_says_so(tmp_path):
    names = ["a.mp4", "a.txt", "b.mp4", "b.depth.mp4", "b.mask.mkv", "b.txt", "c.mp4", "c.depth.mp4", "d.depth.mp4"]
    names += ["e.1.mp4", "e.2.mp4", "f.webm", "f.txt", "g.png", "g.txt", "h.2.jpg", "h.2.txt", "b.jpg"]
    items = described(read(tmp_path / "x.tar", packed(names), ALL, "keep"))
    assert sorted(items, key=lambda item: item[0]) == [
        ("a", "a.txt.....", ["a.mp4"]),
        ("b", "b.txt.....", ["b.mp4", "b.depth.mp4", "b.mask.mkv"]),
        ("c", "missing_member"),
        ("d", "missing_member"),
        ("e.1", None, ["e.1.mp4"]),
        ("e.2", None, ["e.2.mp4"]),
        ("f.webm", "unnamed_video"),
        ("g", "g.txt.....", ["g.png"]),
        ("h", "h.2.txt...", ["h.2.jpg"]),
    ]


def test_a_video_waits_for_members_that_are_not_beside_it(tmp_path, monkeypatch):
    names = ["a.mp4", "a.txt", "b.mp4", "b.txt", "a.depth.mp4", "a.mask.mkv"]
    whole = [("a", "a.txt.....", ["a.mp4", "a.depth.mp4", "a.mask.mkv"]), ("b", "b.txt.....", ["b.mp4"])]
    assert described(read(tmp_path / "x.tar", packed(names), ALL)) == whole
    monkeypatch.setattr(grouping, "WINDOW_BYTES", 1000)
    late = described(read(tmp_path / "y.tar", packed(names), ALL))
    assert late == [("a", "a.txt.....", ["a.mp4"]), ("b", "b.txt.....", ["b.mp4"]), ("a", "missing_member")]


def test_a_video_whose_members_may_be_lost_is_not_taken_for_an_unpaired_one(tmp_path):
    names = ["a.mp4", "a.depth.mp4", "a.mask.mkv", "a.txt", "b.mp4", "b.txt", "b.depth.mp4", "b.mask.mkv"]
    whole = packed(names)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        depth, mask = (archive.getmember(f"b.{end}") for end in ("depth.mp4", "mask.mkv"))
    cut = described(read(tmp_path / "x.tar", whole[: depth.offset + 100], ALL))
    assert [item[:2] for item in cut] == [("a", "a.txt....."), ("b", "truncated_shard")]
    broken = whole[: depth.offset] + bytes([255] * 1536) + whole[mask.offset + 1536 :]
    keys = [item[:2] for item in described(read(tmp_path / "y.tar", broken, ALL))]
    assert ("b", "corrupt_header") in keys


def test_temporary_files_of_members_are_deleted(tmp_path):
    data = packed(["a.mp4", "a.depth.mp4", "a.mask.mkv", "a.txt", "b.mp4", "b.depth.mp4", "b.txt"], size=2 << 20)
    (tmp_path / "x.tar").write_bytes(data)
    etag = f"{(tmp_path / 'x.tar').stat().st_mtime_ns}-{len(data)}"
    shard = Shard("tar", "x.tar", (SourceObject(str(tmp_path / "x.tar"), len(data), etag),))
    with ShardReader(shard, StorageConfig(spool_bytes=1 << 20), max_video_bytes=1 << 30, members=RULE) as reader:
        items = iter(reader)
        sample = next(items)
        folder = Path(sample.video).parent
        assert len(list(folder.iterdir())) >= 3
        reader.release(sample)
        assert described(items) == [("b", "missing_member")]
        assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.s3
def test_members_in_a_bucket_are_found_fetched_and_part_of_the_identity(s3: S3Server) -> None:
    store = open_store(f"{s3.root}/v", s3.config())
    for name, content in {"a.mp4": b"main", "a.depth.mp4": bytes(MiB + 5), "a.mask.mkv": b"mask"}.items():
        store.write(name, content)
    config = s3.config(spool_bytes=MiB)
    found = [resolve_inputs([f"{s3.root}/v{end}"], config, members=RULE) for end in ("", "/a.mp4")]
    assert found[0][0].objects == found[1][0].objects
    (shard,) = found[0]
    with ShardReader(shard, config, max_video_bytes=1 << 30, members=RULE) as reader:
        (sample,) = list(reader)
        assert isinstance(sample, Sample)
        depth, mask = sample.members
        assert (sample.video, mask.video, Path(str(depth.video)).stat().st_size) == (b"main", b"mask", MiB + 5)
    store.write("a.depth.mp4", b"other")
    with pytest.raises(SourceChanged):
        list(read_samples(shard, config, max_video_bytes=1 << 30, members=RULE))
    (changed,) = resolve_inputs([f"{s3.root}/v"], config, members=RULE)
    assert changed.id("f") != shard.id("f")
