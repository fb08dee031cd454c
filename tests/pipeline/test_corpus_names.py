"""Unusual names: keys of buckets with other writers, local names of any bytes. Each is read, or only it is skipped."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.corpus import PassedOver, resolve_inputs
from pipeline.errors import InputError
from pipeline.reader import ShardReader
from pipeline.records import Reject, Sample
from tests.tiny_corpus import rows, tiny_job, video_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import S3Server

ODD = ["/lead.mp4", "../e.mp4", "back\\slash.mp4"]
KEYS = [
    *ODD,
    "//two.mp4",
    "a//b.mp4",
    "./c.mp4",
    "a/./d.mp4",
    "a/../f.mp4",
    "~/home.mp4",
    "@at.mp4",
    "#hash.mp4",
    "new\nline.mp4",
    "percent%2Fslash%00.mp4",
    "file:///etc/g.mp4",
    "s3://other/h.mp4",
    " spaces .mp4",
    "x" * 900 + ".mp4",
    "good.mp4",
]


def read_all(inputs: list[str], config: StorageConfig) -> dict[str, Sample | Reject]:
    items = {}
    for shard in resolve_inputs(inputs, config):
        with ShardReader(shard, config, max_video_bytes=1 << 30) as reader:
            items.update({str(item.uri): item for item in reader})
    return items


@pytest.mark.s3
def test_any_key_of_a_bucket_is_read(s3: S3Server) -> None:
    client = s3.client()
    texts = [key.replace(".mp4", ".txt") for key in ODD]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=s3.bucket, Key=key, Body=key.encode()), [*KEYS, *texts]))
    found = read_all([s3.root], s3.config())
    assert sorted(found) == sorted(f"{s3.root}/{key}" for key in KEYS)
    for uri, item in found.items():
        assert isinstance(item, Sample)
        key = uri.removeprefix(f"{s3.root}/")
        assert item.video == key.encode()
        assert item.caption == (key.replace(".mp4", ".txt") if key in ODD else None)
    for key in ODD:
        assert list(read_all([f"{s3.root}/{key}"], s3.config())) == [f"{s3.root}/{key}"], "named directly"


@pytest.mark.s3
def test_a_bucket_with_odd_keys_is_encoded_exactly_once(s3: S3Server) -> None:
    client = s3.client()
    for n, key in enumerate(["/lead.mp4", "in/../up.mp4", "in/good.mp4"]):
        client.put_object(Bucket=s3.bucket, Key=key, Body=video_bytes(9, seed=n))
    client.put_object(Bucket=s3.bucket, Key="in/cover.jpg", Body=b"jpg")
    job = tiny_job(s3.root, f"{s3.root}/out", **{"storage.endpoint_url": s3.endpoint})
    report = pipeline.encode(job)
    assert report.passed_over["line"].startswith(
        f"passed over 1 of 4 files: 1 .jpg (images are encoded with --images keep; e.g. {s3.root}/in/cover.jpg)"
    )
    stored = {row["source_uri"] for row in rows(job.output, job.storage).values()}
    assert stored == {f"{s3.root}/{key}" for key in ("/lead.mp4", "in/../up.mp4", "in/good.mp4")}
    again = pipeline.encode(job)
    assert (again.shards_done, again.shards_total, again.shards_before) == (0, 1, 1)
    assert again.passed_over == report.passed_over, "the output in the bucket is not an input"


def test_local_names_of_any_bytes_are_read(tmp_path: Path) -> None:
    names = [
        "win\\dir.mp4",
        "new\nline.mp4",
        "tab\t.mp4",
        "lat\udce9.mp4",
        "#h.mp4",
        "~.mp4",
        " s .mp4",
        "x" * 251 + ".mp4",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"video")
        (tmp_path / name.replace(".mp4", ".txt")).write_bytes(b"caption")
    found = read_all([str(tmp_path)], StorageConfig())
    assert sorted(found) == sorted(str(tmp_path / name) for name in names)
    assert {item.caption for item in found.values() if isinstance(item, Sample)} == {"caption"}
    assert list(read_all([str(tmp_path / names[0])], StorageConfig())) == [str(tmp_path / names[0])], "named directly"


def test_a_folder_deeper_than_a_path_may_be_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(20):  # 20 x 250 bytes, made from folder to folder
            os.mkdir("d" * 250, dir_fd=here)
            below = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    passed_over = PassedOver()
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig(), passed_over)
    assert [source.uri for source in shard.objects] == [str(tmp_path / "a.mp4")]
    assert passed_over.line().startswith(
        "passed over 1 of 2 files: 1 folder (cannot be read: File name too long; e.g. "
    )


def test_folders_may_be_nested_as_deep_as_paths_are_long(tmp_path: Path) -> None:
    deep = str(tmp_path)
    for _ in range(1100):
        os.mkdir(deep := f"{deep}/d")
    video = f"{deep}/a.mp4"
    os.mknod(video)
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())
    os.unlink(video)
    os.removedirs(deep)
    assert shard.objects[0].uri == video


def test_a_named_entry_that_is_not_a_file_is_described(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lone.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.tar.zst").touch()
    for name, expected in {
        "lone.mp4": "lone.mp4 is a fifo, not a file; expected",
        "loop.mp4": "loop.mp4 is a link that leads back to itself; expected",
        "gone.mp4": "gone.mp4 is a link that leads to nothing; expected",
        "a.jpg": r"a\.jpg: its suffix is not that of a tar or video \(images are encoded with --images keep\)",
        "a.tar.zst": r"a\.tar\.zst: its suffix is not that of a tar or video \(zstd tars: repack as \.tar or \.tar\.gz\)",
        "{loop,lone,none}.mp4": r"3 of 3 do not exist: \S+loop.mp4 \(is a link that leads back to itself\), \S+lone.mp4 \(is a fifo",
    }.items():
        with pytest.raises(InputError, match=expected) as caught:
            resolve_inputs([f"{tmp_path}/{name}"], StorageConfig())
        assert "permissions" not in str(caught.value)


@pytest.mark.s3
def test_an_empty_object_named_like_a_prefix_is_the_prefix(s3: S3Server) -> None:
    client = s3.client()
    for key, data in {
        "vids": b"",
        "vids/": b"",
        "vids/a.mp4": b"a",
        "cut.mp4": b"",
        "cut.mp4/b.mp4": b"b",
        "empty.mp4": b"",
    }.items():
        client.put_object(Bucket=s3.bucket, Key=key, Body=data)
    passed_over = PassedOver()
    for named, expected in {
        "vids": ["vids/a.mp4"],
        "vids/": ["vids/a.mp4"],
        "cut.mp4": ["cut.mp4/b.mp4"],
        "empty.mp4": ["empty.mp4"],
    }.items():
        (shard,) = resolve_inputs([f"{s3.root}/{named}"], s3.config(), passed_over)
        assert [source.uri for source in shard.objects] == [f"{s3.root}/{key}" for key in expected], named
    resolve_inputs([s3.root], s3.config(), passed_over)
    assert not passed_over, "markers of folders are not files"
