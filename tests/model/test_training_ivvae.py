"""The trainable IV-VAE equals the published network, starts from an image VAE, and its published objective can be minimised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import model
from model.training import inflation
from model.training.networks import trainable
from model.training.objective import Objective
from model.training.recipe import load_recipe
from tests.model.conftest import Golden

SMALL = {"z_dim": 4, "dim": 2}
TIME = ("time_conv", "decoder.head.2.conv_3d")  # what a single frame has no use for


def pixels(*shape, seed=0):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def close(got, want, bound=1e-5):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= bound * max(1.0, want.abs().max())


@pytest.mark.parametrize("clip", ["A", "B", "img"])
def test_output_equals_the_published_network(clip):
    golden = Golden("ivvae-tiny")
    network = trainable("ivvae", golden.config)
    network.load_state_dict(golden.weights)
    raw = golden[f"out/{clip}_latent"] / golden.config["scale_factor"] + golden.config["shift_factor"]
    with torch.no_grad():
        posterior = network.encode(golden[f"in/{clip}"])
        golden.check(f"out/{clip}_mu", posterior.mean)
        golden.check(f"out/{clip}_logvar", posterior.logvar)
        golden.check(f"out/{clip}_dec", network.decode(raw))


def test_weights_load_as_the_network_that_encodes():
    network = trainable("ivvae", {**SMALL, "dim_mult": [1, 2, 3, 3], "dim": 4}, seed=5)
    ready = model.from_state_dict("ivvae", network.config, network.state_dict())
    for video in (pixels(2, 3, 9, 16, 24), pixels(1, 3, 1, 16, 16)):
        with torch.no_grad():
            mine, (theirs, _) = network.encode(video), ready.encode(video, moments=True)
            close(mine.mean, theirs.mean)
            close(mine.logvar, theirs.logvar)
            close(network.decode(mine.mean), ready.decode(mine.mean)[0])


@pytest.mark.parametrize("frames", [1, 9])
def test_every_parameter_has_a_gradient(frames):
    """For images too: zero if a single frame does not use a layer, and only then."""
    network = trainable("ivvae", SMALL)
    reconstruction, posterior, coefficients = network(pixels(2, 3, frames, 16, 16))
    assert coefficients is None
    (reconstruction.square().sum() + posterior.mean.square().sum() + posterior.logvar.sum()).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    silent = {key for key, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0}
    timely = {key for key, _ in network.named_parameters() if any(name in key for name in TIME)}
    assert silent == (timely if frames == 1 else set())
    assert len(timely) == 10


def test_gradients_are_those_of_the_formulas():
    """The whole network in float64, compared with finite differences along one random direction."""
    torch.manual_seed(0)
    network = trainable("ivvae", SMALL).double()
    video = pixels(1, 3, 9, 16, 16).double()
    directions = [torch.randn_like(parameter) for parameter in network.parameters()]

    def loss():
        reconstruction, posterior, _ = network(video)
        return (reconstruction - video).square().mean() + (posterior.mean.square() + posterior.logvar).mean()

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(network.parameters(), directions, strict=True)).item()
    found = []
    with torch.no_grad():
        for step in (1e-8, -2e-8):  # norms over two channels bend sharply
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter += step * direction
            found.append(loss().item())
    assert slope == pytest.approx((found[0] - found[1]) / 2e-8, rel=1e-5)


def test_training_reduces_the_published_objective():
    """Ten steps of Adam on the objective without the adversarial term; LPIPS would need weights."""
    published = load_recipe("ivvae").stages[0].objective
    recipe = replace(published, terms={**published.terms, "lpips_sum": 0.0})
    objective, network = Objective(recipe, (-1.0, 1.0)), trainable("ivvae", SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    y, x = torch.meshgrid(torch.linspace(0, 6, 32), torch.linspace(0, 9, 32), indexing="ij")
    video = torch.stack([torch.sin(x + y * c + 0.4 * t) for c in range(3) for t in range(5)]).view(1, 3, 5, 32, 32)
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(10):
        reconstruction, posterior, _ = network(video, torch.randn((1, 4, 2, 4, 4), generator=draw))
        loss, values = objective.generator_loss(video, reconstruction, posterior, step=0, generator=draw)
        assert set(values) == {"frame_sum", "kl", "loss"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert max(losses) < 1.1 * losses[0]


def kept(network, video):
    """Gradients of a pass, and the bytes it kept for them besides parameters."""
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    sizes = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reconstruction = network(video).video_BCTHW
    reconstruction.square().sum().backward()
    return {key: p.grad for key, p in network.named_parameters() if p.grad is not None}, sum(sizes.values())


def test_recomputed_blocks_keep_less_and_give_the_same_gradients():
    video = pixels(1, 3, 5, 32, 32)
    (grads, size), (again, less) = (
        kept(trainable("ivvae", SMALL, seed=3, recompute=on), video) for on in (False, True)
    )
    assert less < 0.6 * size
    assert grads.keys() == again.keys()
    assert all(torch.equal(grads[key], again[key]) for key in grads)


def test_sixteen_bit_arithmetic_keeps_latents_float32():
    network, video = trainable("ivvae", SMALL), pixels(1, 3, 5, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(video)
        low.video_BCTHW.sum().backward()
    full = network(video)
    assert low.video_BCTHW.dtype == low.posterior.mean.dtype == low.posterior.logvar.dtype == torch.float32
    error = (low.posterior.mean - full.posterior.mean).abs().max() / full.posterior.mean.abs().max()
    assert 1e-5 < error < 3e-2
    assert {parameter.grad.dtype for parameter in network.parameters() if parameter.grad is not None} == {torch.float32}


def test_initial_weights_depend_on_the_seed_only_and_give_activations_of_order_one():
    torch.manual_seed(1)
    one, same, other = (trainable("ivvae", SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))  # untouched
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.conv_2d.weight"], other["conv1.conv_2d.weight"])
    assert one["encoder.head.0.gamma"].unique().tolist() == [1.0]
    with torch.no_grad():
        video, posterior, _ = trainable("ivvae", SMALL)(pixels(1, 3, 9, 32, 32))
    assert 0.02 < posterior.mean.std() < 2
    assert 0.02 < video.std() < 2


def test_invalid_configurations_and_inputs_are_refused():
    with pytest.raises(ValueError, match="z_dim must be even"):
        trainable("ivvae", {**SMALL, "z_dim": 3})
    network = trainable("ivvae", SMALL)
    with pytest.raises(ValueError, match=r"4n\+1 frames"):
        network(pixels(1, 3, 6, 16, 16))
    with pytest.raises(ValueError, match=r"expected latents of shape \(B, 4, t, h, w\)"):
        network.decode(torch.zeros(1, 8, 2, 2, 2))
    with pytest.raises(ValueError, match=r"noise of the latent's shape \(1, 4, 2, 2, 2\), got \(4, 2, 2, 2\)"):
        network(pixels(1, 3, 5, 16, 16), torch.zeros(4, 2, 2, 2))


# ---- from an image VAE ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """An IV-VAE as if trained on images, and the IV-VAE inflated from it; float64."""
    images = trainable("ivvae", SMALL, seed=7).double()
    videos = trainable("ivvae", SMALL).double()
    videos.load_state_dict(inflation.inflate(SMALL, images.state_dict()))
    return images, videos


def test_inflation_keeps_what_was_learned_on_images(learned):
    images, videos = learned
    picture = pixels(2, 3, 1, 16, 24)
    with torch.no_grad():
        mean, want = videos.encode(picture).mean, images.encode(picture).mean
        close(mean, want, 1e-10)
        close(videos.decode(want), images.decode(want), 1e-10)


def test_an_inflated_network_repeats_key_frames(learned):
    """Every frame of a group is the image VAE's reconstruction of the group's first frame."""
    images, videos = learned
    clip = pixels(1, 3, 9, 16, 16, seed=1)
    with torch.no_grad():
        drawn = images(clip[0, :, [0, 1, 5]].transpose(0, 1)[:, :, None]).video_BCTHW[:, :, 0]
        close(videos(clip).video_BCTHW[0].transpose(0, 1), drawn[[0, *[1] * 4, *[2] * 4]], 1e-10)


def test_every_parameter_of_an_inflated_network_gets_gradients(learned):
    """Zeros of inflated kernels get gradients too."""
    network = trainable("ivvae", SMALL)
    network.load_state_dict(learned[1].state_dict())
    network(pixels(1, 3, 9, 16, 16))[0].square().sum().backward()
    kernels = {key: p for key, p in network.named_parameters() if key.endswith("conv_3d.weight") and p.shape[2] == 3}
    assert len(kernels) == 14 + 18
    taps = {key: kernel.grad.abs().amax(dim=(0, 1, 3, 4)) for key, kernel in kernels.items()}
    assert [key for key, tap in taps.items() if not tap.min() > 0] == []


def test_image_part_refuses_other_networks():
    weights = trainable("ivvae", SMALL).state_dict()
    del weights["conv2.conv_3d.bias"]
    with pytest.raises(ValueError, match=r"take the image part of: 1 missing: conv2\.conv_3d\.bias"):
        inflation.inflate(SMALL, weights)
