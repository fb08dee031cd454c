"""FastVideo: its files read back as its map and iterable loaders read them (every tensor as float32, one row group for a row)."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import InputError
from pipeline.export.fastvideo import FastVideo
from pipeline.export.texts import TextTable
from tests.export.memory_rows import (
    MemoryRows,
    files_in,
    latent_of,
    normalised,
    run,
    text_of,
    wan_row,
    with_source,
    write_texts,
)

WIDTH = 4096


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fastvideo")
    names = [f"clip_{n}-0000-ab{n}" for n in range(3)]
    rows = MemoryRows(rows=[wan_row(name) for name in names] + [wan_row("long-0000-aa", frames=9, caption=None)])
    texts = TextTable(write_texts(folder / "texts.parquet", rows.rows, WIDTH))
    report = run(FastVideo, rows, folder / "out", texts=texts)
    return rows, folder / "out", report


def as_the_trainer_reads(path):
    """Rows of a file, tensors from bytes and shape with no look at the type column."""
    file, found = pq.ParquetFile(path), []
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group).to_pylist():
            found.append(row | {name: tensor_of(row, name) for name in ("vae_latent", "text_embedding")})
    return found


def tensor_of(row, name):
    return torch.from_numpy(np.frombuffer(row[f"{name}_bytes"], np.float32).reshape(row[f"{name}_shape"]).copy())


def test_its_reader_finds_raw_latents_and_true_length_texts(exported):
    rows, out, _ = exported
    read = {row["id"]: row for path in files_in(out) for row in as_the_trainer_reads(out / path)}
    assert read.keys() == {row.id for row in rows.rows}
    for row in rows.rows:
        got = read[row.id]
        assert torch.equal(got["vae_latent"], latent_of(row).float())
        assert torch.equal(got["text_embedding"], text_of(row, WIDTH).float())
        assert (got["caption"], got["width"], got["height"]) == (row.caption or "", row.width, row.height)
        assert got["num_frames"] == row.shape[1], "FastVideo writes the latent's frames"


def test_conditions_are_normalised_columns_of_its_image_to_video_schema(tmp_path, exported):
    rows = with_source(exported[0], stored=("latent", "i2v_cond"))
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, WIDTH))
    report = run(FastVideo, rows, tmp_path / "out", texts=texts)
    read = {
        row["id"]: row for path in files_in(tmp_path / "out") for row in as_the_trainer_reads(tmp_path / "out" / path)
    }
    for row in rows.rows:
        got = read[row.id]
        assert torch.equal(got["vae_latent"], latent_of(row).float()), "raw"
        assert torch.equal(tensor_of(got, "first_frame_latent"), normalised(-latent_of(row)))
        assert all((got[f"{name}_bytes"], got[f"{name}_shape"]) == (b"", []) for name in ("clip_feature", "pil_image"))
    assert "needs CLIP features as well" in report.notices[-1]
    bare = {**rows.source.spec, "mean": None, "std": None}
    other = with_source(rows, spec=bare, network_class=None, stored=("latent", "i2v_cond"))
    report = run(FastVideo, other, tmp_path / "bare", as_="wan", texts=texts)
    assert "without i2v_cond, which fastvideo takes normalised: wan-2.1 has no constants" in report.notices
    assert all(
        "first_frame_latent_bytes" not in row
        for row in as_the_trainer_reads(next((tmp_path / "bare").rglob("*.parquet")))
    )


def test_one_folder_holds_one_shape(exported):
    _, out, report = exported
    assert report.folders == {"5x32x48": 3, "9x32x48": 1}
    assert files_in(out) == ["5x32x48/part-000001.parquet", "9x32x48/part-000002.parquet"]


def test_row_groups_stay_small_since_a_row_costs_its_group(tmp_path):
    rows = MemoryRows(rows=[wan_row(f"r{n}-0000-aa", frames=17, height=256, width=512) for n in range(4)])
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, WIDTH))
    run(FastVideo, rows, tmp_path / "out", texts=texts)
    file = pq.ParquetFile(tmp_path / "out" / files_in(tmp_path / "out")[0])
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 1]


def test_missing_embeddings_are_refused_before_anything_is_written(tmp_path):
    rows = MemoryRows(rows=[wan_row("a-0000-aa"), wan_row("b-0000-bb")])
    with pytest.raises(InputError, match="fastvideo trains on text embeddings"):
        run(FastVideo, rows, tmp_path / "out")
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows[:1], WIDTH))
    with pytest.raises(InputError, match=r"lacks 1 of 2 rows by id: b-0000-bb \('caption of b-0000-bb'\)"):
        run(FastVideo, rows, tmp_path / "out", texts=texts)
    assert files_in(tmp_path / "out") == []
    narrow = TextTable(write_texts(tmp_path / "narrow.parquet", rows.rows, 768))
    with pytest.raises(InputError, match="embeddings 768 wide; the model wan takes 4096"):
        run(FastVideo, rows, tmp_path / "out", texts=narrow)


def test_networks_that_the_model_cannot_take(tmp_path, exported):
    rows, _, _ = exported
    narrow = with_source(rows, spec={**rows.source.spec, "latent_channels": 4, "network": "leanvae-dim4"})
    with pytest.raises(InputError, match="4 channels, 4x8x8 compression; the model wan takes 16 channels"):
        run(FastVideo, narrow, tmp_path / "out", as_="wan")
    other = with_source(rows, network_class=None, spec={**rows.source.spec, "network": "leanvae-dim16"})
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, WIDTH))
    report = run(FastVideo, other, tmp_path / "out", as_="wan", texts=texts)
    assert "train from scratch" in report.notices[0]
