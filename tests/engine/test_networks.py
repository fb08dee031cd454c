"""A build with each family of networks: chunks in batches give the rows of whole clips, with the constants in the metadata."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.format.index import METADATA_KEY
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_job

FIXTURES = Path(__file__).parents[1] / "fixtures"
NETWORKS = {
    "wfvae": ("wfvae-tiny", {}, 9, 4),
    "wfvae 8x8x8": ("wfvae888-tiny", {}, 9, 8),
    "wfvae whole": ("wfvae-tiny", {"attention_type": "AttnBlock3D"}, 9, 4),
    "wfvae2": ("wfvae2-tiny", {}, 9, 4),
    "ivvae": ("ivvae-tiny", {}, 9, 4),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_corpus_becomes_latents(name, corpus, tmp_path):
    fixture, changes, frames, stride = NETWORKS[name]
    config = {**json.loads((FIXTURES / f"{fixture}.json").read_text())["config"], **changes}
    flags = {"model.name": name.split()[0], "model.config": config, "clips.frames": str(frames), "write.moments": True}
    chunked = tiny_job(corpus, tmp_path / "chunked", f"engine.chunk_frames={stride}", "engine.batch=3", **flags)
    whole = tiny_job(corpus, tmp_path / "whole", "engine.chunk_frames=64", "engine.batch=1", **flags)
    reports = [pipeline.encode(job) for job in (chunked, whole)]
    assert all(report.ok for report in reports)
    assert reports[0].counts.clips == reports[1].counts.clips == 4
    assert rows(tmp_path / "chunked") == rows(tmp_path / "whole")
    for row in rows(tmp_path / "whole").values():
        latent = np.frombuffer(row["vae_latent_bytes"], "<f4").reshape(row["vae_latent_shape"])
        assert latent.shape[1:] == (1 + (frames - 1) // stride, 4, 4)
        assert latent.std() > 0.01
    receipt = receipts(tmp_path / "chunked")[0]
    spec = json.loads(pq.read_schema(tmp_path / "chunked" / receipt.files[0].key).metadata[METADATA_KEY])["spec"]
    assert spec["value_range"] == [-1.0, 1.0]
    assert spec["chunking"] == ("none" if "whole" in name else "exact")
    assert receipt.fingerprint_parts["encoder"]["network"] == name.split()[0]
