"""Images in tars: which are samples, which belong to a video of their key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import StorageConfig
from pipeline.reader import ShardReader, read_samples
from pipeline.records import ImagePolicy, Sample
from tests.pipeline.test_reader import LIMIT, Entry, brief, pack, shard_of


def read(path: Path, images: ImagePolicy = "keep") -> tuple[list[tuple[object, ...]], dict[str, int]]:
    counters: dict[str, int] = {}
    items = list(read_samples(shard_of(path), StorageConfig(), max_video_bytes=LIMIT, counters=counters, images=images))
    assert [item.index for item in items if isinstance(item, Sample)] == sorted(
        item.index for item in items if isinstance(item, Sample)
    )
    return brief(items), counters


def test_images_of_a_tar_are_samples_with_their_texts(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "x.tar",
        [("a.jpg", b"A"), ("a.txt", b"one"), ("b.json", b'{"caption": "two"}'), ("b.WebP", b"B"), ("c.png", b"C")],
    )
    assert read(path) == ([("a", b"A", "one"), ("b", b"B", "two"), ("c", b"C", None)], {})
    skipped, counters = read(path, "skip")
    assert [item[1:] for item in skipped] == [("no_video", True)] * 3
    assert counters == {"ignored_fields": 3}


@pytest.mark.parametrize("order", [1, -1])
def test_an_image_beside_a_video_of_its_key_is_no_sample(tmp_path: Path, order: int) -> None:
    members: list[Entry] = [("a.jpg", b"thumb"), ("a.mp4", b"V"), ("a.txt", b"one"), ("a.wide.png", b"thumb")]
    found, counters = read(pack(tmp_path / "x.tar", members[::order]))
    assert found == [("a", b"V", "one")]
    assert counters == {"ignored_fields": 2}


def test_large_thumbnails_leave_no_file_behind(tmp_path: Path) -> None:
    big = bytes(2 << 20)
    path = pack(tmp_path / "x.tar", [("a.jpg", big), ("a.mp4", big), ("b.jpg", big)])
    config = StorageConfig(spool_bytes=1 << 20)
    with ShardReader(shard_of(path), config, max_video_bytes=LIMIT, images="keep") as reader:
        files = [item.video for item in reader if isinstance(item, Sample)]
        assert len(files) == 2
        left = {str(path) for path in Path(str(files[0])).parent.iterdir() if path.name != ".lock"}
        assert left == set(files)


def test_several_images_of_a_key_are_samples_of_their_names(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "x.tar", [("a.0.jpg", b"0"), ("a.1.jpg", b"1"), ("a.txt", b"both"), ("b.jpg", b"j"), ("b.png", b"p")]
    )
    assert read(path)[0] == [
        ("a.0", b"0", "both"),
        ("a.1", b"1", "both"),
        ("b.jpg", "extra_video", True),
        ("b", b"p", None),
    ]


def test_only_images_are_read_where_the_job_wants_no_videos(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.mp4", b"V"), ("a.jpg", b"thumb"), ("b.jpg", b"B"), ("c.gif", b"G")])
    assert read(path, "only")[0] == [("a", "not_an_image", True), ("b", b"B", None), ("c", b"G", None)]


def test_a_repeated_or_cut_image_is_damage(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.jpg", b"again"), ("c.jpg", b"C" * 4000)])
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"C" * 4000) + 2000])
    assert read(path)[0] == [
        ("a", "duplicate_key", False),
        ("c", "truncated_shard", False),
        ("a", b"A", None),
        ("b", b"B", None),
    ]
