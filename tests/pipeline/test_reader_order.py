"""Unusual orders of members: no video is lost because of earlier members, and a cut rejects only the videos that it hits."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from pipeline.reader.grouping import WINDOW_BYTES, Grouper
from pipeline.reader.member_names import member_name
from pipeline.reader.texts import Caption
from pipeline.records import Reject
from tests.pipeline.test_reader import Entry, MiB, brief, pack, read


def test_a_video_of_an_emitted_key_is_not_a_duplicate(tmp_path: Path) -> None:
    names = ("a.1.mp4", "a.2.mp4", "a.txt", "b.mp4", "b.txt", "a.mp4")
    items, counters = read(pack(tmp_path / "x.tar", [(name, name.encode()) for name in names]))
    assert ("a", b"a.mp4", None) in brief(items)
    assert not [item for item in items if isinstance(item, Reject)]
    assert counters["late_members"] == 1


def test_a_video_far_behind_its_text_is_one_sample(tmp_path: Path) -> None:
    far: list[Entry] = [(f"far{n}.mp4", bytes(12 * MiB)) for n in range(4)]
    items, counters = read(pack(tmp_path / "x.tar", [("k.txt", b"c"), ("n.txt", b"c"), *far, ("k.mp4", b"1")]))
    emitted = [entry for entry in brief(items) if not str(entry[0]).startswith("far")]
    assert sorted(emitted, key=str) == [("k", b"1", None), ("n", "no_video", True)]
    assert counters["late_members"] == 1


def test_many_texts_fit_into_the_window() -> None:
    grouper = Grouper("x.tar", {})
    for n in range(45_000):
        name = member_name(f"{n:06d}.txt")
        assert name is not None
        list(grouper.enter(name))
        grouper.add_text(name, Caption("x" * 60), 60)
    assert len(grouper._waiting) == 45_000
    assert grouper._waiting_bytes < WINDOW_BYTES


@pytest.mark.parametrize("first", [b"", (tarfile.SYMTYPE, "gone"), (tarfile.LNKTYPE, "gone")])
@pytest.mark.parametrize("between", [[], [("o.mp4", b"o"), ("o.txt", b"o")]])
def test_a_good_video_replaces_a_faulty_one(tmp_path: Path, first: object, between: list[Entry]) -> None:
    entries = [("k.mp4", first), ("k.txt", b"c"), *between, ("k.mp4", b"good"), ("k.txt", b"c")]
    items, _ = read(pack(tmp_path / "x.tar", entries))  # type: ignore[arg-type]
    assert [entry for entry in brief(items) if entry[1] == b"good"] == [("k", b"good", "c")]
    (reject,) = (item for item in items if isinstance(item, Reject))
    assert reject.reason in {"empty_video", "unresolved_symlink", "unresolved_hardlink"}


@pytest.mark.parametrize(
    ("members", "kept", "rejects"),
    [
        ("o.mp4 o.txt k.mp4 k.txt k.mp4", {"o", "k"}, [("k", "duplicate_key"), (None, "truncated_shard")]),
        ("o.mp4 o.txt a.mp4 a.txt a.webm", {"o", "a"}, [("a.webm", "extra_video"), (None, "truncated_shard")]),
        ("k.mp4 k.txt o.mp4 o.txt k.mp4", {"o", "k"}, [("k", "duplicate_key"), (None, "truncated_shard")]),
        ("o.mp4 o.txt a.mp4 a.txt a.jpg", {"o", "a"}, [(None, "truncated_shard")]),
        ("a.mp4 a.txt a.jpg", {"a"}, [(None, "truncated_shard")]),
        ("o.mp4 o.txt a.1.mp4 a.1.txt a.2.mp4 a.2.txt", {"o", "a.1"}, [("a.2", "truncated_shard")]),
        ("o.mp4 o.txt a.mp4 a.txt", {"o"}, [("a", "truncated_shard")]),
        ("o.mp4 o.txt a.mp4", {"o"}, [("a", "truncated_shard")]),
    ],
)
def test_a_cut_rejects_only_the_videos_that_lost_bytes(
    tmp_path: Path, members: str, kept: set[str], rejects: list[tuple[str | None, str]]
) -> None:
    path = pack(tmp_path / "x.tar", [(name, bytes([65]) * 600) for name in members.split()])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 300])
    items, _ = read(path)
    assert {item.key for item in items if not isinstance(item, Reject)} == kept
    assert [(item.key, item.reason) for item in items if isinstance(item, Reject)] == rejects
