"""List files: one input per line, in the encodings of editors, with comments that may also be names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.config import StorageConfig
from pipeline.corpus import resolve_inputs
from pipeline.errors import InputError
from pipeline.storage import open_store

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import S3Server

TREE = [
    "tars/0.tar",
    "tars/1.tar",
    "tars/2.tar",
    "more/x.tgz",
    "more/deep/y.tar.bz2",
    "more/deep/z.TAR",
    "videos/b.mp4",
]


class Corpus:
    """A root with `TREE` below it; results are keys below that root."""

    def __init__(self, root: str, config: StorageConfig) -> None:
        self.root = root
        self.config = config
        self.store = open_store(root, config)
        for key in TREE:
            self.store.write(key, b"abc")

    def keys(self, text: str) -> list[str]:
        named = text if text.startswith("@") else f"{self.root}/{text}"
        shards = resolve_inputs([named], self.config)
        return [source.uri.removeprefix(f"{self.root}/") for shard in shards for source in shard.objects]

    def listed(self, data: bytes | str) -> list[str]:
        self.store.write("a.list", data.encode() if isinstance(data, str) else data)
        return self.keys("a.list")


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Corpus:
    if request.param == "local":
        return Corpus(str(tmp_path / "data"), StorageConfig())
    server: S3Server = request.getfixturevalue("s3")
    return Corpus(f"{server.root}/data", server.config())


def test_lists_name_one_input_a_line(corpus: Corpus, tmp_path: Path) -> None:
    text = "# a comment\n\n  tars/{0..1}.tar  \nvideos/b.mp4\r\nmore/*.tgz\ntars/1.tar\n@inner.list\n"
    store = open_store(corpus.root, corpus.config)
    store.write("all.txt", text.encode())
    store.write("inner.list", b"more/deep\n")
    expected = [*TREE[:2], "more/x.tgz", "more/deep/y.tar.bz2", "more/deep/z.TAR", "videos/b.mp4"]
    assert corpus.keys(f"@{corpus.root}/all.txt") == expected
    assert corpus.keys("all.txt") == expected
    absolute = tmp_path / "elsewhere.txt"
    absolute.write_text(f"{corpus.root}/tars/2.tar\n{corpus.root}/videos\n")
    assert corpus.keys(f"@{absolute}")[0] == "tars/2.tar"
    assert len(corpus.keys(f"@{absolute}")) == 2
    store.write("bad.txt", b"tars/0.tar\ntars/nope.tar\n")
    with pytest.raises(InputError, match=r"@.*bad\.txt: 1 of 2 do not exist: .*nope\.tar"):
        corpus.keys("bad.txt")
    store.write("empty.txt", b"# nothing\n")
    with pytest.raises(InputError, match="is empty"):
        corpus.keys("empty.txt")
    store.write("loop.txt", b"@loop.txt\n")
    with pytest.raises(InputError, match="check whether a list includes itself"):
        corpus.keys("loop.txt")
    with pytest.raises(InputError, match=r"absent\.txt does not exist"):
        corpus.keys("absent.txt")


def test_lists_may_be_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a[1]" / "data").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    (tmp_path / "a[1]" / "data" / "x.tar").touch()
    (tmp_path / "lists" / "l.txt").write_text("data/x.tar\ndata/*.tar\n")
    monkeypatch.chdir(tmp_path / "a[1]")
    assert [shard.objects[0].uri for shard in resolve_inputs(["../lists/l.txt"], StorageConfig())] == [
        str(tmp_path / "a[1]/data/x.tar")
    ]
    assert len(resolve_inputs(["data/*.tar", "./data/../data/x.tar"], StorageConfig())) == 1


def test_lists_are_read_as_editors_write_them(corpus: Corpus) -> None:
    text = "tars/0.tar\r\n\r\nvideos/b.mp4\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le"):
        mark = "\ufeff" if encoding in {"utf-16-be", "utf-16-le"} else ""
        assert corpus.listed((mark + text).encode(encoding)) == ["tars/0.tar", "videos/b.mp4"], encoding
    assert corpus.listed("tars/0.tar\rvideos/b.mp4") == ["tars/0.tar", "videos/b.mp4"]
    for data in (text.encode("utf-16-le"), b"\xff\xfe\0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"):
        with pytest.raises(InputError, match=r"list file .* is not UTF-8 text, nor UTF-16 with a byte order mark"):
            corpus.listed(data)


def test_a_line_that_begins_with_a_hash_is_a_comment_unless_a_file_has_this_name(corpus: Corpus) -> None:
    hashes = ["#lead.mp4", "# 1.tar", "#{a}[b].mp4"]
    for name in hashes:
        corpus.store.write(name, b"abc")
    lines = [
        "#lead.mp4",
        "#tars/1.tar",
        "# 1.tar",
        "tars/0.tar",
        "# see s3://other/x.mp4",
        "#{a}[b].mp4",
        "#",
        "#" + "x" * 2000 + ".mp4",
    ]
    assert corpus.listed("\n".join(lines)) == ["# 1.tar", "tars/0.tar", "#lead.mp4", "#{a}[b].mp4"]
    many = [f"#tars/{n}.tar" for n in range(100)]  # looked up together
    assert corpus.listed("\n".join([*many, "#lead.mp4"])) == ["#lead.mp4"]
    with pytest.raises(InputError, match="is empty"):
        corpus.listed("\n".join(many))


def test_a_list_may_hold_names_that_are_not_utf_8(tmp_path: Path) -> None:
    names = ["lat\udce9.mp4", "line\u2028.mp4", "next\x85.mp4"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "l.list").write_bytes("\n".join(names).encode("utf-8", "surrogateescape"))
    (shard,) = resolve_inputs([f"{tmp_path}/l.list"], StorageConfig())
    assert {source.uri for source in shard.objects} == {f"{tmp_path}/{name}" for name in names}
    (tmp_path / "l.list").write_bytes(b"gone\xe9.mp4\n")
    with pytest.raises(InputError, match=r"gone\\xe9\.mp4 does not exist"):
        resolve_inputs([f"{tmp_path}/l.list"], StorageConfig())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("Notes about this corpus.", "does not exist; "),
        ("What is in here?", "matched nothing; "),
        ("picture.jpg", "its suffix is not that of a tar or video"),
    ],
)
def test_an_error_in_a_line_of_a_list_names_the_list(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "picture.jpg").touch()
    (tmp_path / "README.txt").write_text(f"{line}\n")
    named = [str(path) for path in sorted(tmp_path.iterdir()) if path.suffix != ".jpg"]  # as a shell expands `folder/*`
    with pytest.raises(InputError) as raised:
        resolve_inputs(named, StorageConfig())
    assert str(raised.value).startswith(f"{tmp_path}/README.txt was read as a list of inputs; its line ")
    assert line in str(raised.value)
    assert why in str(raised.value)
    assert f"Leave {tmp_path}/README.txt out if it is not a list" in str(raised.value)


def test_a_pattern_does_not_read_text_files_as_lists(corpus: Corpus) -> None:
    corpus.store.write("videos/README.txt", b"Notes about this corpus\n")
    corpus.store.write("videos/all.list", b"../tars/0.tar\n")
    for pattern in ("videos/*", "videos", "v*"):
        assert corpus.keys(pattern) == ["videos/b.mp4"], pattern
    with pytest.raises(InputError, match=r"matched only 1 \.txt"):
        corpus.keys("videos/*.txt")
