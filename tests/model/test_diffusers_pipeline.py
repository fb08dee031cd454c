"""Builds with diffusers' VAEs: stored rows are the network's latents of the clip, with its constants."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import pipeline
from pipeline.config import DecodeConfig, DrillConfig
from pipeline.errors import ConfigError
from pipeline.format.index import METADATA_KEY
from pipeline.records import FrameChunk, Sample
from pipeline.video.clips import resolve_rules
from pipeline.video.cutting import CutRequest, Cutter
from tests.model.diffusers_networks import CHUNKED, TINY, tiny
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_job, video_bytes

# clips the network takes, of videos of 9 and 13 frames; the third video of the corpus is too short for all
FRAMES = {"cosmos": 9, "ltx-video": 9, "mochi": 7, "allegro": 8, "wan-2.1": 9, "wan-2.2": 9, "ltx-2": 9, "vidtok": 9}
PER_CHANNEL = ("wan-2.1", "wan-2.2", "qwen-image", "cosmos", "ltx-video", "ltx-2", "mochi")
NO_CONSTANTS = ("vidtok", "flux-2")  # FLUX.2's are those of patches


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=1, samples=3)


def clips_by_hand(job, spec):
    """Planes `T 3 H W` and matrix of each clip of the corpus's second video, joined from the cutter's chunks."""
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    sample = Sample("000001", 1, "u", video_bytes(13, seed=1), "mp4")
    cutter = Cutter(CutRequest(sample, rules, DecodeConfig(), 1 << 20, DrillConfig()))
    cutter.open()
    chunks = {}
    while isinstance(chunk := cutter.next(), FrameChunk):
        chunks.setdefault(chunk.clip, []).append(chunk)
    return {
        clip: (np.concatenate([chunk.planes_T3HW for chunk in parts]), parts[0].color_matrix)
        for clip, parts in chunks.items()
    }


@pytest.mark.parametrize("name", TINY)
def test_a_build_stores_the_latents_of_the_network(name, corpus, tmp_path):
    vae, frames = tiny(name), FRAMES.get(name, 5)
    flags = {"model.name": "diffusers", "model.config": TINY[name], "clips.frames": str(frames)}
    job = tiny_job(corpus, tmp_path / "out", "engine.chunk_frames=4", "engine.decoders=1", **flags)
    report = pipeline.encode(job)
    assert report.ok
    assert report.counts.clips == 9 // frames + 13 // frames
    assert report.rejects == {"too_short": 1}
    stored = rows(tmp_path / "out")
    assert len(stored) == report.counts.clips
    by_hand = clips_by_hand(job, vae.spec)
    mine = {row["clip_index"]: row for row in stored.values() if row["source_key"] == "000001"}
    assert set(mine) == set(by_hand)
    for index, (planes, matrix) in by_hand.items():
        want = vae.encode_planes(torch.from_numpy(planes[None]), [matrix])[0].mean[0].numpy()
        got = np.frombuffer(mine[index]["vae_latent_bytes"], "<f4").reshape(mine[index]["vae_latent_shape"])
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))
        assert want.std() > 0.01
    (receipt,) = receipts(tmp_path / "out")
    encoder = receipt.fingerprint_parts["encoder"]
    assert encoder["config"] == json.loads(json.dumps(vae.identity().latent_config))
    assert encoder["latent_weights_sha256"] == vae.sha256.mean
    assert (vae.spec.chunking == "exact") == (name in CHUNKED)
    # constants too, also those of LTX, which are known only once its weights are
    metadata = json.loads(pq.read_schema(tmp_path / "out" / receipt.files[0].key).metadata[METADATA_KEY])
    assert metadata["encoder"]["checkpoint"]["config"] == json.loads(json.dumps(vae.config))
    assert metadata["encoder"]["checkpoint"]["weights_sha256"] == vae.weights_sha256
    written = metadata["spec"]
    assert written == json.loads(json.dumps(vae.spec.to_dict()))
    assert (written["mean"] is not None) == (name in PER_CHANNEL)
    assert (written["scale"] is None) == (name in (*PER_CHANNEL, *NO_CONSTANTS))


def test_storing_moments_is_refused_at_start_for_deterministic_networks(corpus, tmp_path):
    flags = {"model.name": "diffusers", "model.config": TINY["cosmos"], "clips.frames": "9"}
    with pytest.raises(ConfigError, match=r"write\.moments: .*no log-variance"):
        pipeline.encode(tiny_job(corpus, tmp_path / "out", "write.moments=true", **flags))
    assert not list((tmp_path / "out").rglob("*.parquet"))
