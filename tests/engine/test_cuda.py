"""On a GPU: staged bytes arrive complete, and latents equal those of the CPU."""

import numpy as np
import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.encoder import Encoder
from pipeline.records import FrameChunk
from tests.tiny_corpus import TINY_NETWORK

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = ModelConfig(name="leanvae", config=TINY_NETWORK, untrained=0)


def chunk(seed, *, first=True, frames=9):
    planes = np.random.default_rng(seed).integers(16, 235, (frames - (not first), 3, 32, 40), np.uint8)
    return FrameChunk(seed, planes, tuple(map(float, range(len(planes)))), "bt709", first, last=not first)


def test_staged_planes_are_complete_for_alternating_sizes():
    from pipeline.encoder.staging import CudaStaging

    staging, rng = CudaStaging(torch.device("cuda:0")), np.random.default_rng(0)
    sent = [rng.integers(0, 256, (n % 5 + 1, 3, 16 * (n % 3 + 1), 16), np.uint8) for n in range(40)]
    arrived = [staging.upload([planes, planes]) for planes in sent]
    for planes, tensor in zip(sent, arrived, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), np.stack([planes, planes]))
    values = torch.randn(2, 4, 3, 5, 6, device="cuda:0")
    np.testing.assert_array_equal(staging.download(values)(), values.cpu().numpy())


def test_overlapping_steps_give_the_latents_of_the_cpu():
    here, there = Encoder(CONFIG, "cpu", "float32"), Encoder(CONFIG, "cuda", "float32")
    firsts, seconds = [chunk(n) for n in range(3)], [chunk(n, first=False) for n in range(3)]
    begun = there.launch(firsts, [None] * 3)
    continued = there.launch(seconds, begun.states)  # launched before anything of the first step is asked for
    expected = here.launch(firsts, [None] * 3)
    for got, want in zip(begun.results(), expected.results(), strict=True):
        np.testing.assert_allclose(got.mean_Cthw, want.mean_Cthw, rtol=0, atol=1e-4)
    following = here.encode(seconds, expected.states)
    for got, want in zip(continued.results(), following, strict=True):
        np.testing.assert_allclose(got.mean_Cthw, want.mean_Cthw, rtol=0, atol=1e-4)
    assert there.largest_batch((False, 8, 32, 40)) > 1  # measured by now
