"""Published layouts of WF-VAE load to the same network: safetensors exports, training checkpoints with and without averages."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import model
from model.definition import definition
from model.wfvae.random_weights import is_filter
from tests.model.conftest import Golden

UNUSED = {"scale": [0.18215] * 4, "shift": [0.0] * 4, "_class_name": "WFVAEModel", "dropout": 0.0}


@pytest.fixture(scope="module")
def golden():
    return Golden("wfvae-tiny")


@pytest.fixture
def folder(golden, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**golden.config, **UNUSED}))
    return tmp_path


def training(golden, *, averaged: bool):
    """What the authors' trainer saves; the average covers trained parameters only, with the prefix of data-parallel wrapping."""
    other = {key: t + 1 for key, t in golden.weights.items()}
    trained = {f"module.{key}": t for key, t in golden.weights.items() if not is_filter(key)}
    return {
        "epoch": 1,
        "current_step": 700_000,
        "optimizer_state": {
            "gen_optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-5}]}
        },
        "state_dict": {
            "gen_model": other if averaged else golden.weights,
            "dics_model": {"main.0.weight": torch.zeros(4)},
        },
        "ema_state_dict": trained if averaged else {},
        "scaler_state": {"scale": 1.0},
        "sampler_state": {"index": 0},
    }


def same_network(golden, vae):
    golden.check("out/A_mean", vae.encode(golden["in/A"])[0].mean)
    golden.check("out/A_dec", vae.decode(golden["out/A_mean"])[0])


def test_an_exported_folder_loads(golden, folder):
    save_file(golden.weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    vae = model.load("wfvae", str(folder))
    same_network(golden, vae)
    assert vae.checkpoint.layout == "safetensors"
    assert vae.config["t_interpolation"] == "trilinear"


@pytest.mark.parametrize(("averaged", "layout"), [(True, "averaged"), (False, "generator")])
def test_a_training_folder_loads(golden, folder, averaged, layout):
    torch.save(training(golden, averaged=averaged), folder / "checkpoint-700000.ckpt")
    vae = model.load("wfvae", str(folder))
    same_network(golden, vae)
    assert vae.checkpoint.layout == layout


def test_a_checkpoint_is_preferred_to_the_export_beside_it(golden, folder):
    save_file({key: t + 1 for key, t in golden.weights.items()}, folder / "diffusion_pytorch_model.safetensors")
    torch.save(training(golden, averaged=True), folder / "merged.ckpt")
    same_network(golden, model.load("wfvae", str(folder)))


def test_a_bare_state_dict_loads(golden, folder):
    torch.save({"state_dict": golden.weights}, folder / "merged.ckpt")
    vae = model.load("wfvae", str(folder / "merged.ckpt"))
    same_network(golden, vae)
    assert vae.checkpoint.layout == "official"


def test_filters_of_the_file_are_used(golden, folder):
    """Casting them to bfloat16 and back rounds them; the network then uses the rounded ones."""
    rounded = {key: t.bfloat16().float() if is_filter(key) else t for key, t in golden.weights.items()}
    save_file(rounded, folder / "model.safetensors")
    vae = model.load("wfvae", str(folder))
    with torch.no_grad():
        bands = definition("wfvae", vae.config, vae.network.state_dict())(golden["in/A"]).coefficients.encoder[0]
    rounded_mean, mean = (
        vae.encode(golden["in/A"])[0].mean,
        model.from_state_dict("wfvae", golden.config, golden.weights).encode(golden["in/A"])[0].mean,
    )
    assert not torch.equal(rounded_mean, mean)
    gain = float(torch.tensor(0.3536).bfloat16()) / 0.3536
    assert abs(gain - 1) > 1e-4
    assert torch.allclose(bands, golden["mid/A_enc_l1"] * gain, atol=1e-5)


def test_only_filters_may_be_missing(golden):
    bare = {key: t for key, t in golden.weights.items() if not is_filter(key)}
    same_network(golden, model.from_state_dict("wfvae", golden.config, bare))
    del bare["encoder.norm_out.norm.bias"]
    with pytest.raises(ValueError, match=r"1 missing: encoder\.norm_out\.norm\.bias"):
        model.from_state_dict("wfvae", golden.config, bare)
    with pytest.raises(ValueError, match=r"1 extra: encoder\.wavelet_transform_in\.x"):
        model.from_state_dict(
            "wfvae", golden.config, {**golden.weights, "encoder.wavelet_transform_in.x": torch.zeros(1)}
        )


@pytest.mark.parametrize(
    ("channels", "stated", "kept"),
    [
        (4, [0.5, 1, 2, 3], (0.5, 1.0, 2.0, 3.0)),
        (16, [0.18215] * 4, None),  # the class default that nothing uses
        (8, 0.7, 0.7),
        (8, [0.7], 0.7),
        (8, None, None),
    ],
)
def test_scale_and_shift_are_recorded_if_they_fit(golden, channels, stated, kept):
    spec = model.spec("wfvae", {**golden.config, "latent_dim": channels, "scale": stated, "shift": stated})
    assert (spec.scale, spec.shift) == (kept, kept)


@pytest.mark.parametrize("stated", ["1", [True], [], [None, 1.0]])
def test_an_impossible_scale_is_refused(golden, stated):
    with pytest.raises(ValueError, match="scale must be a number or a list of numbers"):
        model.spec("wfvae", {**golden.config, "scale": stated})
