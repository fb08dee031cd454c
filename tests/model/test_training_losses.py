"""Every loss term on hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch

from model.posterior import Posterior
from model.training import losses


def one_pixel(frames, *, at, value, side=2):
    """Two clips that differ by `value` in one element."""
    x = torch.zeros(1, 3, frames, side, side)
    y = x.clone()
    y[at] = value
    return x, y


def test_pixel_terms_are_means():
    x, y = one_pixel(1, at=(0, 0, 0, 0, 0), value=3.0)
    assert losses.pixel_l1(x, y).item() == pytest.approx(3 / 12)
    assert losses.pixel_mse(x, y).item() == pytest.approx(9 / 12)


def test_haar_bands_of_one_pixel_in_frame_0():
    # one pixel of a 2x2 cell enters every band with +1 or -1: low |3| of 3 numbers, high 3 * |3| of 9
    low, high = losses.haar_l1(*one_pixel(1, at=(0, 1, 0, 1, 0), value=3.0))
    assert low.item() == pytest.approx(3 / 3)
    assert high.item() == pytest.approx(9 / 9)


def test_haar_bands_of_one_pixel_in_a_group():
    # 4 frames of 2x2 are two cells: low 2 * 3 numbers, high 2 * 21, one cell hit
    low, high = losses.haar_l1(*one_pixel(5, at=(0, 0, 3, 0, 1), value=2.0))
    assert low.item() == pytest.approx(2 / 6)
    assert high.item() == pytest.approx(7 * 2 / 42)


def test_haar_bands_of_a_constant_difference_are_low_only():
    x = torch.zeros(2, 3, 5, 4, 4)
    low, high = losses.haar_l1(x, x + 0.5)
    assert low.item() == pytest.approx(4 * 0.5 + 8 * 0.5)  # sums over a cell of frame 0, and of a cell after it
    assert high.item() == 0.0


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 4), (1, 3, 5, 4, 3)])
def test_haar_bands_need_odd_frames_and_even_sides(shape):
    with pytest.raises(ValueError, match="odd number of frames and even sides"):
        losses.haar_l1(torch.zeros(shape), torch.zeros(shape))


def test_frame_sum_is_per_frame():
    x = torch.zeros(2, 3, 5, 2, 2)
    assert losses.frame_sum(x, x + 0.5).item() == pytest.approx(0.5 * 12)


def test_kl_of_known_gaussians():
    mean, logvar = torch.zeros(2, 1, 1, 1, 2), torch.zeros(2, 1, 1, 1, 2)
    assert losses.kl_divergence(Posterior(mean, logvar)).item() == 0.0
    mean[0, 0, 0, 0, 0] = 2.0  # 2^2 / 2
    logvar[1, 0, 0, 0, 1] = math.log(4.0)  # (4 - 1 - ln 4) / 2
    want = (2.0 + 0.5 * (3 - math.log(4))) / 2
    assert losses.kl_divergence(Posterior(mean, logvar)).item() == pytest.approx(want)
    with pytest.raises(ValueError, match="moments=True"):
        losses.kl_divergence(Posterior(mean))


def test_energy_flow_sums_levels_per_video():
    encoded = [torch.zeros(2, 12, 1, 2, 2), torch.zeros(2, 24, 1, 1, 1)]
    decoded = [torch.full_like(encoded[0], 0.5), torch.ones_like(encoded[1])]
    assert losses.energy_flow(encoded, decoded).item() == pytest.approx(12 * 4 * 0.5 + 24)
    for wrong in ([encoded[0]], [decoded[1], decoded[0]]):
        with pytest.raises(ValueError, match="must match"):
            losses.energy_flow(encoded, wrong)


def test_hinge_is_zero_beyond_the_margin():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.5])
    assert losses.hinge_discriminator(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.5 / 2))
    assert losses.hinge_generator(fake).item() == pytest.approx(1.25)
    assert losses.hinge_generator_sum(fake, 5).item() == pytest.approx(2.5 / 5)


def test_non_saturating_generator_takes_the_mean_of_a_frame_first():
    logits = torch.tensor([[[[2.0, -2.0]]], [[[1.0, 3.0]]]])
    want = (math.log(2) + math.log(1 + math.exp(-2))) / 2
    assert losses.non_saturating_generator(logits).item() == pytest.approx(want)


def test_lecam_compares_with_running_means():
    lecam = losses.LeCam(decay=0.9)
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -1.0])
    # means of zero, updated by these logits: 0.2 and -0.1
    assert lecam(real, fake).item() == pytest.approx((1.1**2 + 3.1**2) / 2 + 1.2**2)
    assert lecam.real.item() == 0.0
    lecam.update(real.mean(), fake.mean())
    assert (lecam.real.item(), lecam.fake.item()) == pytest.approx((0.2, -0.1))
    assert lecam(real, fake).item() == pytest.approx((1.19**2 + 3.19**2) / 2 + 1.38**2, rel=1e-5)
    lecam.update(real.mean(), fake.mean())
    assert lecam.real.item() == pytest.approx(0.2 + 0.9 * 0.2)
    assert lecam.fake.item() == pytest.approx(-0.1 - 0.9 * 0.1)
    assert lecam(torch.tensor([-5.0]), torch.tensor([5.0])).item() == 0.0  # only the sure side is held back


def test_lecam_means_are_saved_in_checkpoints():
    lecam, again = losses.LeCam(), losses.LeCam()
    lecam.update(torch.tensor(4.0), torch.tensor(-2.0))
    again.load_state_dict(lecam.state_dict())
    assert (again.real, again.fake) == (lecam.real, lecam.fake)
    with pytest.raises(ValueError, match="decay"):
        losses.LeCam(1.0)


def test_adaptive_weight_is_the_ratio_of_gradients():
    layer = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = losses.adaptive_weight((2 * layer).sum(), (0.5 * layer).sum(), layer, ceiling=1e4)
    assert weight.item() == pytest.approx(4.0, rel=1e-5)
    assert not weight.requires_grad
    assert losses.adaptive_weight(layer.sum(), (0.0 * layer).sum(), layer, ceiling=1e6).item() == pytest.approx(1e6)
    assert losses.adaptive_weight(layer.sum(), (0.0 * layer).sum(), layer, ceiling=5.0).item() == 5.0
