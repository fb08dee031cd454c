"""Names in a tar: dots, several videos of one key, repeated names. Every video is a sample or a reject, with its own texts."""

from __future__ import annotations

import itertools
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.config import StorageConfig
from pipeline.reader import ShardReader
from pipeline.reader.grouping import WINDOW_BYTES
from pipeline.records import VIDEO_EXTENSIONS, Reject, Sample
from tests.pipeline.test_reader import LIMIT, Entry, MiB, brief, pack, read, shard_of

DOTTED = ("Track 2.0 (A)", "Track 2.0 (B)", "vid_00.12.500-00.14.000", "vid_00.14.000-00.16.000", "yt.f137", "yt.f248")


def captioned(*stems: str, extension: str = "mp4") -> list[Entry]:
    """A video and its caption of each stem."""
    return [(f"{s}.{e}", f"{s} {e}".encode()) for s in stems for e in (extension, "txt")]


def own(*stems: str) -> list[tuple[str, bytes, str]]:
    """Samples that have their own video and caption."""
    return [(stem, f"{stem} mp4".encode(), f"{stem} txt") for stem in stems]


def test_videos_with_dots_are_samples_of_their_full_names(tmp_path: Path) -> None:
    items, counters = read(pack(tmp_path / "x.tar", captioned(*DOTTED, "dir.v1/clip1", "plain")))
    assert brief(items) == own(*DOTTED, "dir.v1/clip1", "plain")
    assert [item.index for item in items if isinstance(item, Sample)] == list(range(8))
    assert [item.file_name for item in items if isinstance(item, Sample)][:2] == [f"{s}.mp4" for s in DOTTED[:2]]
    assert counters == {}


@pytest.mark.parametrize("order", range(4))
def test_keys_and_captions_do_not_depend_on_the_order_of_members(tmp_path: Path, order: int) -> None:
    groups = [captioned(stem) for stem in (*DOTTED, "k", "lone.orig")]
    entries = {
        0: [entry for group in groups for entry in group],
        1: [entry for group in reversed(groups) for entry in reversed(group)],
        2: [group[0] for group in groups] + [group[1] for group in groups],
        3: [entry for group in groups[::2] + groups[1::2] for entry in group],
    }[order]
    items, _ = read(pack(tmp_path / "x.tar", entries))
    expected = {*own(*DOTTED, "k"), ("lone", b"lone.orig mp4", "lone.orig txt")}
    assert set(brief(items)) == expected
    assert sorted(item.index for item in items if isinstance(item, Sample)) == list(range(8))


def test_a_key_with_one_video_keeps_its_name_and_texts(tmp_path: Path) -> None:
    entries = [
        ("a.orig.mp4", b"1"), ("a.json", b'{"n": 1}'), ("a.txt", b"of a"),
        ("b.mp4", b"2"), ("b.json", b'{"caption": "of b"}'), ("b.wav", b"sound"), ("b.en.txt", b"subtitle"),
        ("v.1/c.d.MP4", b"3"), ("v.1/c.d.caption.txt", b"of c"),
        ("d.mp4", b"4"), ("d.caption", b"of d"),
        ("e.mp4", b"5"), ("e.txt", b" "), ("e.caption", b"of e"),
    ]  # fmt: skip
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert sorted(brief(items)) == [
        *(("a", b"1", "of a"), ("b", b"2", "of b"), ("d", b"4", "of d"), ("e", b"5", "of e"), ("v.1/c", b"3", "of c"))
    ]
    assert {item.file_name for item in items if isinstance(item, Sample)} > {"a.orig.mp4", "b.mp4", "v.1/c.d.MP4"}
    assert counters == {"ignored_fields": 2}


def test_texts_of_a_key_are_for_videos_without_their_own(tmp_path: Path) -> None:
    shared = [
        ("s.f1.mp4", b"1"),
        ("s.f2.mp4", b"2"),
        ("s.f2.txt", b"of f2"),
        ("s.txt", b"of s"),
        ("s.json", b'{"n": 1}'),
    ]
    named = [("k.mp4", b"3"), ("k.txt", b"of k"), ("k.orig.mp4", b"4")]
    items, _ = read(pack(tmp_path / "x.tar", [*shared, *named]))
    assert brief(items) == [
        ("s.f1", b"1", "of s"),
        ("s.f2", b"2", "of f2"),
        ("k", b"3", "of k"),
        ("k.orig", b"4", None),
    ]
    assert [item.metadata for item in items if isinstance(item, Sample)][:2] == [{"n": 1}, {"n": 1}]


