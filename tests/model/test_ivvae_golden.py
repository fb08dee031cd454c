"""IV-VAE compared with vectors from the published code."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch

import model
from model.definition import definition
from model.losslessness import decode_chunked, encode_chunked
from tests.model.conftest import Golden

pytestmark = pytest.mark.filterwarnings("error")
CLIPS = ("A", "B", "img")  # img: a batch of two single frames


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("ivvae-tiny")


@pytest.fixture(scope="module")
def vae(golden: Golden) -> Any:
    return model.from_state_dict("ivvae", golden.config, golden.weights)


def raw(golden: Golden, clip: str) -> torch.Tensor:
    """The published decode undoes scale and shift first; Lathe's takes the raw latent."""
    return golden[f"out/{clip}_latent"] / golden.config["scale_factor"] + golden.config["shift_factor"]


@pytest.mark.parametrize("clip", CLIPS)
def test_mean_and_log_variance_equal_the_published_ones(golden, vae, clip):
    posterior, _ = vae.encode(golden[f"in/{clip}"], moments=True)
    golden.check(f"out/{clip}_mu", posterior.mean)
    golden.check(f"out/{clip}_logvar", posterior.logvar)
    assert torch.equal(vae.encode(golden[f"in/{clip}"])[0].mean, posterior.mean)


@pytest.mark.parametrize("clip", CLIPS)
def test_recorded_constants_give_the_published_latent(golden, vae, clip):
    mean = vae.encode(golden[f"in/{clip}"])[0].mean
    golden.check(f"out/{clip}_latent", (mean - vae.spec.shift) * vae.spec.scale)


@pytest.mark.parametrize("frames", [4, 8, 16])
def test_encoding_in_published_chunks_equals_the_published_latents(golden, vae, frames):
    rows = golden["out/A_mu"].shape[2]
    got = encode_chunked(vae, golden["in/A"], [*range(1, rows, frames // 4), rows], moments=True)
    mean, logvar = got.chunk(2, dim=1)
    golden.check(f"out/A_mu_chunk{frames}", mean)
    golden.check(f"out/A_logvar_chunk{frames}", logvar)


@pytest.mark.parametrize("clip", CLIPS)
def test_decoding_equals_the_published_video(golden, vae, clip):
    golden.check(f"out/{clip}_dec", vae.decode(raw(golden, clip))[0])


@pytest.mark.parametrize("latents", [1, 2, 4])
def test_decoding_in_published_chunks_equals_the_published_video(golden, vae, latents):
    rows = golden["out/A_mu"].shape[2]
    got = decode_chunked(vae, raw(golden, "A"), [*range(1, rows, latents), rows])
    golden.check("out/A_dec" if latents == 1 else f"out/A_dec_chunk{latents}", got)


def test_float64_is_at_least_as_close(golden):
    exact = model.from_state_dict("ivvae", golden.config, golden.weights, dtype="float64")
    mean = exact.encode(golden["in/B"])[0].mean
    assert mean.dtype == torch.float64
    golden.check("out/B_mu", mean)
    golden.check("out/B_dec", exact.decode(raw(golden, "B"))[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close_and_returns_float32(golden, dtype):
    rough = model.from_state_dict("ivvae", golden.config, golden.weights, dtype=dtype)
    bound = {"bfloat16": 3e-2, "float16": 4e-3}[dtype]
    mean, video = rough.encode(golden["in/A"])[0].mean, rough.decode(raw(golden, "A"))[0]
    assert mean.dtype == video.dtype == torch.float32
    for name, got in (("out/A_mu", mean), ("out/A_dec", video)):
        error = ((got - golden[name]).abs().max() / golden[name].abs().max()).item()
        assert 1e-6 < error < bound, (name, error)


def test_samples_are_reproducible(golden, vae):
    posterior, _ = vae.encode(golden["in/B"], moments=True)
    drawn = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert ((drawn[0] - posterior.mean) / (0.5 * posterior.logvar).exp()).std().sub(1).abs() < 0.2


@pytest.mark.parametrize("clip", CLIPS)
@torch.no_grad()
def test_the_definition_equals_the_published_network(golden, clip):
    plain = definition("ivvae", golden.config, golden.weights)
    with torch.no_grad():
        mean, logvar = astuple(plain.encode(golden[f"in/{clip}"]))
    golden.check(f"out/{clip}_mu", mean)
    golden.check(f"out/{clip}_logvar", logvar)
    golden.check(f"out/{clip}_dec", plain.decode(raw(golden, clip)))
