"""LTX-2: its tree read back as its dataset pairs files and as `torch.load(weights_only=True)` loads them."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import InputError
from pipeline.export.ltx2 import Ltx2
from pipeline.export.rows import Row, Source
from pipeline.export.texts import TextTable
from tests.export.memory_rows import MemoryRows, latent_of, normalised, run, text_of, with_source, write_texts

SPEC = {
    "network": "ltx-2",
    "latent_channels": 128,
    "time_stride": 8,
    "space_stride": 32,
    "lead_frames": 1,
    "scale": None,
    "shift": None,
    "mean": [0.01 * channel for channel in range(128)],
    "std": [1 + 0.01 * channel for channel in range(128)],
}
SOURCE = Source("0123", "/out", 1, SPEC, "AutoencoderKLLTX2Video")


def ltx_row(name, frames=9, width=96):
    shape = (128, 1 + (frames - 1) // 8, 2, width // 32)
    return Row(name, f"{frames}x64x{width}", shape, frames, width, 64, 24.0, frames / 24, f"caption of {name}")


def mask_of(row):
    mask = torch.ones(8, dtype=torch.uint8)
    mask[: len(row.id) % 3] = 0
    return mask


def table(folder, rows, *, audio=False, tokens=8):
    def extra(row):
        return {"mask": mask_of(row), **({"audio_embedding": text_of(row, 16, 8)} if audio else {})}

    return TextTable(write_texts(folder / "texts.parquet", rows.rows, 32, tokens=tokens, extra=extra))


def as_the_trainer_pairs(root, sources=("latents", "conditions")):
    """Samples of the sorted `latents/**/*.pt` that have a file in every source; `latent_X.pt` belongs to `condition_X.pt`."""
    base = Path(root) / ".precomputed"
    found = {}
    for path in sorted((base / "latents").glob("**/*.pt")):
        relative = path.relative_to(base / "latents")
        names = {kind: base / kind / relative for kind in sources}
        if path.name.startswith("latent_"):
            names["conditions"] = base / "conditions" / f"condition_{path.stem[7:]}.pt"
        if all(name.exists() for name in names.values()):
            found[path.stem] = {kind: torch.load(name, weights_only=True) for kind, name in names.items()}
    return found


def test_its_reader_finds_normalised_latents_with_their_conditions(tmp_path):
    rows = MemoryRows(
        SOURCE, [ltx_row("a-0000-aa"), ltx_row("latent_b-0000-bbb"), ltx_row("c-0000-c", frames=17, width=64)]
    )
    report = run(Ltx2, rows, tmp_path / "out", texts=table(tmp_path, rows, audio=True))
    read = as_the_trainer_pairs(tmp_path / "out")
    assert read.keys() == {"a-0000-aa", "row-latent_b-0000-bbb", "c-0000-c"}
    for row in rows.rows:
        sample = read[f"row-{row.id}" if row.id.startswith("latent_") else row.id]
        latents, conditions = sample["latents"], sample["conditions"]
        assert torch.equal(latents["latents"], normalised(latent_of(row), SPEC).to(torch.bfloat16))
        assert latents["latents"].untyped_storage().nbytes() == latents["latents"].nbytes, "nothing else is in the file"
        assert (latents["num_frames"], latents["height"], latents["width"]) == row.shape[1:]
        assert latents["fps"] == 24.0
        assert torch.equal(conditions["video_prompt_embeds"], text_of(row, 32, 8))
        assert torch.equal(conditions["audio_prompt_embeds"], text_of(row, 16, 8))
        assert torch.equal(conditions["prompt_attention_mask"], mask_of(row).long())
    assert "Gemma" in report.notices[0]


def test_a_mask_of_ones_where_the_table_has_none(tmp_path):
    rows = MemoryRows(SOURCE, [ltx_row("a-0000-aa")])
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 32, key="caption", tokens=8))
    run(Ltx2, rows, tmp_path / "out", texts=texts)
    conditions = as_the_trainer_pairs(tmp_path / "out")["a-0000-aa"]["conditions"]
    assert conditions["prompt_attention_mask"].tolist() == [1] * 8
    assert conditions.keys() == {"video_prompt_embeds", "prompt_attention_mask"}


def test_what_its_loader_could_not_stack_or_has_no_constants_for(tmp_path):
    rows = MemoryRows(SOURCE, [ltx_row("a-0000-aa"), ltx_row("bb-0000-aa")])
    with pytest.raises(InputError, match="embeddings of 3 to 4 tokens; LTX-2 stacks them"):
        run(Ltx2, rows, tmp_path / "out", texts=table(tmp_path, rows, tokens=None))
    bare = with_source(rows, spec={**SPEC, "mean": None, "std": None})
    with pytest.raises(InputError, match="no constants of ltx-2"):
        run(Ltx2, bare, tmp_path / "out", texts=table(tmp_path, rows))
    done = with_source(rows, applied=True)
    with pytest.raises(InputError, match="holds normalised latents"):
        run(Ltx2, done, tmp_path / "out", texts=table(tmp_path, rows))
