"""Entries that are not encoded: counted by kind, reported in one line, refused by `--strict`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.corpus import PassedOver, resolve_inputs
from pipeline.corpus.kinds import media_kind, reason, suffix
from pipeline.corpus.texts import TextsAlone
from pipeline.errors import AccessError
from pipeline.records import VIDEO_EXTENSIONS
from pipeline.storage import open_store
from tests.tiny_corpus import rows, tiny_flags, video_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pipeline.records import ImagePolicy
    from tests.conftest import S3Server

FILES = [
    *("a.mp4", "a.txt", "a.json", "sub/b.webm", "c.tar", "c.tar.gz"),
    *(
        "x.jpg",
        "sub/y.JPG",
        "z.png",
        "d.tar.zst",
        "e.zip",
        "f.m3u8",
        "g.weird",
        "LICENSE",
        ".DS_Store",
        "sub/.h/i.mp4",
        "__MACOSX/j.mp4",
    ),
    *("alone.txt", "sub/a.txt", "a.more.json", "meta.json", "k.mp3", "l.part", "m.webp"),
]
KINDS = {
    ".jpg": (2, "images are encoded with --images keep", "x.jpg"),
    ".png": (1, "images are encoded with --images keep", "z.png"),
    ".webp": (1, "images are encoded with --images keep", "m.webp"),
    ".tar.zst": (1, "zstd tars: repack as .tar or .tar.gz", "d.tar.zst"),
    ".zip": (1, "archives other than tar: unpack them, or repack as .tar", "e.zip"),
    ".m3u8": (1, "playlists only list files; pass the listed files as inputs", "f.m3u8"),
    ".weird": (1, "not a suffix of a video or tar; rename or convert videos", "g.weird"),
    "without an extension": (
        1,
        "not a suffix of a video or tar; rename or convert videos",
        "LICENSE",
    ),
    "hidden": (3, "names that begin with a dot, and __MACOSX", ".DS_Store"),
    ".txt": (2, "without a video of the same name", "alone.txt"),
    ".json": (2, "without a video of the same name", "a.more.json"),
    ".mp3": (1, "audio is not encoded; if the file contains video, rename it to .ogv, .mp4 or .mkv", "k.mp3"),
    ".part": (1, "unfinished downloads", "l.part"),
}


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, StorageConfig]:
    """An empty root with its configuration."""
    if request.param == "local":
        return str(tmp_path / "data"), StorageConfig()
    server: S3Server = request.getfixturevalue("s3")
    return f"{server.root}/data", server.config()


def look(root: str, config: StorageConfig | None = None) -> PassedOver:
    passed_over = PassedOver()
    resolve_inputs([root], config or StorageConfig(), passed_over)
    return passed_over


def test_each_kind_is_counted_with_its_reason_and_an_example(place: tuple[str, StorageConfig]) -> None:
    root, config = place
    store = open_store(root, config)
    for name in FILES:
        store.write(name, b"x")
    for named in (root, f"{root}/**"):
        found = look(named, config)
        kinds = {kind["what"]: kind for kind in found.to_dict()["kinds"]}
        assert set(kinds) == set(KINDS)
        for what, (count, why, example) in KINDS.items():
            kind = kinds[what]
            assert (kind["count"], kind["why"]) == (count, why), what
            if count == 1:
                assert kind["example"] == f"{root}/{example}"
        assert found.line().startswith(
            f"passed over 18 of 22 files: 2 .jpg, 1 .png, 1 .webp (images are encoded with --images keep; e.g. {root}/"
        )
    both = PassedOver()
    resolve_inputs([root, f"{root}/sub", f"{root}/*"], config, both)
    assert both.to_dict() == look(root, config).to_dict(), "each once"


@pytest.mark.parametrize("policy", ["keep", "only"])
def test_an_image_with_the_name_of_a_video_is_not_encoded(tmp_path: Path, policy: ImagePolicy) -> None:
    """Whether the video is encoded or left out."""
    for name in ("a.mp4", "a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "t.csv").write_text("path\na.mp4\na.jpg\nb.png\n")
    for text in (tmp_path, tmp_path / "*", tmp_path / "t.csv"):
        passed_over = PassedOver()
        shards = resolve_inputs([str(text)], StorageConfig(), passed_over, policy)
        names = {source.uri.rpartition("/")[2] for shard in shards for source in shard.objects}
        assert names == ({"b.png", "a.mp4"} if policy == "keep" else {"b.png"})
        assert "1 .jpg (images beside a video of the same name are not encoded" in passed_over.line()


def test_a_pattern_passes_over_only_what_it_matches(tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert not look(f"{tmp_path}/*.mp4")
    assert look(f"{tmp_path}/s*").count == 3
    (tmp_path / "list.lst").write_text("sub\na.mp4\n")
    assert look(f"@{tmp_path}/list.lst").count == 3


def test_videos_with_captions_are_not_reported(tmp_path: Path) -> None:
    for name in (
        "a.mp4",
        "a.txt",
        "a.json",
        "a b.c.mp4",
        "a b.c.txt",
        "a-1.mp4",
        "a-1.json",
        "UP.MP4",
        "UP.TXT",
        "a.caption.txt",
        "a.caption",
    ):
        (tmp_path / name).touch()
    assert look(str(tmp_path)).line() == ""
    assert look(str(tmp_path)).to_dict() == {}
    named = [str(path) for path in tmp_path.iterdir()]  # as a shell expands `folder/*`
    assert len(resolve_inputs(named, StorageConfig())[0].objects) == 4


def test_texts_are_matched_in_bounded_memory() -> None:
    keys = sorted(f"d/{n:04d}{part}" for n in range(500) for part in (".mp4", ".txt", ".v.mp4", ".v.json", ".w.txt"))
    texts, found, held = TextsAlone(), [], 0
    for key in keys:
        found += texts.take(key, video=key.endswith("mp4"), text=not key.endswith("mp4"))
        held = max(held, len(texts._open))
    found += texts.rest()
    assert found == [f"d/{n:04d}.w.txt" for n in range(500)]
    assert held == 2


def test_the_line_is_always_short_and_printable() -> None:
    passed_over = PassedOver()
    for n in range(3000):
        passed_over.add(f"/d/\n\x1b[31m\udce9 {n}.s{n}", f".s{n}", "unknown")
        passed_over.add(f"/d/{n}{'x' * 4000}", f"without {n % 7}", f"reason {n % 40}")
    assert passed_over.count == 6000
    assert len(passed_over.to_dict()["kinds"]) <= 501
    assert len(passed_over.line()) < 4000
    assert passed_over.line().isprintable()
    assert "of 500 other" not in passed_over.line()


def test_each_odd_entry_of_a_folder_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.mp4", "sub/b.mp4", "locked/c.mp4", "blind/d.mp4", "e.mp4", "z/f.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "there.mp4").symlink_to("back.mp4")
    (tmp_path / "back.mp4").symlink_to("there.mp4")
    (tmp_path / "nothing.mp4").symlink_to("nowhere")
    (tmp_path / "sub/up").symlink_to("..")
    (tmp_path / "twice.mp4").symlink_to("a.mp4")
    os.mkfifo(tmp_path / "fifo.mp4")
    _break(monkeypatch, tmp_path)
    passed_over = PassedOver()
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig(), passed_over)
    assert [source.uri.removeprefix(f"{tmp_path}/") for source in shard.objects] == ["a.mp4", "sub/b.mp4", "twice.mp4"]
    kinds = {(kind["what"], kind["why"], kind["count"]) for kind in passed_over.to_dict()["kinds"]}
    assert kinds == {
        ("link", "leads back to itself", 3),
        ("link", "leads to nothing", 1),
        ("folder", "the same as one above it, by a link", 1),
        ("folder", "cannot be read: Permission denied", 1),
        ("folder", "deleted while it was listed", 1),
        ("file", "cannot be read: Permission denied", 1),
        ("file", "deleted while it was listed", 1),
        ("fifo", "not a file", 1),
    }
    with pytest.raises(AccessError, match="locked cannot be read: Permission denied; check the permissions"):
        look(str(tmp_path / "locked"))


def _break(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """`locked` cannot be listed, entries of `blind` have no status, `e.mp4` and `z` are deleted once listed. Also for root."""
    scandir = os.scandir

    class Blind:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.name, self.path = entry.name, entry.path

        def is_dir(self, *, follow_symlinks: bool = True) -> bool:
            raise PermissionError(13, "Permission denied", self.path)

        is_file = is_dir

    def closing_iterator(entries: Sequence[object]) -> Iterator[object]:
        yield from entries

    def broken(path: str) -> Iterator[object]:
        if path == str(root / "locked"):
            raise PermissionError(13, "Permission denied", path)
        entries = list(scandir(path))
        if path == str(root):
            (root / "e.mp4").unlink(missing_ok=True)
            if (root / "z").exists():
                (root / "z/f.mp4").unlink()
                (root / "z").rmdir()
        return closing_iterator([Blind(entry) for entry in entries] if path == str(root / "blind") else entries)

    monkeypatch.setattr(os, "scandir", broken)


def test_an_output_is_listed_completely_or_an_error_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    _break(monkeypatch, tmp_path)
    with pytest.raises(AccessError, match="locked"):
        list(open_store(str(tmp_path), StorageConfig()).list())


def lathe(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_plan_and_encode_report_passed_over_files_and_strict_refuses_first(tmp_path: Path) -> None:
    corpus, out = tmp_path / "in", tmp_path / "in" / "out"
    corpus.mkdir()
    (corpus / "a.mp4").write_bytes(video_bytes(9))
    (corpus / "b.jpg").touch()
    flags = tiny_flags("--executor", "inline")
    line = f"passed over 1 of 2 files: 1 .jpg (images are encoded with --images keep; e.g. {corpus}/b.jpg)"
    sizes = ("--frames", 9, "--size", "64x64")
    assert line in lathe("plan", corpus, *sizes)
    assert json.loads(lathe("plan", corpus, *sizes, "--json"))["passed_over"]["line"] == line
    for command in (("plan", corpus, *sizes, "--strict"), ("encode", corpus, out, *flags, "--strict")):
        assert f"error: strict: {line}; " in lathe(*command, code=2)
    assert not out.exists()
    output = lathe("encode", corpus, out, *flags)
    assert output.count(line) == 2, "at the start and in the summary"
    assert len(rows(out)) == 1
    (corpus / "b.jpg").unlink()
    again = lathe("encode", corpus, out, *flags, "--strict")
    assert "1 were done before" in again, (
        "its own output in the folder is not passed over, and strict changes no fingerprint"
    )


def test_kinds_depend_on_the_whole_suffix() -> None:
    for name, expected in {
        "a.JPG": ".jpg",
        "x/a.tar.ZST": ".tar.zst",
        "a.mp4.part": ".part",
        "noext": "without an extension",
        "d.x/noext": "without an extension",
        "a.": "with another extension",
        "a.long extension": "with another extension",
        "a." + "x" * 40: "with another extension",
        "a.\udce9": "with another extension",
    }.items():
        assert suffix(name) == expected
        assert reason(suffix(name))
        assert media_kind(name) is None
    assert not [end for end in VIDEO_EXTENSIONS if reason(f".{end}") != reason(".weird")], "taken and refused at once"
