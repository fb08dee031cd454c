"""`lathe sidecar import`: tables that others made, and what is wrong with some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config import StorageConfig
from pipeline.embedding.importing import ImportReport, ImportRequest, import_table
from pipeline.embedding.table import open_table
from pipeline.embedding.upkeep import list_sets
from pipeline.errors import ConfigError, InputError
from pipeline.loader import LatentDataset, LatentLoader
from pipeline.sidecars.names import key_of
from pipeline.sidecars.reading import SidecarReader
from tests.conftest import S3Server
from tests.loader.outputs import SHORT, Output, clip_of, write_output
from tests.sidecars.sets import copied

CAPTIONS = ["a dog", "a cat", None, "a dog"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Output:
    folder = tmp_path_factory.mktemp("output")
    clips = [clip_of(seed, SHORT, caption=caption) for seed, caption in enumerate(CAPTIONS)]
    return write_output(folder / "out", folder / "spool", [clips])


@pytest.fixture
def output(made: Output, tmp_path: Path) -> Output:
    return copied(made, tmp_path)


def array(seed: int, tokens: int = 3, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, width)).astype(np.float32)


def row(value: np.ndarray, **key: str) -> dict[str, Any]:
    return {
        **key,
        "embedding_bytes": value.tobytes(),
        "embedding_shape": list(value.shape),
        "embedding_dtype": "float32",
    }


def written(tmp_path: Path, rows: list[dict[str, Any]], name: str = "table.parquet") -> str:
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    return str(tmp_path / name)


def imported(output: Output, table: str, **options: Any) -> ImportReport:
    return import_table(output.uri, ImportRequest(table, "mine", **options), StorageConfig())


def by_id(output: Output, tmp_path: Path, count: int = 4, **options: Any) -> str:
    rows = [row(array(n, **options), id=name) for n, name in enumerate(sorted(output.clips)[:count])]
    return written(tmp_path, rows)


def test_a_table_by_id_is_read_back_by_the_loader(output: Output, tmp_path: Path) -> None:
    report = imported(output, by_id(output, tmp_path))
    assert (report.version, report.imported, report.lacking, report.rows) == (1, 4, 0, 4)
    assert report.tensors == {"embedding": "float32 […, 5]"}
    with LatentLoader(LatentDataset.open(output.uri), batch=1, epochs=1, sidecars="mine") as loader:
        for batch in loader:
            n = sorted(output.clips).index(batch.ids[0])
            assert np.array_equal(batch.sidecars["mine"]["embedding"][0].numpy(), array(n))


def test_tables_by_caption_and_by_hash_and_lists_of_numbers_are_one_set(output: Output, tmp_path: Path) -> None:
    first = imported(output, written(tmp_path, [row(array(0, 2), caption="a dog"), row(array(1, 7), caption="")]))
    assert (first.imported, first.lacking, first.tensors) == (2, 1, {"embedding": "float32 […, 5]"})
    rows = [
        {"caption_hash": key_of(text).hex(), "embedding": array(seed, tokens).tolist()}
        for seed, tokens, text in ((0, 2, "a dog"), (2, 4, "a cat"))
    ]
    second = imported(output, written(tmp_path, rows, "more.parquet"))
    assert (second.version, second.imported, second.present, second.lacking) == (2, 1, 1, 0)
    found = SidecarReader(output.store, "mine").tensors("a cat")
    assert found is not None
    assert np.array_equal(found["embedding"], array(2, 4))
    assert [len(item["newest"]["covers"]) for item in list_sets(output.store)] == [1]


def test_a_table_of_all_captions_covers_rows_whose_every_caption_it_has(tmp_path: Path) -> None:
    sample = {"captions": (("txt", "a dog"), ("short", "dog"), ("long", "a dog runs")), "caption": "a dog"}
    clips = [clip_of(0, SHORT, **sample), clip_of(1, SHORT, caption="a cat")]
    output = write_output(tmp_path / "out", tmp_path / "spool", [clips])
    table = written(tmp_path, [row(array(n), caption=text) for n, text in enumerate(["a dog", "dog", "a cat", ""])])
    with pytest.raises(InputError, match=r"'dog'.*--captions for others than caption,"):
        imported(output, table)
    assert imported(output, table, captions=("all",)).lacking == 1
    more = written(tmp_path, [row(array(9), caption="a dog runs")], "more.parquet")
    assert imported(output, more, captions=("all",)).lacking == 0
    with LatentLoader(LatentDataset.open(output.uri), batch=2, sidecars="mine", captions="captions") as loader:
        seen = {text for _, batch in zip(range(40), loader, strict=False) for text in batch.captions}
    assert seen == {"a dog", "dog", "a dog runs", "a cat"}
    with pytest.raises(ConfigError, match=r"or \"metadata\.KEY\""):
        imported(output, table, captions=("all", "first"))
    with pytest.raises(ConfigError, match="by id"):
        imported(output, by_id(output, tmp_path, 2), captions=("all",))


def test_a_safetensors_table_has_tensors_by_name(output: Output, tmp_path: Path) -> None:
    tensors = {}
    for n, name in enumerate(sorted(output.clips)):
        tensors |= {
            name: torch.full((n + 1, 4), n, dtype=torch.bfloat16),
            f"{name}.mask": torch.ones(n + 1, dtype=torch.int64),
        }
    save_file(tensors, tmp_path / "table.safetensors")
    report = imported(output, str(tmp_path / "table.safetensors"))
    assert report.tensors == {"embedding": "bfloat16 […, 4]", "mask": "int64 […]"}
    with LatentLoader(LatentDataset.open(output.uri), batch=1, epochs=1, sidecars="mine") as loader:
        for batch in loader:
            for tensor, suffix in (("embedding", ""), ("mask", ".mask")):
                assert torch.equal(batch.sidecars["mine"][tensor][0], tensors[batch.ids[0] + suffix])


def test_ids_that_are_not_there_are_refused_with_the_ones_that_are_near(output: Output, tmp_path: Path) -> None:
    ids = sorted(output.clips)
    typo = ids[0][:-1] + ("0" if ids[0][-1] != "0" else "1")
    table = written(
        tmp_path, [row(array(0), id=typo), row(array(1), id=ids[1]), row(array(2), id="entirely different")]
    )
    with pytest.raises(
        InputError, match=rf"2 of 3 ids of .* are in no row of snapshot 1 .*'{typo}' \(there is '{ids[0]}'\)"
    ):
        imported(output, table)
    assert list_sets(output.store) == []
    others = written(tmp_path, [row(array(2), id="entirely different")], "others.parquet")
    with pytest.raises(InputError, match="needs, got 1 others; no set was made"):
        imported(output, others, skip_unknown=True)
    assert list_sets(output.store) == []
    report = imported(output, table, skip_unknown=True)
    assert imported(output, others, skip_unknown=True).unknown == 1
    assert (report.imported, report.unknown, report.lacking) == (1, 2, 3)


def test_rows_of_different_widths_or_types_are_refused_with_counts(output: Output, tmp_path: Path) -> None:
    ids = sorted(output.clips)
    rows = [row(array(n), id=name) for n, name in enumerate(ids[:3])] + [row(array(3, width=4), id=ids[3])]
    with pytest.raises(
        InputError,
        match=r"got 3 rows with embedding float32 \[…, 5\], such as .*; 1 rows with embedding float32 \[…, 4\], such",
    ):
        imported(output, written(tmp_path, rows))
    imported(output, by_id(output, tmp_path))
    with pytest.raises(ConfigError, match=r"tensors .*float32 \[.*, 5\].*, now .*float32 \[.*, 4\]"):
        imported(output, by_id(output, tmp_path, width=4))
    with pytest.raises(ConfigError, match="imported , now another encoder"):
        imported(output, by_id(output, tmp_path), about="another encoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "row 0 has the id None; expected text"),
        ({"embedding_dtype": "float8"}, "has embedding of type 'float8'"),
        ({"embedding_shape": None}, "shape None; expected sizes of at least 1"),
        ({"embedding_shape": [0, 5], "embedding_bytes": b""}, r"shape \[0, 5\]; expected sizes of at least 1"),
        ({"embedding_shape": [2**62, 8], "embedding_bytes": b""}, r"has 0 bytes for embedding float32 of shape \[4611"),
        ({"embedding_bytes": b"short"}, r"has 5 bytes for embedding float32 of shape \[3, 5\]"),
        (
            {"embedding_bytes": np.full((3, 5), np.nan, np.float32).tobytes()},
            "embedding of .* has values that are not finite",
        ),
    ],
)
def test_a_row_that_is_not_as_it_should_be_is_named(
    output: Output, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        imported(output, written(tmp_path, [{**row(array(0), id=sorted(output.clips)[0]), **change}]))
    assert list_sets(output.store) == [], "a right table of other widths may have the name"


def test_a_key_twice_or_other_tensors_for_it_are_refused(output: Output, tmp_path: Path) -> None:
    name = sorted(output.clips)[0]
    with pytest.raises(InputError, match=r"has the id .* twice"):
        imported(output, written(tmp_path, [row(array(0), id=name), row(array(1), id=name)]))
    imported(output, by_id(output, tmp_path))
    with pytest.raises(InputError, match=r"embedding of .* is another tensor than sidecar set mine has"):
        imported(output, written(tmp_path, [row(array(9), id=name)]))
    assert imported(output, by_id(output, tmp_path)).present == 4


def test_what_is_not_a_table_is_refused(output: Output, moto: S3Server, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        imported(output, str(tmp_path / "x.parquet"))
    with pytest.raises(InputError, match="is not a file"):
        imported(output, str(tmp_path / "nowhere.parquet"))
    with pytest.raises(InputError, match=r"nowhere.parquet does not exist; check the key; expected a Parquet"):
        open_table(f"{moto.root}/nowhere.parquet", None, moto.config())
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        imported(output, str(tmp_path / "x.safetensors"))
    save_file({sorted(output.clips)[0]: torch.zeros(0, 5)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"has the shape \[0, 5\]; expected sizes of at least 1"):
        imported(output, str(tmp_path / "x.safetensors"))
    with pytest.raises(InputError, match="has the columns name; expected exactly one of id, caption, caption_hash"):
        imported(output, written(tmp_path, [{"name": "x"}]))
