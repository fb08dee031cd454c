"""Calls of every network: what is refused, and which surrounding settings may not change a latent."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import model
from model.losslessness import synthetic_video
from tests.model.test_lossless import NETWORKS, network

pytestmark = pytest.mark.filterwarnings("error")
everywhere = pytest.mark.parametrize("name", NETWORKS)


@everywhere
def test_the_callers_autocast_and_gradients_do_not_change_latents(name):
    vae = network(name)
    video = synthetic_video(vae, 0, 1, 1, 16, 16)
    mean = vae.encode(video)[0].mean
    decoded = vae.decode(mean)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        again, state = vae.encode(video.clone().requires_grad_())
        assert torch.equal(again.mean, mean)
        assert not again.mean.requires_grad
        assert not any(tensor.requires_grad for tensor in state.tensors)
        assert torch.equal(vae.decode(mean)[0], decoded)


def test_a_state_of_the_same_weights_with_other_settings_is_refused():
    linear, nearest = network("wfvae"), network("wfvae nearest")
    assert linear.weights_sha256 == nearest.weights_sha256
    latent = torch.zeros(1, linear.spec.latent_channels, 2, 2, 2)
    _, state = linear.decode(latent, last=False)
    with pytest.raises(ValueError, match="does not belong"):
        nearest.decode(latent, state)


@everywhere
def test_states_of_other_networks_kinds_batches_and_sizes_are_refused(name):
    vae, other = network(name), network("ivvae" if name != "ivvae" else "wfvae")
    stride = vae.spec.time_stride
    video = synthetic_video(vae, 0, 1, 1, 16, 16)
    following = video[:, :, 1 : 1 + stride]
    _, state = vae.encode(video)
    foreign = other.encode(synthetic_video(other, 0, 1, 1, 16, 16))[1]
    latent = vae.encode(video)[0].mean
    for wrong in (foreign, vae.decode(latent, last=False)[1], dataclasses.replace(state, grid=(1, 1))):
        with pytest.raises(ValueError, match="does not belong"):
            vae.encode(following, wrong)
    with pytest.raises(ValueError, match=r"batch 1.*expected.*batch 2"):
        vae.encode(following.expand(2, -1, -1, -1, -1), state)
    with pytest.raises(ValueError, match="previous encode call"):
        vae.encode(following, {"not": "a state"})
    with pytest.raises(ValueError, match="NoneType"):
        vae.stack_states([state, None])


@everywhere
def test_invalid_videos_are_refused(name):
    vae = network(name)
    stride = vae.spec.time_stride
    good = synthetic_video(vae, 0, 1, 1, 16, 16)
    for wrong, words in (
        (good.numpy(), "numpy.ndarray"),
        ([1, 2], "list"),
        (good[0], "shape"),
        (good[:, :, :stride], f"{stride}n\\+1 frames, got {stride}; nearest that fit: 1 or {stride + 1}"),
        (good[..., :12], "multiples of 8, got width 12"),
        ((good * 100).to(torch.uint8), "floating-point"),
    ):
        with pytest.raises(ValueError, match=words):
            vae.encode(wrong)
    with pytest.raises(ValueError, match=f"{vae.spec.latent_channels}, t, h, w"):
        vae.decode(torch.zeros(1, vae.spec.latent_channels + 1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"numpy\.ndarray"):
        vae.encode_planes(np.zeros((1, 1, 3, 16, 16), np.uint8), ["bt709"])


@everywhere
def test_pixels_of_another_range_are_warned_about_once(name):
    vae = model.from_state_dict(NETWORKS[name][0], network(name).config, network(name).network.state_dict())
    video = synthetic_video(vae, 0, 1, 1, 16, 16)
    low, high = vae.spec.value_range
    bytes_like = (video - low) / (high - low) * 255
    with pytest.warns(UserWarning, match=r"0\.\.255"):
        vae.encode(bytes_like)
    vae.encode(bytes_like)  # warnings are errors here, so this says nothing


@everywhere
def test_weights_of_another_network_are_refused(name):
    family, config = NETWORKS[name][0], network(name).config
    weights = dict(network(name).network.state_dict())
    key = sorted(weights)[0]
    with pytest.raises(ValueError, match=f"1 missing: {key}"):
        model.from_state_dict(family, config, {k: v for k, v in weights.items() if k != key})
    with pytest.raises(ValueError, match="1 extra: stray"):
        model.from_state_dict(family, config, {**weights, "stray": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"1 misshapen: {key}"):
        model.from_state_dict(family, config, {**weights, key: torch.zeros(9, 9, 9)})
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.from_state_dict(family, config, {**weights, key: torch.full_like(weights[key], torch.nan)})


def test_a_family_without_configuration_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    for family in ("wfvae", "ivvae", "leanvae", "diffusers"):
        with pytest.raises(ValueError, match="needs a configuration, but"):
            model.load(family, str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"; give config=, or the name of a preset: wfvae-s-4ch, "):
        model.load("wfvae", str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"; give config=$"):  # has no preset
        model.load("wfvae2", str(tmp_path / "w.safetensors"))
    with pytest.raises(ValueError, match=r"missing: z_dim. Give config=, or the name of a preset: ivvae-z4, "):
        model.from_state_dict("ivvae", {"dim": 4}, {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="finds no CUDA device"):
        model.load("ivvae", config=network("ivvae").config, untrained=0, device="cuda")


def test_constants_follow_the_configuration():
    assert model.spec("ivvae-z4").scale == 1.3196
    assert model.spec("ivvae-z4", {"z_dim": 8}).scale == model.spec("ivvae-z8").scale
    assert model.spec("ivvae-z4", {"dim": 32}).scale is None
    assert model.spec("ivvae", {"z_dim": 4, "dim": 32, "scale_factor": 2.0}).scale == 2.0
