"""Built-in recipes state what was published, and all of them run, reduced to tiny steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import model
from model.posterior import Posterior
from model.training.discriminators import DISCRIMINATORS
from model.training.inflation import inflate
from model.training.networks import trainable
from model.training.objective import Objective
from model.training.optimisation import learning_rate
from model.training.recipe import load_recipe, training_recipe
from model.training.trainer import train
from pipeline.synthetic_videos.source import SyntheticSource
from tests.model.waves import wave, wave_weights

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
    """A recipe with all its terms, stages and groups, small clips; LPIPS is replaced by a term without weights.

    One step per stage, two where steps alternate.
    """
    section = load_recipe(name).to_dict() | changes
    section |= {"config": NARROW[name], "precision": "float32", "log_every": 1}
    for stage in section["stages"]:
        adversarial = stage["objective"]["adversarial"]
        steps = 2 if adversarial and adversarial["alternate"] else 1
        stage |= {"steps": steps, "warm_up": 0, "decay_steps": None, "batches": 2}
        terms = stage["objective"]["terms"]
        lpips = [key for key in terms if key.startswith("lpips")]
        stage["objective"]["terms"] = {key: terms[key] for key in terms if key not in lpips} | {"pyramid": 1.0}
        for group in stage["groups"]:
            group |= {"frames": min(group["frames"], 5), "height": 32, "width": group["width"] // 8, "batch": 1}
        if adversarial:
            adversarial |= {"channels": 4, "layers": 2}
    return training_recipe(section)


def test_leanvae_is_its_published_training():
    """Numbers of scripts/train.sh, autoencoder_pl.py and gan_loss.py of westlake-repl/LeanVAE."""
    recipe = load_recipe("leanvae")
    first, second = recipe.stages
    assert (first.steps, second.steps) == (600_000, 100_000)  # discriminator_iter_start, and max_steps 700000
    terms = {"l1": 4.0, "haar_low": 4 * 0.05, "haar_high": 4 * 0.1, "lpips": 4.0, "kl": 1e-7}
    for stage in recipe.stages:
        assert stage.objective.terms == pytest.approx(terms)
        assert (stage.objective.perceptual_frames, stage.objective.perceptual_range) == ("group", (-0.5, 0.5))
        assert (stage.frame_interval, stage.batches) == (1, 8)
        assert [(g.frames, g.batch) for g in stage.groups] == [(17, 5)]
    assert first.objective.adversarial is None
    gan = second.objective.adversarial
    assert (gan.weight, gan.discriminator, gan.channels, gan.layers) == (0.2, "patch2d", 64, 3)
    assert (gan.generator, gan.lecam, gan.lecam_decay) == ("non_saturating", 0.005, 0.999)
    assert (gan.adaptive, gan.alternate, gan.dropout, gan.start) == (False, False, 0.0, 0)
    # timm's CosineLRScheduler with t_initial 700000 - 600000, warmup_t 5000, lr_min 1e-5: flat from step 100k on
    rates = {step: learning_rate(first, step) for step in (2499, 4999, 50_000, 100_000, 200_000, 599_999)}
    assert [rates[2499], rates[4999]] == pytest.approx([2.5e-5, 5e-5])
    assert rates[50_000] == pytest.approx(
        3.0e-5, rel=0.06
    )  # theirs counts the cosine from step 0, ours from the end of warm-up
    assert [rates[100_000], rates[200_000], rates[599_999]] == pytest.approx([1e-5] * 3)
    assert {learning_rate(second, step) for step in (0, 99_999)} == {second.discriminator_learning_rate} == {1e-5}
    for optimizer in (recipe.optimizer, recipe.discriminator_optimizer):
        assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adam", (0.5, 0.9), 0.0)
        assert optimizer.clip == 1.0
    assert (recipe.precision, recipe.ema) == ("float32", None)


def test_wfvae_is_its_published_training():
    """Numbers of section 4.1, table 2, train_ddp.py with examples/train_ddp.sh, and perceptual_loss.py of PKU-YuanGroup/WF-VAE."""
    recipe = load_recipe("wfvae")
    assert [stage.steps for stage in recipe.stages] == [800_000, 200_000, 200_000]
    assert [stage.groups[0].frames for stage in recipe.stages] == [25, 49, 49]
    assert [stage.frame_interval for stage in recipe.stages] == [1, 2, 2]  # "reduce the FPS by half"
    assert [stage.new_discriminator for stage in recipe.stages] == [False, True, True]
    assert [stage.objective.terms["lpips_sum"] for stage in recipe.stages] == [1.0, 1.0, 0.1]
    for stage in recipe.stages:
        assert {**stage.objective.terms, "lpips_sum": 1.0} == {
            "frame_sum": 1.0,
            "lpips_sum": 1.0,
            "kl": 1e-6,
            "wl": 0.1,
        }
        assert (stage.objective.perceptual_frames, stage.objective.perceptual_range) == ("all", (-1.0, 1.0))
        assert {learning_rate(stage, step) for step in (0, stage.steps - 1)} == {1e-5}
        assert [(g.height, g.width, g.batch * stage.batches) for g in stage.groups] == [(256, 256, 8)]
        gan = stage.objective.adversarial
        assert (gan.weight, gan.discriminator, gan.channels, gan.layers) == (0.5, "patch3d", 64, 4)
        assert (gan.generator, gan.adaptive, gan.ceiling, gan.dropout) == ("hinge", True, 1e6, 0.3)
        assert (gan.alternate, gan.start, gan.lecam) == (True, 0, 0.0)
    for optimizer in (recipe.optimizer, recipe.discriminator_optimizer):
        assert (optimizer.name, optimizer.betas, optimizer.weight_decay) == ("adamw", (0.9, 0.999), 1e-4)
        assert optimizer.clip is None
    assert (recipe.precision, recipe.ema) == ("bfloat16", 0.999)


def test_ivvae_is_its_published_objective():
    """Supplement 3.1, equation 5: 256^2 / (h w) times MAE + LPIPS + 3e-6 KL + 0.8 GAN, sums; GAN in the last stage only."""
    recipe = load_recipe("ivvae")
    *earlier, last = recipe.stages
    for stage in recipe.stages:
        assert stage.objective.terms == {"frame_sum": 1.0, "lpips_sum": 1.0, "kl": 3e-6}
        assert stage.objective.reference_area == 256 * 256
    assert {stage.objective.adversarial for stage in earlier} == {None}
    gan = last.objective.adversarial
    assert (gan.weight, gan.generator, gan.adaptive) == (0.8, "hinge_sum", False)


class Squares(torch.nn.Module):
    """Stands for LPIPS, whose weights are not here: the mean squared difference of an image."""

    def forward(self, x, y):
        return (x - y).square().mean((1, 2, 3))


def published_objective(stage, value_range):
    """Objective with weights of the discriminator from sines, as the authors' code was given them, and without dropout."""

    def scaled(key, values):
        if values.ndim > 1:
            return values * 0.7 / values[0].numel() ** 0.5
        return 1 + 0.1 * values if key.endswith("weight") else 0.1 * values

    recipe = replace(stage.objective, adversarial=replace(stage.objective.adversarial, dropout=0.0))
    objective = Objective(recipe, value_range, lpips=Squares())
    shapes = {key: value.shape for key, value in objective.discriminator.named_parameters()}
    network = DISCRIMINATORS[recipe.adversarial.discriminator](recipe.adversarial.channels, recipe.adversarial.layers)
    network.load_state_dict(wave_weights(shapes, scaled), strict=False)
    objective.load_state_dict({"network": network.state_dict(), "lecam": objective.lecam.state_dict()})
    return objective


