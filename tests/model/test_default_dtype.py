"""A program that has called `torch.set_default_dtype` gets the same networks and chunks."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import model
from model.diffusers_vae import causal_stream, wan_stream
from model.losslessness import synthetic_video
from tests.model.test_identity import OWN, config_of

pytestmark = pytest.mark.filterwarnings("error")


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", [*OWN, "wan-2.1", "flux-2"])
def test_weights_have_the_same_hashes(name):
    family, config = config_of(name)
    want = model.identify(family, config=config, untrained=0)
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype):
            assert model.identify(family, config=config, untrained=0) == want


@pytest.mark.parametrize("name", ["leanvae", "wan-2.1", "ltx-2"])
def test_networks_are_found_to_be_lossless_in_chunks(name):
    family, config = config_of(name)
    wan_stream._tested_stream.cache_clear()
    causal_stream._difference.cache_clear()
    with default_dtype(torch.bfloat16):
        vae = model.load(family, config=config, untrained=0)
        assert vae.spec.chunking == "exact"
        assert synthetic_video(vae, 0, 1, 1, 32, 32).dtype == torch.float32
