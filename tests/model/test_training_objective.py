"""The objective: weights, first step of the adversarial term, gradients, refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.metrics.perceptual import LPIPS, pyramid_distance
from model.posterior import Posterior
from model.training.objective import Objective, frozen, perceptual_frame_indices
from model.training.objective_recipe import AdversarialRecipe, ObjectiveRecipe, objective_recipe, objective_section
from model.training.recipe import load_recipe

RANGE = (-0.5, 0.5)
LEANVAE, WFVAE, IVVAE = (load_recipe(name).stages[-1].objective for name in ("leanvae", "wfvae", "ivvae"))
GAN = AdversarialRecipe(weight=0.2, channels=4, start=10, lecam=0.005)


class Brightness(torch.nn.Module):
    """Replaces LPIPS by the mean difference; its thirteen convolutions are tested elsewhere."""

    def forward(self, x, y):
        assert x.shape == y.shape
        assert x.shape[1] == 3
        return (x - y).abs().mean((1, 2, 3))


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def clips(frames=5, side=32):
    x = torch.rand(2, 3, frames, side, side, generator=draw()) - 0.5
    y = torch.nn.Parameter((x + 0.1 * torch.randn(x.shape, generator=draw(1))).detach())
    posterior = Posterior(torch.full((2, 4, 2, 4, 4), 2.0), torch.zeros(2, 4, 2, 4, 4))
    return x, y, posterior


def test_leanvae_is_the_published_sum():
    x, _, posterior = clips()
    y = x + 0.25  # so that every term is known
    objective = Objective(replace(LEANVAE, adversarial=None), RANGE, lpips=Brightness())
    loss, values = objective.generator_loss(x, y, posterior, step=0, generator=draw())
    # LPIPS gets pixels from -0.5 to 0.5, as in their code
    want = {"l1": 0.25, "haar_low": 0.25 * 12, "haar_high": 0.0, "lpips": 0.25, "kl": 2.0 * 4 * 32, "loss": loss.item()}
    assert values.keys() == want.keys()
    assert {name: value.item() for name, value in values.items()} == pytest.approx(want, abs=1e-6)
    assert loss.item() == pytest.approx(4 * 0.25 + 4 * 0.05 * 3.0 + 4 * 0.25 + 1e-7 * 256, rel=1e-6)


def test_wfvae_is_the_published_sum():
    x, y, posterior = clips()
    layer, pattern = torch.nn.Parameter(torch.tensor(0.25)), (y - x).detach().sign()
    objective = Objective(WFVAE, RANGE, lpips=Brightness())
    coefficients = ([torch.zeros(2, 12, 1, 2, 2)], [torch.ones(2, 12, 1, 2, 2)])
    loss, values = objective.generator_loss(
        x, x + layer * pattern, posterior, coefficients, step=0, generator=draw(), last_layer=layer
    )
    numbers = 3 * 32 * 32
    assert values["frame_sum"].item() == pytest.approx(0.25 * numbers, rel=1e-5)
    assert values["lpips_sum"].item() == pytest.approx(0.5 * numbers, rel=1e-5)
    assert values["wl"].item() == 48.0
    assert 100 < values["gan_weight"].item() < 0.5 * 1e6  # sums over pixels are that much steeper
    # stage III: LPIPS counts a tenth
    want = (0.25 + 0.1 * 0.5) * numbers + 1e-6 * 256 + 0.1 * 48 + (values["gan_weight"] * values["gan"]).item()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="energy-flow coefficients"):
        objective.generator_loss(x, x + layer * pattern, posterior, step=0, generator=draw(), last_layer=layer)
    with pytest.raises(ValueError, match="needs last_layer"):
        objective.generator_loss(x, x + layer * pattern, posterior, coefficients, step=0, generator=draw())


def test_an_adaptive_weight_balances_gradients_of_reconstruction_and_gan():
    x, y, posterior = clips()
    layer, pattern = torch.nn.Parameter(torch.tensor(0.25)), (y - x).detach().sign()
    adversarial = AdversarialRecipe(weight=0.5, channels=4, generator="hinge", adaptive=True)
    objective = Objective(ObjectiveRecipe({"l1": 3.0, "kl": 1.0}, adversarial=adversarial), RANGE)
    posterior = Posterior(layer * posterior.mean, posterior.logvar)  # its gradient is not to count
    call = {"step": 0, "generator": draw(), "last_layer": layer}
    loss, values = objective.generator_loss(x, x + layer * pattern, posterior, **call)
    (of_loss,) = torch.autograd.grad(loss, layer)
    of_kl = 4.0 * 0.25 * 128
    assert abs(of_loss.item() - of_kl - 3.0) == pytest.approx(0.5 * 3.0, rel=1e-3)
    assert not values["gan_weight"].requires_grad
    low = ObjectiveRecipe({"l1": 3.0}, adversarial=replace(adversarial, ceiling=1e-3))
    _, values = Objective(low, RANGE).generator_loss(x, x + layer * pattern, posterior, **call)
    assert values["gan_weight"].item() == pytest.approx(0.5 * 1e-3)


def test_ivvae_is_normalised_to_256_squared():
    x, _, posterior = clips()
    objective = Objective(IVVAE, RANGE, lpips=Brightness())
    loss, values = objective.generator_loss(x, x + 0.25, posterior, step=0, generator=draw())
    want = 0.75 * 3 * 32 * 32 + 3e-6 * 256 + 0.8 * values["gan"].item()
    assert loss.item() == pytest.approx(64 * want, rel=1e-5)  # 256^2 is 64 times 32^2
    objective.discriminator.eval()
    with torch.no_grad():
        logits = objective.discriminator(x + 0.25)
    (gan,) = {objective.generator_loss(x, x + 0.25, posterior, step=0, generator=draw())[1]["gan"].item()}
    assert gan == pytest.approx(-logits.sum().item() / 10, rel=1e-5)  # a sum over an image: two clips of five


def test_steps_alternate_between_the_networks():
    recipe = replace(GAN, alternate=True, start=3)
    objective = Objective(ObjectiveRecipe({"l1": 1.0}, adversarial=recipe), RANGE)
    assert [step for step in range(8) if objective.trains_discriminator(step)] == [3, 5, 7]
    assert [step for step in range(8) if objective.trains_autoencoder(step)] == [0, 1, 2, 4, 6]
    both = Objective(ObjectiveRecipe({"l1": 1.0}, adversarial=replace(GAN, start=3)), RANGE)
    assert [step for step in range(8) if both.trains_discriminator(step)] == [3, 4, 5, 6, 7]
    assert all(both.trains_autoencoder(step) for step in range(8))


def test_the_adversarial_term_starts_at_its_step():
    x, y, posterior = clips()
    objective = Objective(ObjectiveRecipe({"l1": 1.0}, adversarial=GAN), RANGE)
    before, values = objective.generator_loss(x, y, posterior, step=9, generator=draw())
    assert not objective.adversarial_at(9)
    assert "gan" not in values
    after, values = objective.generator_loss(x, y, posterior, step=10, generator=draw())
    assert objective.adversarial_at(10)
    assert after.item() == pytest.approx(before.item() + 0.2 * values["gan"].item(), rel=1e-6)
    assert values["gan"].item() == pytest.approx(math.log(2), abs=0.2)  # a discriminator that knows nothing
    with pytest.raises(ValueError, match="starts at step 10, got step 9"):
        objective.discriminator_loss(x, y, step=9)
    with pytest.raises(ValueError, match="starts never"):
        Objective(ObjectiveRecipe({"l1": 1.0}), RANGE).discriminator_loss(x, y, step=9)


def test_each_network_gets_gradients_from_its_own_loss_only():
    x, y, posterior = clips()
    objective = Objective(ObjectiveRecipe({"l1": 1.0}, adversarial=GAN), RANGE)
    loss, _ = objective.generator_loss(x, y, posterior, step=10, generator=draw())
    loss.backward()
    assert y.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in objective.discriminator.parameters())
    y.grad = None
    loss, values = objective.discriminator_loss(x, y, step=10)
    loss.backward()
    assert y.grad is None
    assert all(parameter.grad is not None for parameter in objective.discriminator.parameters())
    assert loss.item() == pytest.approx(values["hinge"].item() + 0.005 * values["lecam"].item(), rel=1e-6)
    assert objective.lecam.real.item() == 0.0, "a step's micro-batches all compare with the means before it"
    objective.end_step(torch.stack([values["logits_real"], values["logits_fake"]]))
    assert objective.lecam.real.item() == pytest.approx(0.001 * values["logits_real"].item(), rel=1e-5)
    assert objective.lecam.fake.item() == pytest.approx(0.001 * values["logits_fake"].item(), rel=1e-5)


@pytest.mark.parametrize("name", ["patch2d", "patch3d"])
def test_the_discriminator_learns_to_separate_real_from_fake(name):
    x, _, _ = clips()
    y = torch.zeros_like(x)
    recipe = ObjectiveRecipe({"l1": 1.0}, adversarial=AdversarialRecipe(weight=1.0, discriminator=name, channels=4))
    objective = Objective(recipe, RANGE)
    optimizer = torch.optim.Adam(objective.discriminator.parameters(), 1e-2)
    for _ in range(8):
        loss, values = objective.discriminator_loss(x, y, step=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert "lecam" not in values
    assert values["logits_real"] > values["logits_fake"] + 0.5
    assert loss.item() < 0.9


def test_a_given_wrapper_of_the_discriminator_is_used():
    class Twice(torch.nn.Module):
        def forward(self, frames):
            return 2 * torch.ones(frames.shape[0], 1, 2, 2) * (frames.mean() > 0.05)

    x = torch.full((1, 3, 1, 32, 32), 0.1)
    objective = Objective(ObjectiveRecipe({"l1": 1.0}, adversarial=GAN), RANGE)
    loss, _ = objective.discriminator_loss(x, x - 0.1, step=10, discriminator=Twice())
    assert loss.item() == pytest.approx(0.5 + 0.005 * 4, rel=1e-2)


def test_state_can_be_restored():
    x, y, _ = clips()
    recipe = ObjectiveRecipe({"l1": 1.0}, adversarial=GAN)
    objective, again = Objective(recipe, RANGE, seed=1), Objective(recipe, RANGE, seed=2)
    objective.discriminator_loss(x, y, step=10)
    objective.end_step(torch.tensor([2.0, -1.0]))
    again.load_state_dict(objective.state_dict())
    objective.discriminator.eval()
    again.discriminator.eval()
    assert objective.discriminator_loss(x, y, step=10)[0].item() == again.discriminator_loss(x, y, step=10)[0].item()
    plain = Objective(ObjectiveRecipe({"l1": 1.0}), RANGE)
    assert plain.state_dict() == {}
    with pytest.raises(ValueError, match="same recipe"):
        plain.load_state_dict(objective.state_dict())


def test_lpips_compares_frame_0_and_one_group():
    seen = [tuple(row) for row in perceptual_frame_indices(200, 13, draw()).tolist()]
    assert set(seen) == {(0, 1, 2, 3, 4), (0, 5, 6, 7, 8), (0, 9, 10, 11, 12)}
    assert perceptual_frame_indices(2, 1, draw()).tolist() == [[0], [0]]
    x = torch.zeros(1, 3, 9, 32, 32)
    y = x.clone()
    y[:, :, 5:] = 0.25  # the second group only
    objective = Objective(ObjectiveRecipe({"lpips": 1.0}, "group"), RANGE, lpips=Brightness())
    found = {objective.generator_loss(x, y, None, step=0, generator=draw(seed))[0].item() for seed in range(8)}
    assert sorted(found) == pytest.approx([0.0, 0.5 * 4 / 5])
    everything = Objective(ObjectiveRecipe({"lpips": 1.0}), RANGE, lpips=Brightness())
    assert everything.generator_loss(x, y, None, step=0, generator=draw())[0].item() == pytest.approx(0.5 * 4 / 9)


def test_the_pyramid_term_needs_no_lpips():
    x, y, posterior = clips(frames=1)
    objective = Objective(ObjectiveRecipe({"pyramid": 2.0}), RANGE)
    loss, values = objective.generator_loss(x, y, posterior, step=0, generator=draw())
    assert loss.item() == pytest.approx(2 * pyramid_distance(x[:, :, 0], y[:, :, 0]).mean().item(), rel=1e-6)
    assert set(values) == {"pyramid", "loss"}


@pytest.mark.parametrize("recipe", [LEANVAE, WFVAE, IVVAE])
def test_missing_lpips_is_refused(recipe):
    with pytest.raises(ValueError, match=r"load_lpips.*pyramid needs no weights"):
        Objective(recipe, RANGE)
    assert Objective(recipe, RANGE, lpips=LPIPS()).to("cpu").discriminator is not None


def test_frozen_restores_requires_grad():
    network = torch.nn.Linear(2, 2)
    network.bias.requires_grad_(False)
    with frozen(network):
        assert not network.weight.requires_grad
    assert network.weight.requires_grad
    assert not network.bias.requires_grad


def test_a_section_becomes_a_recipe():
    section = {
        "terms": {"l1": 4.0, "haar_low": 0.2, "haar_high": 0.4, "lpips": 4, "kl": 1e-7},
        "perceptual_frames": "group",
        "perceptual_range": [-0.5, 0.5],
        "adversarial": {"weight": 0.2, "lecam": 0.005},
    }
    assert objective_recipe(section) == LEANVAE
    assert objective_recipe(objective_section(WFVAE)) == WFVAE
    assert objective_recipe({"terms": {"l1": 1}}) == ObjectiveRecipe({"l1": 1})


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"terms": {"l2": 1.0}}, "unknown term 'l2'; known: l1, mse, haar_low"),
        ({"terms": {"l1": -1.0}}, "terms.l1 must be a number of at least 0"),
        ({"terms": {"l1": "much"}}, "terms.l1 must be a number"),
        ({"terms": {"l1": 0.0}}, "at least one term"),
        ({"terms": ["l1"]}, "must map names to weights"),
        ({"weights": {"l1": 1.0}}, "unknown keys weights; known: terms, perceptual_frames"),
        ({"terms": {"l1": 1.0}, "perceptual_frames": "some"}, "known: all, group"),
        ({"terms": {"l1": 1.0}, "reference_area": 0}, "reference_area"),
        ({"terms": {"l1": 1.0}, "adversarial": {"start": 3}}, "needs a weight"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "begin": 3}}, "unknown keys begin; known: weight"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "start": -1}}, "adversarial.start"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "discriminator": "big"}}, "known: patch2d, patch3d"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "generator": "wgan"}}, "known: non_saturating, hinge"),
        ({"terms": {"l1": 1.0}, "adversarial": 0.2}, "must be a mapping"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "dropout": 1}}, r"dropout must be in \[0, 1\), got 1"),
        ({"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "ceiling": 0}}, "ceiling must be above 0"),
        (
            {"terms": {"l1": 1.0}, "adversarial": {"weight": 1.0, "alternate": 1}},
            "alternate must be true or false, got 1",
        ),
        ({"terms": {"l1": 1.0}, "perceptual_range": [1, 0]}, r"two increasing numbers, .*got \(1, 0\)"),
    ],
)
def test_impossible_sections_are_refused(section, message):
    with pytest.raises(ValueError, match=message):
        objective_recipe(section)


def test_videos_that_differ_in_shape_are_refused():
    objective = Objective(ObjectiveRecipe({"l1": 1.0}), RANGE)
    with pytest.raises(ValueError, match="same shape"):
        objective.generator_loss(
            torch.zeros(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 16), None, step=0, generator=draw()
        )