def test_of_videos_that_differ_in_their_extension_one_is_taken(tmp_path: Path) -> None:
    entries = [("b.webm", b"webm"), ("b.mov", b"mov"), ("b.mp4", b"mp4"), ("b.MP4", b"MP4"), ("b.txt", b"x")]
    for order in itertools.permutations(entries):
        items, counters = read(pack(tmp_path / "x.tar", list(order)))
        assert sorted(brief(items), key=str) == [
            ("b", b"mp4", "x"),
            *((name, "extra_video", True) for name in ("b.MP4", "b.mov", "b.webm")),
        ]
        assert counters == {}


def test_a_readable_video_is_preferred(tmp_path: Path) -> None:
    for order in ((0, 1), (1, 0)):
        entries = [("a.mp4", b""), ("a.webm", b"webm")]
        items, _ = read(pack(tmp_path / "x.tar", [entries[n] for n in order]))
        assert sorted(brief(items)) == [("a", b"webm", None), ("a.mp4", "empty_video", False)]


@pytest.mark.parametrize(
    "between", [[], captioned("m"), captioned("m", "n", "o")], ids=["adjacent", "one apart", "three apart"]
)
def test_the_second_of_a_name_is_rejected_with_its_texts(tmp_path: Path, between: list[Entry]) -> None:
    second: list[Entry] = [("k.mp4", b"second"), ("k.txt", b"of the second"), ("k.json", b'{"n": 2}')]
    for first in (captioned("k"), [("k.mp4", b"k mp4")]):
        items, counters = read(pack(tmp_path / "x.tar", [*first, *between, *second]))
        rejected = [item for item in items if isinstance(item, Reject)]
        assert [(item.key, item.reason, item.policy) for item in rejected] == [("k", "duplicate_key", False)]
        assert "k.mp4" in rejected[0].message
        (kept,) = (item for item in items if isinstance(item, Sample) and item.key == "k")
        assert (kept.video, kept.caption, kept.metadata) == (b"k mp4", "k txt" if len(first) == 2 else None, {})
        assert counters.get("late_members", 0) + counters.get("duplicate_fields", 0) == 2
        assert len(items) == 2 + len(between) // 2


def test_an_archive_that_was_appended_to_keeps_its_first_samples(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", captioned("a", "b"))
    items, counters = read(pack(path, [("a.mp4", b"new"), ("a.txt", b"new"), *captioned("c")], "a"))
    assert brief(items) == [*own("a", "b"), ("a", "duplicate_key", False), *own("c")]
    assert counters == {"late_members": 1}


def test_videos_of_one_key_far_apart_are_separate_samples(tmp_path: Path) -> None:
    """Behind the window the first video was emitted with the key."""
    far: list[Entry] = [(f"far{n}.mp4", bytes(12 * MiB)) for n in range(4)]
    entries = [*captioned("t.1"), *far, *captioned("t.2"), *captioned("t.1"), ("t.mp4", b"plain")]
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert sorted((entry for entry in brief(items) if not str(entry[0]).startswith("far")), key=str) == [
        ("t", b"t.1 mp4", "t.1 txt"),
        ("t.1", "duplicate_key", False),
        ("t.2", b"t.2 mp4", "t.2 txt"),
        ("t.mp4", b"plain", None),
    ]
    assert counters["late_members"] == 1, "the caption of the second t.1"


def test_a_key_of_many_videos_waits_within_the_window(tmp_path: Path) -> None:
    stems = [f"channel.{n:02d}" for n in range(16)]
    entries = [(f"{s}.{e}", d) for s in stems for e, d in (("mp4", bytes(6 * MiB)), ("txt", s.encode()))]
    waiting = most = 0
    with ShardReader(shard_of(pack(tmp_path / "x.tar", entries)), StorageConfig(), max_video_bytes=LIMIT) as reader:
        hold = reader._spool.hold

        def counted(pieces, size):  # type: ignore[no-untyped-def]
            nonlocal waiting, most
            waiting += size
            most = max(most, waiting)
            return hold(pieces, size)

        reader._spool.hold = counted  # type: ignore[method-assign]
        found = []
        for item in reader:
            assert isinstance(item, Sample)
            waiting -= len(item.video)
            found.append((item.key, item.caption))
    assert found == [(stem, stem) for stem in stems]
    assert most <= WINDOW_BYTES + 12 * MiB


def test_an_archive_cut_inside_one_video_of_a_key_keeps_the_others(tmp_path: Path) -> None:
    whole = pack(tmp_path / "w.tar", [*captioned("t.1", "t.2"), ("t.3.mp4", bytes(5000)), ("t.3.txt", b"x")])
    with tarfile.open(whole) as archive:
        last = archive.getmember("t.3.mp4")
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[: last.offset_data + 700])
    items, _ = read(path)
    assert sorted(brief(items)) == [*own("t.1", "t.2"), ("t.3", "truncated_shard", False)]


