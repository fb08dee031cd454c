"""Registry: names and specs need no torch; loading needs weights and says where they are."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import model
from model import registry


def test_names_and_specs_import_no_torch():
    code = (
        "import sys, model; names = model.names(); specs = [model.spec(name).to_dict() for name in names]; "
        "heavy = {'torch', 'numpy', 'safetensors', 'huggingface_hub'} & set(sys.modules); "
        "assert {'leanvae-dim4', 'leanvae-dim16', 'ivvae-z4'} <= set(names) and not heavy, (names, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_specs_of_the_published_networks():
    four, sixteen = (model.spec(name) for name in ("leanvae-dim4", "leanvae-dim16"))
    assert (four.latent_channels, four.scale) == (4, 0.7744)
    assert (sixteen.latent_channels, sixteen.scale) == (16, 1.0)
    for spec in (four, sixteen):
        assert (spec.value_range, spec.time_stride, spec.space_stride, spec.chunking) == ((-0.5, 0.5), 4, 8, "exact")
        assert spec.latent_frames(17) == 5


@pytest.mark.parametrize("name", ["leanvae-dim8", "wf-vae", ""])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"unknown network .*leanvae-dim4, leanvae-dim16.*leanvae"):
        model.spec(name)
    with pytest.raises(ValueError, match="unknown network"):
        model.load(name, untrained=0)


def test_a_family_needs_a_complete_configuration(golden):
    with pytest.raises(ValueError, match=r"missing: latent_dim, embedding_dim.*leanvae-dim4"):
        model.spec("leanvae")
    assert model.spec("leanvae", golden.config).latent_channels == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
        ({"l_dim": 8.5}, "l_dim must be a whole number"),
        ({"h_dim": True}, "h_dim must be a whole number"),
        ({"l_dim": 16}, r"embedding_dim must be l_dim \+ h_dim, got 32 and 16 \+ 24"),
    ],
)
def test_impossible_configurations_are_refused(golden, change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("leanvae", {**golden.config, **change})


def test_keys_of_training_and_tiling_are_ignored(golden):
    config = {**golden.config, "use_tile_inference": True, "lr": 1e-4, "disc_loss_type": "hinge", "chunksize_enc": 2}
    assert set(registry.complete("leanvae", config)) == set(registry.FAMILIES["leanvae"].keys)
    loaded = model.from_state_dict("leanvae", config, golden.weights)
    golden.check("out/B_z", loaded.encode(golden["in/B"])[0].mean)


def test_loading_without_weights_says_what_to_do():
    with pytest.raises(ValueError, match=r"hf://Yumic/LeanVAE/LeanVAE-dim16.ckpt.*checkpoint=.*untrained=") as caught:
        model.load("leanvae-dim16")
    assert "MIT" in str(caught.value)
    with pytest.raises(ValueError, match="both checkpoint and untrained"):
        model.load("leanvae-dim16", "x.ckpt", untrained=1)


def test_untrained_weights_are_reproducible_and_sane(golden):
    one, again, other = (model.load("leanvae", config=golden.config, untrained=seed) for seed in (3, 3, 4))
    assert one.untrained
    assert one.seed == 3
    assert one.checkpoint is None
    assert one.weights_sha256 == again.weights_sha256 != other.weights_sha256
    # the same on every machine and version: these weights are named in fingerprints
    assert one.weights_sha256.startswith("dcdcf3175aa4463e")
    video = torch.rand((1, 3, 9, 32, 32), generator=torch.Generator().manual_seed(0)) - 0.5
    mean = one.encode(video)[0].mean
    assert torch.equal(mean, again.encode(video)[0].mean)
    assert 0.05 < mean.std() < 5
    assert one.decode(mean)[0].abs().max() < 20


def test_a_loaded_network_has_its_documented_attributes(vae, golden):
    assert vae.config == registry.complete("leanvae", golden.config)
    assert (vae.numerics, vae.untrained, vae.seed, vae.checkpoint) == (3, False, None, None)
    assert len(vae.weights_sha256) == 64
    assert vae.spec == model.spec("leanvae", golden.config)
    assert vae.weights_sha256[:12] in repr(vae)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "double"])
def test_unknown_dtypes_are_refused(golden, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, float64"):
        model.from_state_dict("leanvae", golden.config, golden.weights, dtype=dtype)
