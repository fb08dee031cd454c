"""Inputs that a user may name, in a folder and in a bucket."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import group_files, media_kind, resolve_inputs
from pipeline.errors import AccessError, InputError
from pipeline.records import Shard, SourceObject
from pipeline.storage import open_store
from tests.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from tests.conftest import S3Server

TREE = [
    *(f"tars/shard-{n:06d}.tar" for n in range(12)),
    "tars/shard-000000_stats.json",
    "tars/._shard-000000.tar",
    "more/x.tgz",
    "more/deep/y.tar.bz2",
    "more/deep/z.TAR",
    "videos/b.mp4",
    "videos/a.webm",
    "videos/a.txt",
    "videos/a.json",
    "videos/sub/c.MKV",
    "videos/.hidden/d.mp4",
    "videos/.e.mp4",
    "videos/__MACOSX/f.mp4",
    "videos/odd [1]{x} é.mp4",
    "nothing/readme.md",
    "nothing/data.parquet",
]


class Corpus:
    """A root with `TREE` below it; results are keys below that root."""

    def __init__(self, root: str, config: StorageConfig) -> None:
        self.root = root
        self.config = config

    def shards(self, *inputs: str, **fields: int) -> list[Shard]:
        named = [text if text.startswith("@") else f"{self.root}/{text}" for text in inputs]
        return resolve_inputs(named, self.config.model_copy(update=fields))

    def keys(self, *inputs: str) -> list[str]:
        sources = [source for shard in self.shards(*inputs) for source in shard.objects]
        assert all(source.uri.startswith(f"{self.root}/") and source.size == 3 and source.etag for source in sources)
        return [source.uri.removeprefix(f"{self.root}/") for source in sources]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    if request.param == "local":
        config, root = StorageConfig(), str(tmp_path / "data")
    else:
        server: S3Server = request.getfixturevalue("s3")
        config, root = server.config(), f"{server.root}/data"
    store = open_store(root, config)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.write(key, b"abc"), TREE))
    return Corpus(root, config)


def tars(*numbers: int) -> list[str]:
    return [f"tars/shard-{n:06d}.tar" for n in numbers]


def test_files_folders_patterns_and_lists_resolve(corpus: Corpus) -> None:
    more = ["more/deep/y.tar.bz2", "more/deep/z.TAR", "more/x.tgz"]
    videos = ["videos/a.webm", "videos/b.mp4", "videos/odd [1]{x} é.mp4", "videos/sub/c.MKV"]
    for named, expected in {
        "tars/shard-000003.tar": tars(3),
        "tars": tars(*range(12)),
        "tars/": tars(*range(12)),
        "tars/*.tar": tars(*range(12)),
        "tars/shard-00000?.tar": tars(*range(10)),
        "tars/shard-00000[1-3].tar": tars(1, 2, 3),
        "tars/shard-00000[!1-9].tar": tars(0),
        "tars/shard-{000002..000004}.tar": tars(2, 3, 4),
        "tars/shard-{000000..000011}.tar": tars(*range(12)),
        "tars/shard-{000004,000001}.tar": tars(4, 1),
        "tars/shard-0000{0{1,2},1{0..1}}.tar": tars(1, 2, 10, 11),
        "{more,videos}": [*more, *videos],
        "more": more,
        "m*e": more,
        "**/*.tgz": ["more/x.tgz"],
        "*/deep": more[:2],
        "*/deep/y*": more[:1],
        "{tars/shard-00000{0..1}.tar,more/*.tgz}": [*tars(0, 1), "more/x.tgz"],
        "videos": videos,
        "videos/*": videos,
        "videos/*.mp4": ["videos/b.mp4", "videos/odd [1]{x} é.mp4"],
        "videos/b.mp4": ["videos/b.mp4"],
    }.items():
        assert corpus.keys(named) == expected, named
    assert corpus.keys("videos", "tars/shard-000001.tar", "more") == [*tars(1), *more, *videos], "tars first"
    assert corpus.keys("tars/*1.tar", "tars", "tars/shard-000001.tar") == tars(1, 11, 0, *range(2, 11)), "each once"


def test_a_file_whose_name_looks_like_a_pattern_is_found(corpus: Corpus) -> None:
    assert corpus.keys("videos/odd [1]{x} é.mp4") == ["videos/odd [1]{x} é.mp4"]


def test_plain_videos_are_grouped_into_virtual_shards(corpus: Corpus) -> None:
    shards = corpus.shards("videos", "more/x.tgz", files_per_shard=3)
    assert [(shard.kind, shard.name, len(shard.objects)) for shard in shards] == [
        ("tar", "more/x.tgz", 1),
        ("files", "videos/videos-00000", 3),
        ("files", "sub/videos-00001", 1),
    ]
    assert pickle.loads(pickle.dumps(shards)) == shards  # noqa: S301
    assert corpus.shards("videos", "more/x.tgz", files_per_shard=3) == shards, "the same every time"


def test_an_input_that_matches_nothing_is_named_with_the_contents_of_its_folder(corpus: Corpus) -> None:
    for named, expected in {
        "nothing": r"nothing: no tar shards or videos in it; it holds 1 \.md, 1 \.parquet",
        "nothing/*": r"nothing/\*: matched only 1 \.md, 1 \.parquet",
        "nothing/data.parquet": r"data\.parquet: cannot be read as a table",
        "nothing/readme.md": r"readme\.md: its suffix is not that of a tar or video",
        "tars/*.mp4": r"tars/\*\.mp4: matched nothing; .*tars holds 13 \.tar, 1 \.json",
        "tars/shard-000099.tar": r"shard-000099\.tar does not exist; .*tars holds 13 \.tar",
        "absent": "absent does not exist",
        "absent/deep/x.tar": r"x\.tar does not exist",
        "videos/__MACOSX/.x": "does not exist",
        "tars/shard-{000010..000013}.tar": r"2 of 4 do not exist: \S+shard-000012\.tar, \S+shard-000013\.tar$",
        "tars/shard-{000000..000099}.tar": r"88 of 100 do not exist: (\S+\.tar, ){5}…$",
    }.items():
        with pytest.raises(InputError, match=expected):
            corpus.shards(named)


def test_impossible_inputs_are_refused() -> None:
    for text, expected in {
        "": "an input is empty",
        "gs://b/x.tar": "'gs' is not supported",
        "a{0..99999999}.tar": "more than 1000000",
    }.items():
        with pytest.raises(InputError, match=expected):
            resolve_inputs([text], StorageConfig())


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder is empty"):
        resolve_inputs([str(tmp_path)], StorageConfig())


@pytest.mark.s3
def test_a_bucket_that_denies_access_is_named_at_once(s3: S3Server) -> None:
    with pytest.raises(AccessError, match="no-such-bucket"):
        resolve_inputs(["s3://no-such-bucket/x/*.tar"], s3.config())


@pytest.mark.s3
def test_names_cost_a_listing_for_each_page_not_a_request_each(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")  # of a page; the server runs in this process
    store = open_store(moto.root, moto.config())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store.write(f"d/{n:04d}.tar", b"x"), range(101)))
    with FaultyProxy(moto.address, lambda *_: None) as proxy:
        shards = resolve_inputs([f"{moto.root}/d/{{0000..0100}}.tar"], moto.config(endpoint_url=proxy.endpoint))
        assert len(shards) == 101
        assert [method for method, _ in proxy.requests] == ["GET", "HEAD", "GET", "GET"], (
            "greeting, literal name, two pages"
        )


def test_thousands_of_local_shards_resolve_in_bounded_time(tmp_path: Path) -> None:
    for n in range(3000):
        os.close(os.open(tmp_path / f"{n:04d}.tar", os.O_CREAT))
    began = time.process_time()
    assert len(resolve_inputs([f"{tmp_path}/{{0000..2999}}.tar"], StorageConfig())) == 3000
    assert len(resolve_inputs([str(tmp_path)], StorageConfig())) == 3000
    assert time.process_time() - began < 5


def test_regrouping_the_remaining_files_keeps_their_order() -> None:
    files = [SourceObject(f"/v/{n}.mp4", 1, str(n)) for n in "cab"]
    groups = group_files(files, StorageConfig(files_per_shard=2))
    assert [[source.uri for source in shard.objects] for shard in groups] == [["/v/a.mp4", "/v/b.mp4"], ["/v/c.mp4"]]
    assert group_files([], StorageConfig()) == []


def test_kinds_depend_on_the_name_only() -> None:
    assert [media_kind(name) for name in ("x.tar", "X.TAR.GZ", "a/b.tgz", "x.mp4", "x.y.MOV", "x.h265")] == [
        *["tar"] * 3,
        *["video"] * 3,
    ]
    assert [media_kind(name) for name in ("mp4", "a.mp4/b", "x.tar.json", "x.txt", "tar", "")] == [None] * 6
