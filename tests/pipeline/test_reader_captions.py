"""Several captions of one sample: which texts count, their names and order, in tars, folders and buckets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import PassedOver, resolve_inputs
from pipeline.reader import read_samples
from pipeline.reader.sidecars import read_sidecars
from pipeline.reader.texts import MOST_CAPTIONS
from pipeline.records import Sample, SourceObject
from pipeline.storage import open_store
from tests.pipeline.test_reader import LIMIT, pack

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import S3Server

FILES = {
    "a.mp4": b"v",
    "a.txt": b"of a",
    "a.short.txt": b"a in short",
    "a.caption.txt": b"also of a",
    "a.caption2.txt": "größer als a".encode("cp1252"),
    "a.en.txt": b"subtitles",
    "a.json": b'{"caption": "of a", "captions": ["from json"], "score": NaN}',
    "b.mp4": b"v",
    "b.json": b'{"caption": "of b", "text": "of b", "captions": {"short": "of b", "brief": "of b", "long": ["of b"]}}',
    "b.long_v1.txt": b"b at length",
    "c.webm": b"v",
    "c.prompt.txt": "c, prompted".encode("utf-16"),
    "d.mp4": b"v",
    "d.short.mp4": b"v",
    "d.short.txt": b"of d.short",
}
EXPECTED = {
    "a.mp4": [
        ("txt", "of a"),
        ("caption", "also of a"),
        ("0", "from json"),
        ("caption2", "größer als a"),
        ("short", "a in short"),
    ],
    "b.mp4": [
        ("caption", "of b"),
        *((name, "of b") for name in ("short", "brief", "long")),
        ("long_v1", "b at length"),
    ],
    "c.webm": [("prompt", "c, prompted")],
    "d.mp4": [],
    "d.short.mp4": [("txt", "of d.short")],
}


def captions_of(inputs: list[str], config: StorageConfig) -> dict[str, list[tuple[str, str]]]:
    (shard,) = resolve_inputs(inputs, config)
    found = {}
    for item in read_samples(shard, config, max_video_bytes=LIMIT):
        assert isinstance(item, Sample)
        assert item.caption == (item.captions[0][1] if item.captions else None)
        assert item.named_captions == item.captions
        if item.file_name == "a.mp4":
            assert item.warnings == ("caption_encoding:cp1252", "nonfinite_metadata")
        found[item.file_name] = list(item.captions)
    return found


def test_a_tar_gives_all_captions_of_its_samples(tmp_path: Path) -> None:
    for members in (FILES, dict(reversed(FILES.items()))):
        found = captions_of([str(pack(tmp_path / "x.tar", list(members.items())))], StorageConfig())
        assert {name: sorted(captions) for name, captions in found.items()} == {
            name: sorted(captions) for name, captions in EXPECTED.items()
        }
        assert {name: captions[:1] for name, captions in found.items()} == {
            name: captions[:1] for name, captions in EXPECTED.items()
        }


def test_a_folder_gives_all_captions_of_its_videos(tmp_path: Path) -> None:
    for name, data in {**FILES, "e.short.txt": b"of nothing", "f.mp4": b"v", "f.short.TXT": b"f in short"}.items():
        (tmp_path / name).write_bytes(data)
    passed_over = PassedOver()
    resolve_inputs([str(tmp_path)], StorageConfig(), passed_over)
    assert [(kind.count, kind.example.rpartition("/")[2]) for kind in passed_over.kinds()] == [(2, "a.en.txt")]
    assert captions_of([str(tmp_path)], StorageConfig()) == {**EXPECTED, "f.mp4": [("short", "f in short")]}
    named = [str(tmp_path / name) for name in ("a.mp4", "a.txt", "a.short.txt")]
    assert captions_of(named, StorageConfig()) == {"a.mp4": EXPECTED["a.mp4"]}, "as a shell expands a*"


def test_of_many_captions_beside_a_video_only_those_that_count_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"v")
    (tmp_path / "a.txt").write_bytes(b"first")
    for number in range(MOST_CAPTIONS + 9):
        (tmp_path / f"a.short_{number:03d}.txt").write_text(f"{number}")
    source = SourceObject(str(tmp_path / "a.mp4"), 1, "e")
    texts = read_sidecars(source, StorageConfig(), lambda: None)
    assert len(texts) == MOST_CAPTIONS + 1
    assert texts[0] == ("txt", b"first")
    assert texts[-1] == (f"short_{MOST_CAPTIONS - 1:03d}.txt", f"{MOST_CAPTIONS - 1}".encode())


@pytest.mark.s3
def test_a_bucket_gives_all_captions_of_its_videos(s3: S3Server) -> None:
    store = open_store(f"{s3.root}/v", s3.config())
    for name, data in FILES.items():
        store.write(name, data)
    assert captions_of([f"{s3.root}/v"], s3.config()) == EXPECTED
