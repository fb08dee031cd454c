"""Texts beside plain files and in tars: found in any case, with few requests; a denied text does not cost its video."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import PassedOver, resolve_inputs
from pipeline.errors import AccessError
from pipeline.reader import read_samples
from pipeline.records import Sample
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from tests.faulty_proxy import FaultyProxy
from tests.pipeline.test_reader import LIMIT, pack, read

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import S3Server

SIDECARS = {
    "a.mp4": b"v", "a.txt": "größer".encode("cp1252"), "a.json": b'{"n": NaN}',
    "UP.MP4": b"v", "UP.TXT": b"of UP", "UP.JSON": b'{"n": 1}',
    "t.Mp4": b"v", "t.Txt": b"of t",
    "c.mov": b"v", "c.caption": b"of c",
    "d.v2.webm": b"v", "d.v2.caption.txt": b"of d", "d.txt": b"of another",
    "e.mp4": b"v", "e.txt": b" ", "e.json": b'{"prompt": "of e"}',
    "f.mp4": b"v", "f.notes.txt": b"of nothing",
    "m.mp4": b"v", "m.tXt": b"of m", "m.jSON": b'{"n": 2}',
    "n.mp4": b"v", "n.caption.TXT": b"of n",
    "o.mp4": b"v", "o.Caption.txt": b"of o",
    "p.mp4": b"v", "p.cAPTION": b"of p",
    "q.Caption.mp4": b"v", "q.Caption.txt": b"of q", "q.Caption.json": b'{"n": 3}',
}  # fmt: skip
EXPECTED = {
    "a.mp4": ("a", "größer", {"n": None}, ("caption_encoding:cp1252", "nonfinite_metadata")),
    "UP.MP4": ("UP", "of UP", {"n": 1}, ()),
    "t.Mp4": ("t", "of t", {}, ()),
    "c.mov": ("c", "of c", {}, ()),
    "d.v2.webm": ("d.v2", "of d", {}, ()),
    "e.mp4": ("e", "of e", {"prompt": "of e"}, ()),
    "f.mp4": ("f", None, {}, ()),
    "m.mp4": ("m", "of m", {"n": 2}, ()),
    "n.mp4": ("n", "of n", {}, ()),
    "o.mp4": ("o", "of o", {}, ()),
    "p.mp4": ("p", "of p", {}, ()),
    "q.Caption.mp4": ("q.Caption", "of q", {"n": 3}, ()),
}


def texts_of(inputs: list[str], config: StorageConfig) -> dict[str, Any]:
    """By file name: key, caption, metadata, warnings."""
    (shard,) = resolve_inputs(inputs, config)
    items = [item for item in read_samples(shard, config, max_video_bytes=LIMIT) if isinstance(item, Sample)]
    return {item.file_name: (item.key, item.caption, item.metadata, item.warnings) for item in items}


def test_texts_beside_files_of_a_folder_are_read(tmp_path: Path) -> None:
    for name, data in SIDECARS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "f.txt").mkdir()
    os.mkfifo(tmp_path / "f.tXt")  # opening it would wait for a writer
    passed_over = PassedOver()
    resolve_inputs([str(tmp_path)], StorageConfig(), passed_over)
    alone = {(kind["what"], kind["example"].removeprefix(f"{tmp_path}/")) for kind in passed_over.to_dict()["kinds"]}
    assert alone == {(".txt", "d.txt"), ("fifo", "f.tXt")}
    assert texts_of([str(tmp_path)], StorageConfig()) == EXPECTED


@pytest.mark.s3
def test_texts_beside_files_in_a_bucket_are_read(s3: S3Server) -> None:
    store = open_store(f"{s3.root}/v", s3.config())
    for name, data in SIDECARS.items():
        store.write(name, data)
    assert texts_of([f"{s3.root}/v"], s3.config()) == EXPECTED


def test_texts_with_usual_spellings_are_read_from_a_folder_that_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.mp4", "a.TXT", "b.mp4", "b.tXt"):
        (tmp_path / name).write_bytes(name.encode())
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())

    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)  # also for root, who may list any folder
    items = list(read_samples(shard, StorageConfig(), max_video_bytes=LIMIT))
    assert [item.caption for item in items if isinstance(item, Sample)] == ["a.TXT", None]


def test_a_refused_text_is_counted_and_the_video_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"v")
    (tmp_path / "a.json").write_bytes(b'{"caption": "of a"}')
    os.mknod(tmp_path / "a.txt", stat.S_IFREG)
    (shard,) = resolve_inputs([str(tmp_path)], StorageConfig())
    counters: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStore, "stat", _refusing(LocalStore.stat, "a.txt"))  # root may read any mode
        (item,) = read_samples(shard, StorageConfig(), max_video_bytes=LIMIT, counters=counters)
    assert isinstance(item, Sample)
    assert (item.caption, counters) == ("of a", {"unreadable_texts": 1})


def _refusing(method: Callable[..., Any], refused: str) -> Callable[..., Any]:
    def called(store: LocalStore, key: str) -> Any:
        if key == refused:
            raise AccessError(f"{key} cannot be read", uri=key)
        return method(store, key)

    return called


@pytest.mark.s3
@pytest.mark.parametrize("absent", ["as absent", "as refused"])
def test_texts_are_read_from_a_bucket_that_refuses_to_list(s3: S3Server, absent: str) -> None:
    store = open_store(f"{s3.root}/v", s3.config())
    for name in ("a.mp4", "a.txt", "b.mp4"):
        store.write(name, name.encode())
    (shard,) = resolve_inputs([f"{s3.root}/v"], s3.config())
    with FaultyProxy(s3.address) as proxy:
        # Without s3:ListBucket S3 answers 403 for a key that is not there.
        proxy.turn_on(
            "refuse", keys=r"list-type=2" if absent == "as absent" else r"list-type=2|\.(?!mp4|txt$)\w+$|b\.txt"
        )
        counters: dict[str, int] = {}
        config = s3.config(endpoint_url=proxy.endpoint)
        items = list(read_samples(shard, config, max_video_bytes=LIMIT, counters=counters))
        gets = [
            target for method, target in proxy.requests if method == "GET" and "/b." in target and "?" not in target
        ]
    assert [item.caption for item in items if isinstance(item, Sample)] == ["a.txt", None]
    assert counters == ({} if absent == "as absent" else {"unreadable_texts": 2})
    assert len(gets) <= 13


@pytest.mark.s3
def test_texts_in_a_bucket_cost_one_listing_and_one_request_each(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "50")  # names in a page, of S3 1,000
    store = open_store(f"{moto.root}/v", moto.config())
    for name in ("a.mp4", "a.tXt", *(f"a.{n}.note" for n in range(51)), "b.mp4"):
        store.write(name, b"words")
    shards = resolve_inputs([f"{moto.root}/v/a.mp4", f"{moto.root}/v/b.mp4"], moto.config())
    with FaultyProxy(moto.address) as proxy:
        config = moto.config(endpoint_url=proxy.endpoint)
        items = [item for shard in shards for item in read_samples(shard, config, max_video_bytes=LIMIT)]
        lists = [target for _, target in proxy.requests if "list-type=2" in target]
        others = [target.rpartition("/")[2] for _, target in proxy.requests if "list-type=2" not in target]
    assert [item.caption for item in items if isinstance(item, Sample)] == ["words", None]
    assert len(lists) == 3, "two pages and one"
    assert sorted(others) == ["a.mp4", "a.tXt", "b.mp4"]


def test_texts_in_a_tar_are_found_in_any_case(tmp_path: Path) -> None:
    items, _ = read(pack(tmp_path / "x.tar", list(SIDECARS.items())))
    found = {item.file_name: item for item in items if isinstance(item, Sample)}
    for name, (_, caption, metadata, warnings) in EXPECTED.items():
        assert (found[name].caption, found[name].metadata, found[name].warnings) == (caption, metadata, warnings), name
