"""Streamed Parquet pages are byte for byte what Arrow writes, open everywhere, and cost no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from pipeline.errors import BuildError
from pipeline.format.columns import LatentRow, latent_row
from pipeline.format.index import IndexRow
from pipeline.writer.parquet_file import ParquetFileBuilder
from pipeline.writer.parquet_pages import decode_struct, encode_struct, point_footer_at
from tests.pipeline.latent_clips import FINGERPRINT, SPEC, WHOLE, latent_clip

NEVER, ALWAYS = 10**12, 0


def rows_of(*frames: int, moments: bool = False) -> list[LatentRow]:
    clips = [latent_clip(n, num_frames=count, bucket=WHOLE, moments=moments) for n, count in enumerate(frames)]
    return [latent_row(clip, FINGERPRINT, SPEC.to_dict(), moments=moments) for clip in clips]


def build(path: Path, groups: list[list[LatentRow]], stream_bytes: int, *, moments: bool = False) -> list[IndexRow]:
    builder = ParquetFileBuilder(path, {"note": "x" * 200}, moments=moments, stream_bytes=stream_bytes)
    for group in groups:
        builder.append(group)
    return builder.close()


def footer_of(path: Path) -> bytes:
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    return data[-8 - length : -8]


@pytest.mark.parametrize("moments", [False, True])
def test_streamed_rows_read_like_any_other(tmp_path: Path, moments: bool) -> None:
    import datasets
    import duckdb
    import polars

    rows = rows_of(41, 5, 9, 17, 81, moments=moments)
    groups = [rows[:1], rows[1:4], rows[4:]]  # streamed, not, streamed
    path = tmp_path / "streamed.parquet"
    index = build(path, groups, ALWAYS, moments=moments)
    build(tmp_path / "plain.parquet", groups, NEVER, moments=moments)
    with (
        pq.ParquetFile(path, page_checksum_verification=True) as file,
        pq.ParquetFile(tmp_path / "plain.parquet") as plain,
    ):
        assert file.read().equals(plain.read())
        assert [file.read_row_group(n).num_rows for n in range(3)] == [1, 3, 1]
        for group in range(3):
            streamed, usual = file.metadata.row_group(group), plain.metadata.row_group(group)
            assert (streamed.total_byte_size, streamed.num_rows) == (usual.total_byte_size, usual.num_rows)
            assert streamed.column(1).total_compressed_size == usual.column(1).total_compressed_size
            assert streamed.column(1).has_offset_index
    raw = path.read_bytes()
    wanted = [bytes(row.latent.data) for row in rows]
    assert [raw[row.latent_offset : row.latent_offset + row.latent_length] for row in index] == wanted
    assert polars.read_parquet(path)["vae_latent_bytes"].to_list() == wanted
    assert (
        polars.scan_parquet(path).filter(polars.col("num_frames") == 81).collect()["vae_latent_bytes"].to_list()
        == wanted[4:]
    )
    assert pa.dataset.dataset(path).to_table()["vae_latent_bytes"].to_pylist() == wanted
    with duckdb.connect() as connection:
        found = connection.execute("select vae_latent_bytes from read_parquet(?)", [str(path)]).fetchall()
    assert [row[0] for row in found] == wanted
    loaded = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    assert [row["vae_latent_bytes"] for row in loaded] == wanted


@pytest.mark.parametrize("moments", [False, True])
def test_every_row_group_holds_its_own_middle(tmp_path: Path, moments: bool) -> None:
    """Spark and other readers on Hadoop split a file by bytes. A row group belongs to the split that holds the offset of its first column
    plus half its size; if that lies outside of the row group, two splits may read it, or none.
    """
    rows = rows_of(41, 5, 9, 17, 81, 145, moments=moments)
    path = tmp_path / "streamed.parquet"
    build(path, [rows[:1], rows[1:4], rows[4:5], rows[5:]], ALWAYS, moments=moments)
    footer = pq.read_metadata(path)
    end = 4
    for group in map(footer.row_group, range(footer.num_row_groups)):
        columns = [group.column(number) for number in range(group.num_columns)]
        begins = [
            one.data_page_offset if one.dictionary_page_offset is None else one.dictionary_page_offset
            for one in columns
        ]
        ends = [begin + one.total_compressed_size for begin, one in zip(begins, columns, strict=True)]
        size = sum(one.total_compressed_size for one in columns)
        assert begins[0] == min(begins) >= end
        assert begins[0] <= begins[0] + size // 2 < max(ends)
        assert max(ends) - min(begins) - size < 256, "nothing but the page of the stand-in lies between"
        end = max(ends)
    assert end < path.stat().st_size


def test_a_streamed_page_is_the_page_arrow_writes(tmp_path: Path) -> None:
    """Header, checksum and content; and the offset index says the same of it."""
    rows = rows_of(41)
    build(tmp_path / "s", [rows], ALWAYS)
    build(tmp_path / "p", [rows], NEVER)
    pages, indexes = [], []
    for name in ("s", "p"):
        data, footer = (tmp_path / name).read_bytes(), decode_struct(footer_of(tmp_path / name))
        chunk = footer[4][1][1][0][1][1][1][1]
        meta = chunk[3][1]
        pages.append(data[meta[9][1] :][: meta[7][1]])
        indexes.append(decode_struct(data[chunk[4][1] :][: chunk[5][1]]))
        ((location,),) = [indexes[-1][1][1][1]]
        assert location[1][1] == meta[9][1]
        location[1] = (6, 0)
    assert pages[0] == pages[1]
    assert indexes[0] == indexes[1]


def test_footers_survive_being_taken_apart(tmp_path: Path) -> None:
    table = pa.table(
        {f"c{n}": pa.array([n * 1.5, None, -(2.0**60)]) for n in range(40)}
        | {"s": ["a", "b", None], "b": [True, None, False]}
    )
    pq.write_table(
        table, tmp_path / "t", write_page_index=True, sorting_columns=[pq.SortingColumn(0)], row_group_size=1
    )
    footer = footer_of(tmp_path / "t")
    assert encode_struct(decode_struct(footer)) == footer


def test_files_that_are_not_as_expected_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing of the kind, but long enough" + (4).to_bytes(4, "little") + b"PARE")
    with pytest.raises(ValueError, match="footer"):
        point_footer_at(tmp_path / "x", [])
    with pytest.raises(ValueError, match="ends too early"):
        decode_struct(b"\x15")


def test_a_layout_arrow_should_not_write_is_noticed(tmp_path: Path) -> None:
    """As if another Arrow compressed the column: offsets cannot be found, and nothing is claimed."""
    builder = ParquetFileBuilder(tmp_path / "f", {}, moments=False)
    builder.append(rows_of(5, 9))
    row, sought = builder._rows[1]
    builder._rows[1] = (row, {"latent": type(sought["latent"])(b"something else", 100)})
    with pytest.raises(BuildError, match="tensor 1 of f is not contiguous"):
        builder.close()


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_a_long_latent_costs_no_memory(tmp_path: Path, format: str) -> None:
    """48 MiB mapped from a file, in a process of its own; measured: 4 to 15 MB, mapped pages included."""
    script = Path(__file__).parents[2] / "benchmarks" / "write_only.py"
    command = [sys.executable, str(script), "--long", format, "--mebibytes", "48", "--folder", str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert found["latent_mb"] == 50
    assert found["extra_peak_mb"] < 24
