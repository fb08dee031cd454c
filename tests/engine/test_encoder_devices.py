"""Encoder of a build on each device, in each dtype: clips in batches that change have the latents of clips encoded alone and whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.losslessness import ROUNDING
from pipeline.config import ModelConfig
from pipeline.encoder import Encoder
from pipeline.records import FrameChunk
from tests.model.diffusers_networks import TINY
from tests.model.test_lossless import wan

FIXTURES = Path(__file__).parents[1] / "fixtures"
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# On a CPU two will do: `test_networks.py` and `tests/model/test_diffusers_pipeline.py` build with all of them there.
NETWORKS = ["leanvae", "wfvae", "ivvae", *wan()]
CASES = [
    ("leanvae", "cpu", "bfloat16"),
    ("wfvae", "cpu", "float32"),
    *(
        pytest.param(network, "cuda", dtype, marks=on_gpu)
        for network in NETWORKS
        for dtype in ("float32", "bfloat16", "float16")
    ),
]
LENGTHS = (4, 1, 3, 2, 4)  # chunks of each clip
CHUNK = 4  # frames of a chunk, and one more in a clip's first


def config(network):
    if network == "wan":
        return ModelConfig(name="diffusers", config=TINY["wan-2.1"], untrained=0)
    return ModelConfig(
        name=network, config=json.loads((FIXTURES / f"{network}-tiny.json").read_text())["config"], untrained=0
    )


def clip(seed, chunks):
    planes = np.random.default_rng(seed).integers(16, 235, (1 + CHUNK * chunks, 3, 32, 40), np.uint8)
    return FrameChunk(seed, planes, tuple(map(float, range(len(planes)))), "bt709" if seed % 2 else "bt601", True, True)


def part(whole, number, chunks):
    """A chunk of a clip."""
    frames = slice(1 + CHUNK * number if number else 0, 1 + CHUNK * (number + 1))
    ends = number == 0, number == chunks - 1
    return FrameChunk(whole.clip, whole.planes_T3HW[frames], whole.pts_s[frames], whole.color_matrix, *ends)


@pytest.mark.parametrize(("network", "device", "dtype"), CASES)
def test_clips_in_changing_batches_have_the_latents_of_whole_clips(network, device, dtype):
    encoder = Encoder(config(network), device, dtype, batch=3)
    clips = [clip(seed, chunks) for seed, chunks in enumerate(LENGTHS)]
    want = [encoder.encode([whole], [None])[0].mean_Cthw for whole in clips]
    for turn in range(2 if device == "cpu" else 6):  # until steps are replayed
        got, states, done = [[] for _ in clips], [None] * len(clips), [0] * len(clips)
        pending = None
        while open_clips := [i for i, chunks in enumerate(LENGTHS) if done[i] < chunks]:
            kinds = [[i for i in open_clips if (done[i] == 0) == first] for first in (turn % 2 == 0, turn % 2 == 1)]
            batch = next(kind for kind in kinds if kind)[: 1 + (sum(done) + turn) % 3][::-1]
            launched = encoder.launch([part(clips[i], done[i], LENGTHS[i]) for i in batch], [states[i] for i in batch])
            if pending is not None:  # taken a step late, as a build does on a GPU
                for i, result in zip(pending[0], pending[1](), strict=True):
                    got[i].append(result.mean_Cthw)
            pending = batch, launched.results
            for i, state in zip(batch, launched.states, strict=True):
                states[i] = state
                done[i] += 1
        for i, result in zip(pending[0], pending[1](), strict=True):
            got[i].append(result.mean_Cthw)
        for mine, whole in zip(got, want, strict=True):
            allowed = 0.0 if device == "cpu" else ROUNDING[getattr(torch, dtype)] * max(1.0, np.abs(whole).max())
            np.testing.assert_allclose(np.concatenate(mine, axis=1), whole, rtol=0, atol=allowed)
    if device == "cuda" and dtype == "float32":
        exact = Encoder(config(network), "cpu", dtype)
        for whole, here in zip(clips, want, strict=True):
            np.testing.assert_allclose(here, exact.encode([whole], [None])[0].mean_Cthw, rtol=0, atol=1e-4)
    if device == "cuda":
        assert encoder.largest_batch(part(clips[0], 1, 4).shape) > 1  # measured by now


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_staged_planes_are_complete_for_alternating_sizes():
    from pipeline.encoder.staging import CudaStaging

    staging, rng = CudaStaging(torch.device("cuda:0")), np.random.default_rng(0)
    sent = [rng.integers(0, 256, (n % 5 + 1, 3, 16 * (n % 3 + 1), 16), np.uint8) for n in range(40)]
    arrived = [staging.upload([planes, planes]) for planes in sent]
    for planes, tensor in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), np.stack([planes, planes]))
    values = torch.randn(2, 4, 3, 5, 6, device="cuda:0")
    np.testing.assert_array_equal(staging.download(values)(), values.cpu().numpy())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_states_parked_in_host_memory_give_the_same_latents():
    """On one device and with one batch the same bits: parking copies them."""
    free, parking = (Encoder(config("leanvae"), "cuda", "bfloat16", batch=2, state_bytes=size) for size in (1 << 40, 1))
    clips = [clip(seed, 4) for seed in range(4)]
    found = []
    for encoder in (free, parking):
        states, latents = [None] * 4, []
        for number in range(4):
            for pair in ((0, 1), (2, 3)):
                launched = encoder.launch([part(clips[i], number, 4) for i in pair], [states[i] for i in pair])
                latents += [result.mean_Cthw for result in launched.results()]
                for i, state in zip(pair, launched.states, strict=True):
                    states[i] = state
            if number < 3:
                assert (encoder._states.device_bytes == 0) == (encoder is parking)
        found.append(latents)
    for mine, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, theirs)
