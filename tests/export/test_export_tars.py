"""Megatron-Bridge and plain tars: members read back as their readers decode them."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, InputError
from pipeline.export.megatron_bridge import MegatronBridge
from pipeline.export.models import CUSTOM
from pipeline.export.texts import TextTable
from pipeline.export.wds import Wds
from tests.export.memory_rows import MemoryRows, files_in, latent_of, normalised, run, text_of, wan_row, write_texts


@pytest.fixture
def rows():
    return MemoryRows(
        rows=[wan_row("a-0000-aa"), wan_row("b.c-0000-aa".replace(".", "_"), 9), wan_row("d-0000-aa", 1, caption=None)]
    )


def samples_of(path):
    """Members by key and extension; those of a sample must be adjacent."""
    found, last = {}, None
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, suffix = member.name.partition(".")
            assert key == last or key not in found
            found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
            last = key
    return found


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=True)


def test_the_bridge_reads_normalised_latents_texts_and_tokens(tmp_path, rows):
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096))
    report = run(MegatronBridge, rows, tmp_path / "out", texts=texts)
    assert files_in(tmp_path / "out") == ["shard-000001.tar"]
    found = samples_of(tmp_path / "out/shard-000001.tar")
    assert list(found) == [row.id for row in rows.rows]
    for row in rows.rows:
        members = found[row.id]
        assert torch.equal(loaded(members["pth"]), normalised(latent_of(row)).half())
        text = pickle.loads(members["pickle"])  # noqa: S301 - what the trainer does
        assert torch.equal(text, text_of(row, 4096))
        facts = json.loads(members["json"])
        assert facts["tokens"] == row.shape[1] * 2 * 3
        assert (facts["processed_frames"], facts["caption"]) == (row.num_frames, row.caption or "")
    assert report.numbers == {"tokens": 18}


def test_what_the_bridge_would_skip_or_cut_is_refused(tmp_path, rows):
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096, tokens=513))
    with pytest.raises(InputError, match="has 513 tokens; Megatron-Bridge cuts it off at 512"):
        run(MegatronBridge, rows, tmp_path / "long", texts=texts)
    odd = MemoryRows(rows=[wan_row("odd-0000-aa", 5, 40, 32)])
    texts = TextTable(write_texts(tmp_path / "texts.parquet", odd.rows, 4096))
    with pytest.raises(InputError, match=r"the latent of odd-0000-aa is 2x5x4; .* multiples of 16"):
        run(MegatronBridge, odd, tmp_path / "odd", texts=texts)


def test_the_index_of_energon_goes_with_a_change(tmp_path, rows):
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 4096))
    out = tmp_path / "out"
    run(MegatronBridge, MemoryRows(rows=rows.rows[:2]), out, texts=texts)
    (out / ".nv-meta").mkdir()
    (out / ".nv-meta/index.sqlite").touch()
    (out / "shard-000001.tar.idx").touch()
    report = run(MegatronBridge, rows, out, texts=texts)
    assert report.caches_removed == [".nv-meta/index.sqlite", "shard-000001.tar.idx"]
    assert files_in(out) == ["shard-000001.tar", "shard-000002.tar"]
    run(MegatronBridge, MemoryRows(rows=rows.rows[1:]), out, texts=texts)
    assert files_in(out) == ["shard-000002.tar", "shard-000003.tar"]


def test_members_of_the_users_choice(tmp_path, rows):
    texts = TextTable(write_texts(tmp_path / "texts.parquet", rows.rows, 8, key="id"))
    members = ("latent=latent.pt", "latent=x.npy", "text=embed.pt", "caption=prompt.txt", "metadata=json")
    run(Wds, rows, tmp_path / "out", texts=texts, as_=CUSTOM, normalize="model", members=members, dtype="float32")
    assert files_in(tmp_path / "out") == ["1x32x48/000003.tar", "5x32x48/000001.tar", "9x32x48/000002.tar"]
    for row, path in zip(rows.rows, ("5x32x48/000001.tar", "9x32x48/000002.tar", "1x32x48/000003.tar"), strict=True):
        (found,) = samples_of(tmp_path / "out" / path).values()
        assert list(found) == ["latent.pt", "x.npy", "embed.pt", "prompt.txt", "json"]
        assert torch.equal(loaded(found["latent.pt"]), normalised(latent_of(row)))
        assert np.array_equal(np.load(io.BytesIO(found["x.npy"])), normalised(latent_of(row)).numpy())
        assert torch.equal(loaded(found["embed.pt"]), text_of(row, 8).float())
        assert found["prompt.txt"].decode() == (row.caption or "")
        facts = json.loads(found["json"])
        assert (facts["id"], facts["shape"], facts["fps"]) == (row.id, list(row.shape), 16.0)


def test_numpy_members_need_a_type_that_numpy_has(tmp_path, rows):
    options = {"as_": CUSTOM, "normalize": "none", "members": ("latent=latent.npy",)}
    with pytest.raises(InputError, match="numpy has no bfloat16"):
        run(Wds, rows, tmp_path / "out", dtype="bfloat16", **options)
    run(Wds, rows, tmp_path / "raw", **options)
    (found,) = samples_of(tmp_path / "raw/5x32x48/000001.tar").values()
    assert np.array_equal(np.load(io.BytesIO(found["latent.npy"])), latent_of(rows.rows[0]).numpy())
    with pytest.raises(ConfigError, match="--member logvar: the output has no log-variance"):
        run(Wds, rows, tmp_path / "logvar", as_=CUSTOM, normalize="none", members=("logvar=logvar.pt",))
