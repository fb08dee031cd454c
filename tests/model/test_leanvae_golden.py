"""LeanVAE compared with vectors from the published code."""

from __future__ import annotations

import pytest
import torch

import model
from model.definition import definition
from model.leanvae import haar

CHUNKS_ENC = (5, 9, 13)
CHUNKS_DEC = (2, 3, 4)


def encode_in_chunks(vae, video, first):
    means, state, start = [], None, 0
    while start < video.shape[2]:
        stop = start + (first if start == 0 else first - 1)
        posterior, state = vae.encode(video[:, :, start:stop], state)
        means.append(posterior.mean)
        start = stop
    return torch.cat(means, dim=2)


def decode_in_chunks(vae, latent, first):
    videos, state, start = [], None, 0
    while start < latent.shape[2]:
        stop = start + (first if start == 0 else first - 1)
        video, state = vae.decode(latent[:, :, start:stop], state, last=stop >= latent.shape[2])
        videos.append(video)
        start = stop
    return torch.cat(videos, dim=2)


@pytest.mark.parametrize("clip", ["A", "B"])
def test_encoding_equals_the_published_latents(golden, vae, clip):
    golden.check(f"out/{clip}_z", vae.encode(golden[f"in/{clip}"])[0].mean)


@pytest.mark.parametrize("first", CHUNKS_ENC)
def test_chunked_encoding_equals_the_published_latents(golden, vae, first):
    golden.check(f"out/A_z_chunk{first}", encode_in_chunks(vae, golden["in/A"], first))


@pytest.mark.parametrize("clip", ["A", "B"])
def test_decoding_equals_the_published_video(golden, vae, clip):
    golden.check(f"out/{clip}_dec", vae.decode(golden[f"out/{clip}_z"])[0])


@pytest.mark.parametrize("first", CHUNKS_DEC)
def test_chunked_decoding_equals_the_published_video(golden, vae, first):
    golden.check(f"out/A_dec_chunk{first}", decode_in_chunks(vae, golden["out/A_z"], first))


def test_image_is_a_video_of_one_frame(golden, vae):
    golden.check("out/img_z", vae.encode(golden["in/img"].unsqueeze(2))[0].mean)
    golden.check("out/img_dec", vae.decode(golden["out/img_z"])[0].squeeze(2))


def test_logvar_is_the_clamped_published_one_and_does_not_change_the_mean(golden, vae):
    posterior, _ = vae.encode(golden["in/A"], moments=True)
    raw = golden["out/A_logvar_raw"]
    assert raw.abs().max() < 20  # so that the clamp to [-30, 20] is the identity here
    golden.check("out/A_logvar_raw", posterior.logvar)
    assert torch.equal(posterior.mean, vae.encode(golden["in/A"])[0].mean)


def test_logvar_is_clamped(golden):
    weights = {**golden.weights, "std_layer.bias": torch.full_like(golden.weights["std_layer.bias"], 100.0)}
    weights["std_layer.bias"][0] = -100.0
    shifted = model.from_state_dict("leanvae", golden.config, weights)
    logvar = shifted.encode(golden["in/A"], moments=True)[0].logvar
    assert logvar[:, 0].unique().tolist() == [-30.0]
    assert logvar[:, 1:].unique().tolist() == [20.0]


def test_haar_coefficients_equal_the_published_ones_and_invert(golden):
    video = golden["in/A"]
    image_part = haar.analyse(video[:, :, :1], haar.image_signs())
    video_part = haar.analyse(video[:, :, 1:], haar.video_signs())
    golden.check("mid/A_dwt_image", image_part)
    golden.check("mid/A_dwt_video", video_part)
    assert torch.allclose(haar.synthesise(image_part, haar.image_signs()), video[:, :, :1], atol=1e-6)
    assert torch.allclose(haar.synthesise(video_part, haar.video_signs()), video[:, :, 1:], atol=1e-6)


def test_float64_is_at_least_as_close(golden):
    exact = model.from_state_dict("leanvae", golden.config, golden.weights, dtype="float64")
    posterior, _ = exact.encode(golden["in/A"])
    assert posterior.mean.dtype == torch.float64
    golden.check("out/A_z", posterior.mean)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_stays_close_and_returns_float32(golden, dtype):
    rough = model.from_state_dict("leanvae", golden.config, golden.weights, dtype=dtype)
    bound = {"bfloat16": 4e-2, "float16": 5e-3}[dtype]
    mean = rough.encode(golden["in/A"])[0].mean
    video = rough.decode(golden["out/A_z"])[0]
    assert mean.dtype == video.dtype == torch.float32
    for name, got in (("out/A_z", mean), ("out/A_dec", video)):
        error = ((got - golden[name]).abs().max() / golden[name].abs().max()).item()
        assert 1e-6 < error < bound, (name, error)


def test_whole_grids_give_the_published_vectors(golden, monkeypatch):
    """Whole batches and chunks in one step, as on a GPU, on the CPU."""
    monkeypatch.setattr("model.stepped_vae.by_rows", lambda device: False)
    vae = model.from_state_dict("leanvae", golden.config, golden.weights)
    posterior, _ = vae.encode(golden["in/A"], moments=True)
    golden.check("out/A_z", posterior.mean)
    golden.check("out/A_logvar_raw", posterior.logvar)
    golden.check("out/B_z", encode_in_chunks(vae, golden["in/B"], 5))
    golden.check("out/B_dec", decode_in_chunks(vae, golden["out/B_z"], 2))


@torch.no_grad()
def test_the_definition_equals_the_published_network(golden):
    network = definition("leanvae", golden.config, golden.weights)
    golden.check("mid/A_features", network.encoder(golden["in/A"]))
    latent = golden["out/A_z"].permute(0, 2, 3, 4, 1)
    golden.check("mid/A_recovered", network.latent_bottleneck.recover(latent))
    for clip in ("A", "B"):
        posterior = network.encode(golden[f"in/{clip}"])
        golden.check(f"out/{clip}_z", posterior.mean)
        golden.check(f"out/{clip}_dec", network.decode(golden[f"out/{clip}_z"]))
    golden.check("out/A_logvar_raw", network.encode(golden["in/A"]).logvar)
    golden.check("out/img_z", network.encode(golden["in/img"].unsqueeze(2)).mean)
