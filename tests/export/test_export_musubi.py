"""musubi-tuner: items found by name, buckets computed from it, tensors of a batch stacked under their key without type and size."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.errors import InputError
from pipeline.export.musubi import Musubi
from pipeline.export.rows import Source
from pipeline.export.texts import TextTable
from tests.export.memory_rows import (
    WAN,
    MemoryRows,
    latent_of,
    normalised,
    run,
    text_of,
    wan_row,
    with_source,
    write_texts,
)


def as_the_trainer_finds(folder, arch):
    """Items by key and the batch of each bucket: (width, height, frames) -> stacked tensors."""
    buckets = {}
    for path in sorted(Path(folder).glob(f"*_{arch}.safetensors")):
        *name, frames, size, _ = path.name.split("_")
        text = path.with_name(f"{'_'.join(name)}_{arch}_te.safetensors")
        if text.exists():
            key = (*map(int, size.split("x")), int(frames.split("-")[1]))
            buckets.setdefault(key, []).append({**load_file(path), **load_file(text)})
    return {key: stacked(items) for key, items in buckets.items()}


def stacked(items):
    batch = {}
    for item in items:
        for key, tensor in item.items():
            name = key.removeprefix("varlen_")
            if not name.endswith("_mask"):
                name = re.sub(r"_(float|bfloat)\d+$", "", name)
                if name.startswith("latents_"):
                    name = name.rpartition("_")[0]
            batch.setdefault(name, []).append((key.startswith("varlen_"), tensor))
    return {
        name: [tensor for _, tensor in found] if found[0][0] else torch.stack([tensor for _, tensor in found])
        for name, found in batch.items()
    }


def test_its_buckets_stack_normalised_latents(tmp_path):
    rows = MemoryRows(
        rows=[wan_row("a_b-0000-aa"), wan_row("c-0000-aa"), wan_row("d-0000-aa", 9), wan_row("e-0000-aa", 5, 48, 32)]
    )
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096))
    run(Musubi, rows, tmp_path / "out", texts=texts)
    wide = as_the_trainer_finds(tmp_path / "out/48x32", "wan")
    assert wide.keys() == {(48, 32, 5), (48, 32, 9)}
    batch = wide[48, 32, 5]
    assert batch.keys() == {"latents", "t5"}
    assert torch.equal(batch["latents"], torch.stack([normalised(latent_of(row)).bfloat16() for row in rows.rows[:2]]))
    assert all(torch.equal(text, text_of(row, 4096)) for text, row in zip(batch["t5"], rows.rows, strict=False))
    tall = as_the_trainer_finds(tmp_path / "out/32x48", "wan")
    assert tall.keys() == {(32, 48, 5)}
    with safe_open(tmp_path / "out/48x32/a_b-0000-aa_00000-005_0048x0032_wan.safetensors", "pt") as file:
        size = {"width": "48", "height": "32", "frame_count": "5"}
        assert file.metadata() == {"architecture": "wan", "format_version": "1.0.1", **size}
        assert list(file.keys()) == ["latents_2x4x6_bfloat16"]


def test_conditions_lie_behind_the_mask_of_given_frames(tmp_path):
    rows = MemoryRows(rows=[wan_row("a-0000-aa"), wan_row("b-0000-aa")])
    rows = with_source(rows, stored=("latent", "i2v_cond"))
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096))
    run(Musubi, rows, tmp_path / "out", texts=texts)
    batch = as_the_trainer_finds(tmp_path / "out/48x32", "wan")[48, 32, 5]
    assert batch.keys() == {"latents", "latents_image", "t5"}
    mask, cond = batch["latents_image"][:, :4], batch["latents_image"][:, 4:]
    assert torch.equal(cond, torch.stack([normalised(-latent_of(row)).bfloat16() for row in rows.rows]))
    given = torch.ones(1, 5)  # as its own caching makes the mask from five video frames
    given[:, 1:] = 0
    expected = torch.cat([given[:, :1].repeat_interleave(4, 1), given[:, 1:]], 1).view(2, 4).T
    assert torch.equal(mask.float(), expected.reshape(1, 4, 2, 1, 1).expand(2, 4, 2, 4, 6))


def test_its_configuration_has_the_size_of_each_folder(tmp_path):
    rows = MemoryRows(rows=[wan_row("a-0000-aa"), wan_row("b-0000-aa", 5, 48, 32)])
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096))
    run(Musubi, rows, tmp_path / "out", texts=texts)
    config = tomllib.loads((tmp_path / "out/dataset.toml").read_text())
    assert [(item["resolution"], item["cache_directory"]) for item in config["datasets"]] == [
        ([32, 48], str(tmp_path / "out/32x48")),
        ([48, 32], str(tmp_path / "out/48x32")),
    ]


def test_hunyuan_takes_raw_float16_with_both_encoders(tmp_path):
    spec = {**WAN, "network": "hunyuan-video", "mean": None, "std": None, "scale": 0.476986}
    rows = MemoryRows(Source("0123", "/out", 1, spec, "AutoencoderKLHunyuanVideo"), [wan_row("a-0000-aa")])

    def extra(row):
        return {"mask": torch.tensor([1, 1, 1, 0]), "clip_embedding": text_of(row, 768, 1)}

    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096, tokens=4, extra=extra))
    report = run(Musubi, rows, tmp_path / "out", texts=texts)
    (batch,) = as_the_trainer_finds(tmp_path / "out/48x32", "hv").values()
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "latents": torch.float16,
        "llm": torch.bfloat16,
        "llm_mask": torch.int64,
        "clipL": torch.bfloat16,
    }
    assert torch.equal(batch["latents"][0], latent_of(rows.rows[0]))
    assert batch["clipL"].shape == (1, 768)
    assert "holds its mean" in report.notices[0]
    bare = TextTable(write_texts(tmp_path / "bare.parquet", rows.rows, 4096))
    with pytest.raises(InputError, match="this table lacks mask, clip_embedding"):
        run(Musubi, rows, tmp_path / "out", texts=bare)
