"""Built-in recipes state what was published, and all of them run, reduced to tiny steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import model
from model.training.inflation import inflate
from model.training.networks import trainable
from model.training.objective_recipe import IVVAE, LEANVAE, WFVAE
from model.training.recipe import load_recipe, training_recipe
from model.training.source import SyntheticSource
from model.training.trainer import train

PUBLISHED = {"leanvae": LEANVAE, "wfvae": WFVAE, "ivvae": IVVAE}
NARROW = {
    "leanvae": {
        **{"latent_dim": 4, "embedding_dim": 24, "l_dim": 8, "h_dim": 16, "sep_num_layer": 1, "fusion_num_layer": 1},
        **{"ista_iter_num": 1, "ista_layer_num": 1},
    },
    "wfvae": {
        **{"latent_dim": 4, "base_channels": 4, "encoder_num_resblocks": 1, "decoder_num_resblocks": 1},
        **{"encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 4},
    },
    "ivvae": {"z_dim": 4, "dim": 2},
    "ivvae-image": {"z_dim": 4, "dim": 2},
}


def shrunk(name, **changes):
    """A recipe with all its terms, stages and groups, one step per stage, small clips; LPIPS is replaced by a term without weights."""
    section = load_recipe(name).to_dict() | changes
    section |= {"config": NARROW[name], "precision": "float32", "log_every": 1}
    for stage in section["stages"]:
        stage |= {"steps": 1, "warm_up": 0, "batches": 2}
        terms = stage["objective"]["terms"]
        lpips = [key for key in terms if key.startswith("lpips")]
        stage["objective"]["terms"] = {key: terms[key] for key in terms if key not in lpips} | {"pyramid": 1.0}
        for group in stage["groups"]:
            group |= {"frames": min(group["frames"], 5), "height": 32, "width": group["width"] // 8, "batch": 1}
        if stage["objective"]["adversarial"]:
            stage["objective"]["adversarial"] |= {"channels": 4, "layers": 2}
    return training_recipe(section)


@pytest.mark.parametrize("name", PUBLISHED)
def test_objectives_are_the_published_ones(name):
    """Stages replace the adversarial term's start; WF-VAE's code has one layer more than the default here."""
    stages, want = load_recipe(name).stages, PUBLISHED[name]
    adversarial = replace(want.adversarial, start=0, layers=4 if name == "wfvae" else 3)
    assert stages[-2].objective == replace(want, adversarial=adversarial if name == "wfvae" else None)
    terms = {**want.terms, "lpips_sum": 0.1} if name == "wfvae" else want.terms  # section 4.1, stage III
    assert stages[-1].objective == replace(want, terms=terms, adversarial=adversarial)


def test_steps_rates_and_clips_are_the_published_ones():
    lean, flow = load_recipe("leanvae"), load_recipe("wfvae")
    assert [stage.steps for stage in lean.stages] == [600_000, 100_000]
    assert [(s.learning_rate, s.final_learning_rate, s.warm_up) for s in lean.stages] == [
        (5e-5, 1e-5, 5000),
        (1e-5, 1e-5, 0),
    ]
    assert (lean.optimizer.name, lean.optimizer.betas, lean.optimizer.clip) == ("adam", (0.5, 0.9), 1.0)
    assert [(s.groups[0].frames, s.groups[0].batch * s.batches) for s in lean.stages] == [(17, 40)] * 2
    assert [stage.steps for stage in flow.stages] == [800_000, 200_000, 200_000]
    assert (
        {stage.learning_rate for stage in flow.stages} == {stage.final_learning_rate for stage in flow.stages} == {1e-5}
    )
    assert [(s.groups[0].frames, s.groups[0].batch * s.batches) for s in flow.stages] == [(25, 8), (49, 8), (49, 8)]
    assert (flow.optimizer.name, flow.optimizer.weight_decay, flow.ema) == ("adamw", 1e-4, 0.999)


def run(recipe, folder):
    """Weights by published key, and the logged values of all steps."""
    logged = []
    weights = train(recipe, SyntheticSource(0), folder, loaders=0, on_step=lambda step, values: logged.append(values))
    (file,) = weights.glob("*.safetensors")
    return load_file(file), logged


def check(recipe, initial, weights, logged):
    """Every step had its terms, parameters changed, and the network that encodes loads them."""
    for stage, values in zip(recipe.stages, logged, strict=True):
        adversarial = {"gan", "gan_weight", "hinge"} if stage.objective.adversarial else set()
        assert {*stage.objective.terms, *adversarial, "loss"} <= set(values)
        assert ("gan" in values) == bool(adversarial)
    assert initial.keys() == weights.keys()
    assert any(not torch.equal(initial[key], weights[key]) for key in initial)
    ready = model.from_state_dict(recipe.network, recipe.config, weights)
    assert ready.encode(torch.zeros(1, 3, 5, 16, 16))[0].mean.isfinite().all()


@pytest.mark.parametrize("name", ["leanvae", "wfvae"])
def test_every_published_recipe_runs(name, tmp_path):
    recipe = shrunk(name)
    initial = trainable(recipe.network, recipe.config, seed=recipe.seed).state_dict()
    check(recipe, initial, *run(recipe, tmp_path))


def test_ivvae_starts_from_its_image_run(tmp_path):
    """Trained on images first, then inflated and trained on clips and images."""
    first = shrunk("ivvae-image")
    images, logged = run(first, tmp_path / "images")
    check(first, trainable(first.network, first.config, seed=first.seed).state_dict(), images, logged)
    recipe = shrunk("ivvae", start={"image": str(tmp_path / "images" / "weights")})
    check(recipe, inflate(recipe.config, images), *run(recipe, tmp_path / "clips"))