def test_odd_names_are_counted_or_named(tmp_path: Path) -> None:
    entries = [
        *(("..mp4", b"hidden"), (".mp4", b"hidden"), ("k..mp4", b"1"), ("k.", b"x"), ("noext", b"x")),
        *(("a.b/c.mp4", b"2"), ("a.b/noext", b"x"), ("x.braw", b"video?"), ("UP.MP4", b"3"), ("UP.TXT", b"of UP")),
        *(("._UP.MP4", b"apple"), ("link.mp4", (tarfile.SYMTYPE, "UP.MP4"))),
    ]
    items, counters = read(pack(tmp_path / "x.tar", entries))
    assert sorted(brief(items), key=str) == [
        *(("UP", b"3", "of UP"), ("a.b/c", b"2", None), ("k", b"1", None)),
        *(("link", "unresolved_symlink", False), ("x", "no_video", True)),
    ]
    assert "braw" in next(item.message for item in items if isinstance(item, Reject) and item.key == "x")
    assert counters == {
        "skipped_hidden": 2,
        "no_extension": 2,
        "ignored_fields": 2,
        "skipped_appledouble": 1,
        "skipped_symlink": 1,
    }


NAMES = st.builds(
    lambda folder, base, extension: f"{folder}{base}.{extension}",
    st.sampled_from(["", "", "d/", "d.1/", "./", ".h/"]),
    st.sampled_from(["a", "b", "a.1", "a.2", "A.1", "a.1.2", "b.orig", "", ".a", "c ", "a."]),
    st.sampled_from(["mp4", "mp4", "MP4", "webm", "txt", "txt", "json", "wav", "caption.txt"]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(NAMES, max_size=14))
def test_every_video_is_a_sample_or_a_reject(tmp_path: Path, names: list[str]) -> None:
    entries: list[Entry] = [(name, b"%d of %s" % (n, name.encode())) for n, name in enumerate(names)]
    items, _ = read(pack(tmp_path / "x.tar", entries))
    samples = [item for item in items if isinstance(item, Sample)]
    rejects = [item for item in items if isinstance(item, Reject) and item.reason != "no_video"]
    shown = [name.removeprefix("./") for name in names]
    videos = [
        name
        for name in shown
        if name.rpartition(".")[2].lower() in VIDEO_EXTENSIONS and not name.rpartition("/")[2].startswith(".")
    ]
    assert len(samples) + len(rejects) == len(videos)
    emitted = Counter(item.file_name for item in samples)
    for item in rejects:
        assert item.reason in {"duplicate_key", "extra_video"}
        assert any(item.key in (name, name.rpartition(".")[0]) for name in videos)
    assert set(emitted) <= set(videos)
    assert max(emitted.values(), default=1) == 1
    assert len({item.key for item in samples}) == len({item.index for item in samples}) == len(samples)
    for item in samples:
        stem = item.file_name.rpartition(".")[0]
        folder, slash, base = stem.rpartition("/")
        key = f"{folder}{slash}{base.partition('.')[0]}"
        assert item.key in (stem, key)
        if item.caption is not None and " of " in item.caption:
            words = item.caption.partition(" of ")[2].removeprefix("./")
            assert words.startswith((f"{stem}.", f"{key}."))