def latent():
    return Posterior(*(wave((2, 4, 2, 4, 4), phase).float() for phase in (2, 3)))


def drawn(phase, size=1.0):
    return (wave((2, 3, 5, 32, 32), phase) * size / 2).float()


def test_wfvaes_losses_are_those_of_its_code():
    """Numbers of LPIPSWithDiscriminator3D in perceptual_loss.py on the same clips and weights."""
    objective = published_objective(load_recipe("wfvae").stages[0], (-1.0, 1.0))
    original, layer = drawn(0), torch.nn.Parameter((wave((3, 3, 1, 1, 1), 1) / 4).float())
    reconstruction = torch.nn.functional.conv3d(original, layer)
    bands = [wave((2, 12, 2, 4, 4), phase).float() for phase in range(4)]
    coefficients = (bands[::2], bands[1::2])  # of the encoder, of the decoder
    loss, values = objective.generator_loss(
        original, reconstruction, latent(), coefficients, step=0, generator=torch.Generator(), last_layer=layer
    )
    found = {name: value.item() for name, value in values.items()}
    assert found["frame_sum"] + found["lpips_sum"] == pytest.approx(2307.444091796875, rel=1e-5)
    assert found["kl"] == pytest.approx(99.10965728759766, rel=1e-5)
    assert found["wl"] == pytest.approx(879.0855712890625, rel=1e-5)
    assert found["gan"] == pytest.approx(0.36008596420288086, rel=1e-4)
    assert found["gan_weight"] == pytest.approx(2040.3687744140625, rel=1e-4)
    assert loss.item() == pytest.approx(3130.060791015625, rel=1e-4)
    loss, _ = objective.discriminator_loss(original, reconstruction.detach(), step=1)
    assert loss.item() == pytest.approx(0.9946484565734863, rel=1e-5)


def test_leanvaes_adversarial_losses_are_those_of_its_code():
    """Numbers of AdversarialLoss in gan_loss.py on the same frames and weights, in two steps of one process."""
    objective = published_objective(load_recipe("leanvae").stages[1], (-0.5, 0.5))
    original, reconstruction = drawn(0, 0.5), drawn(1, 0.5)
    for discriminator, real, fake in (
        (0.9958621263504028, -0.00028233915567398097, -0.00029916921257972743),
        (0.995861291885376, -0.0005643959721922879, -0.0005980392559468751),
    ):
        _, values = objective.generator_loss(original, reconstruction, latent(), step=0, generator=torch.Generator())
        assert 0.2 * values["gan"].item() == pytest.approx(0.17120258510112762, rel=1e-5)
        loss, values = objective.discriminator_loss(original, reconstruction, step=0)
        assert loss.item() == pytest.approx(discriminator, rel=1e-6)
        objective.end_step(torch.stack([values["logits_real"], values["logits_fake"]]))
        assert (objective.lecam.real.item(), objective.lecam.fake.item()) == pytest.approx((real, fake), rel=1e-4)


def run(recipe, folder):
    """Weights by published key, and the logged values of all steps."""
    logged = []
    weights = train(recipe, SyntheticSource(0), folder, loaders=0, on_step=lambda step, values: logged.append(values))
    (file,) = weights.glob("*.safetensors")
    return load_file(file), logged


def check(recipe, initial, weights, logged):
    """Every step had its terms, parameters changed, and the network that encodes loads them."""
    steps = iter(logged)
    for stage in recipe.stages:
        values = dict[str, float]()
        for _ in range(stage.steps):
            values |= next(steps)
        adversarial = {"gan", "gan_weight", "hinge"} if stage.objective.adversarial else set()
        assert {*stage.objective.terms, *adversarial, "loss"} <= set(values)
        assert ("gan" in values) == bool(adversarial)
    assert not list(steps)
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
