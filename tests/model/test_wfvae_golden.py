"""WF-VAE (4x8x8 and 8x8x8) and WFVAE2 compared with vectors from the published code."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import model
from model.definition import definition
from tests.model.conftest import Golden

NETWORKS = {"wfvae-tiny": "wfvae", "wfvae888-tiny": "wfvae", "wfvae2-tiny": "wfvae2"}
CHUNKS = {"wfvae-tiny": (4, 8), "wfvae888-tiny": (8, 16)}  # frames; in latents they are 2 and 4 for both
COEFFICIENTS = {
    "wfvae-tiny": ("enc_l1", "enc_l2", "dec_l1", "dec_l2"),
    "wfvae888-tiny": ("enc_l1", "enc_l2", "dec_l1", "dec_l2"),
    "wfvae2-tiny": ("enc_coeffs0", "enc_coeffs1", "dec_coeffs1", "dec_coeffs0"),
}
everywhere = pytest.mark.parametrize("name", NETWORKS)
tiled = pytest.mark.parametrize("name", CHUNKS)


@cache
def vectors(name):
    return Golden(name)


@cache
def network(name, dtype="float32"):
    return model.from_state_dict(NETWORKS[name], vectors(name).config, vectors(name).weights, dtype=dtype)


@pytest.mark.parametrize("clip", ["A", "B", "img"])
@everywhere
def test_encoding_equals_the_published_latents(name, clip):
    golden, vae = vectors(name), network(name)
    posterior, _ = vae.encode(golden[f"in/{clip}"], moments=True)
    golden.check(f"out/{clip}_mean", posterior.mean)
    golden.check(f"out/{clip}_logvar", posterior.logvar)
    assert torch.equal(vae.encode(golden[f"in/{clip}"])[0].mean, posterior.mean)


@pytest.mark.parametrize("clip", ["A", "B", "img"])
@everywhere
def test_decoding_equals_the_published_video(name, clip):
    vectors(name).check(f"out/{clip}_dec", network(name).decode(vectors(name)[f"out/{clip}_mean"])[0])


@tiled
def test_log_variance_equals_the_published_one(name):
    logvar = network(name).encode(vectors(name)["in/A"], moments=True)[0].logvar
    vectors(name).check("out/A_std", (0.5 * logvar).exp())


@everywhere
@torch.no_grad()
def test_the_definition_equals_the_published_network(name):
    golden = vectors(name)
    published = definition(NETWORKS[name], golden.config, golden.weights)
    for clip in ("A", "B", "img"):
        video, posterior, coefficients = published(golden[f"in/{clip}"])
        golden.check(f"out/{clip}_mean", posterior.mean)
        golden.check(f"out/{clip}_logvar", posterior.logvar)
        golden.check(f"out/{clip}_dec", video)
        if clip == "A":
            for key, got in zip(COEFFICIENTS[name], (*coefficients.encoder, *coefficients.decoder), strict=True):
                golden.check(f"mid/A_{key}", got)


@pytest.mark.parametrize("which", [0, 1])
@tiled
def test_chunked_encoding_equals_the_published_latents(name, which):
    """The published tiling: the first frame alone, then chunks."""
    golden, vae, size = vectors(name), network(name), CHUNKS[name][which]
    video, means, logvars = golden["in/A"], [], []
    state = None
    for chunk in (video[:, :, :1], *video[:, :, 1:].split(size, dim=2)):
        posterior, state = vae.encode(chunk, state, moments=True)
        means.append(posterior.mean)
        logvars.append(posterior.logvar)
    golden.check(f"out/A_mean_chunk{size}", torch.cat(means, dim=2))
    golden.check(f"out/A_logvar_chunk{size}", torch.cat(logvars, dim=2))


@pytest.mark.parametrize("size", [2, 4])
@tiled
def test_chunked_decoding_equals_the_published_video(name, size):
    golden, vae = vectors(name), network(name)
    latent, frames, state = golden["out/A_mean"], [], None
    for start in (0, *range(1, latent.shape[2], size)):
        stop = min(start + size, latent.shape[2]) if start else 1
        video, state = vae.decode(latent[:, :, start:stop], state, last=stop == latent.shape[2])
        frames.append(video)
    golden.check(f"out/A_dec_chunk{size}", torch.cat(frames, dim=2))


@tiled
def test_logvar_is_clamped(name):
    golden = vectors(name)
    key, d = "encoder.conv_out.conv.bias", golden.config["latent_dim"]
    bias = golden.weights[key].clone()
    bias[d:], bias[d] = 100.0, -100.0
    shifted = model.from_state_dict("wfvae", golden.config, {**golden.weights, key: bias})
    logvar = shifted.encode(golden["in/img"], moments=True)[0].logvar
    assert logvar[:, 0].unique().tolist() == [-30.0]
    assert logvar[:, 1:].unique().tolist() == [20.0]


@everywhere
def test_float64_is_at_least_as_close(name):
    golden, exact = vectors(name), network(name, "float64")
    mean = exact.encode(golden["in/B"])[0].mean
    assert mean.dtype == torch.float64
    golden.check("out/B_mean", mean)
    golden.check("out/B_dec", exact.decode(golden["out/B_mean"])[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@everywhere
def test_low_precision_stays_close_and_returns_float32(name, dtype):
    golden, rough = vectors(name), network(name, dtype)
    bound = {"bfloat16": 4e-2, "float16": 6e-3}[dtype]
    mean, video = rough.encode(golden["in/A"])[0].mean, rough.decode(golden["out/A_mean"])[0]
    assert mean.dtype == video.dtype == torch.float32
    for key, got in (("out/A_mean", mean), ("out/A_dec", video)):
        error = ((got - golden[key]).abs().max() / golden[key].abs().max()).item()
        assert 1e-6 < error < bound, (key, error)
