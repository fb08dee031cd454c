"""AutoModel: the lists of a cache directory, buckets by aspect and size, batches concatenated."""

import json

import pytest
import torch

from pipeline.errors import InputError, OutputError
from pipeline.export.automodel import AutoModel
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


def as_the_trainer_batches(cache):
    """Bucket (aspect class, width and height) -> one batch of all its items, and the items' prompts."""
    items = [
        item
        for name in json.loads((cache / "metadata.json").read_text())["shards"]
        for item in json.loads((cache / name).read_text())
    ]
    buckets = {}
    for item in items:
        ratio = item["aspect_ratio"]
        aspect = "tall" if ratio < 0.85 else "wide" if ratio > 1.18 else "square"
        buckets.setdefault((aspect, tuple(item["bucket_resolution"])), []).append(item)
    batches = {}
    for key, found in buckets.items():
        read = [torch.load(item["cache_file"], weights_only=True) for item in found]
        batches[key] = {name: torch.cat([data[name] for data in read]) for name in ("video_latents", "text_embeddings")}
        batches[key]["prompts"] = [item["prompt"] for item in found]
    return batches


@pytest.fixture
def rows():
    return MemoryRows(
        rows=[wan_row("a-0000-aa"), wan_row("b-0000-aa"), wan_row("c-0000-aa", 5, 48, 32), wan_row("d-0000-aa", 9)]
    )


def table(folder, rows, **options):
    return TextTable(write_texts(folder / "texts.parquet", rows.rows, 4096, **options))


def test_its_batches_concatenate_normalised_latents_and_texts_of_one_length(tmp_path, rows):
    report = run(AutoModel, rows, tmp_path / "out", texts=table(tmp_path, rows))
    assert report.folders == {"5f": 3, "9f": 1}
    batches = as_the_trainer_batches(tmp_path / "out/5f")
    assert batches.keys() == {("wide", (48, 32)), ("tall", (32, 48))}
    batch = batches["wide", (48, 32)]
    assert torch.equal(
        batch["video_latents"], torch.stack([normalised(latent_of(row)).half() for row in rows.rows[:2]])
    )
    assert batch["text_embeddings"].shape == (2, 226, 4096)
    for text, row in zip(batch["text_embeddings"], rows.rows, strict=False):
        wanted = text_of(row, 4096)
        assert torch.equal(text[: len(wanted)], wanted)
        assert not text[len(wanted) :].any()
    assert batch["prompts"] == [row.caption for row in rows.rows[:2]]
    (long,) = as_the_trainer_batches(tmp_path / "out/9f").values()
    assert long["video_latents"].shape == (1, 16, 3, 4, 6)


def test_rows_that_go_leave_the_lists(tmp_path, rows):
    run(AutoModel, rows, tmp_path / "out", texts=table(tmp_path, rows))
    del rows.rows[3], rows.rows[0]
    report = run(AutoModel, rows, tmp_path / "out", texts=table(tmp_path, rows))
    assert (report.kept, report.removed) == (2, 2)
    prompts = [batch["prompts"] for batch in as_the_trainer_batches(tmp_path / "out/5f").values()]
    assert sorted(prompts) == [["caption of b-0000-aa"], ["caption of c-0000-aa"]]
    assert not (tmp_path / "out/9f").exists()
    assert json.loads((tmp_path / "out/5f/metadata.json").read_text())["total_items"] == 2
    assert sum(name.endswith(".meta") for name in files_in(tmp_path / "out")) == 2


def test_padding_is_cut_by_the_mask_and_longer_texts_are_refused(tmp_path, rows):
    def extra(row):
        return {"mask": (torch.arange(512) < 4).to(torch.uint8)}

    run(AutoModel, rows, tmp_path / "masked", texts=table(tmp_path, rows, tokens=512, extra=extra))
    batch = as_the_trainer_batches(tmp_path / "masked/5f")["wide", (48, 32)]
    assert torch.equal(batch["text_embeddings"][0, :4], text_of(rows.rows[0], 4096, 512)[:4])
    assert not batch["text_embeddings"][:, 4:].any()
    with pytest.raises(
        InputError, match="of a-0000-aa has 512 tokens, AutoModel's wan takes 226; if these are padding, give the mask"
    ):
        run(AutoModel, rows, tmp_path / "bare", texts=table(tmp_path, rows, tokens=512))


def test_the_vae_of_wan_22_is_not_that_of_its_14b_models(tmp_path, rows):
    wide = with_source(rows, spec={**rows.source.spec, "latent_channels": 48, "space_stride": 16, "network": "wan-2.2"})
    with pytest.raises(
        InputError, match=r"latents of wan-2.2 with 48 channels, 4x16x16 compression; the model wan22 takes 16 channels"
    ):
        run(AutoModel, wide, tmp_path / "out", texts=table(tmp_path, rows), as_="wan22")


def test_a_moved_directory_is_refused_since_its_lists_have_absolute_paths(tmp_path, rows):
    run(AutoModel, rows, tmp_path / "out", texts=table(tmp_path, rows))
    (tmp_path / "out").rename(tmp_path / "moved")
    with pytest.raises(OutputError, match="differs in directory"):
        run(AutoModel, rows, tmp_path / "moved", texts=table(tmp_path, rows))
