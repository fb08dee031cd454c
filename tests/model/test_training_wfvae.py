"""The trainable WF-VAE equals the published network in every configuration, and its published objective can be minimised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import model
from model.training.networks import trainable
from model.training.objective import Objective
from model.training.objective_recipe import ObjectiveRecipe
from model.training.recipe import load_recipe
from model.wfvae.random_weights import is_filter
from tests.model.conftest import Golden

FIXTURES = ("wfvae-tiny", "wfvae888-tiny")
SMALL = {
    **{"latent_dim": 4, "base_channels": 4, "encoder_energy_flow_hidden_size": 6, "decoder_energy_flow_hidden_size": 6},
    **{
        "encoder_num_resblocks": 1,
        "decoder_num_resblocks": 1,
        "norm_type": "layernorm",
        "t_interpolation": "trilinear",
    },
}
GROUPNORM = {
    **{"latent_dim": 4, "base_channels": 32, "encoder_energy_flow_hidden_size": 32, "norm_type": "groupnorm"},
    **{"decoder_energy_flow_hidden_size": 32, "encoder_num_resblocks": 1, "decoder_num_resblocks": 1},
}
EIGHTFOLD = {
    **{"l1_dowmsample_block": "Spatial2xTime2x3DDownsample", "l1_downsample_wavelet": "HaarWaveletTransform3D"},
    **{"l1_upsample_block": "Spatial2xTime2x3DUpsample", "l1_upsample_wavelet": "InverseHaarWaveletTransform3D"},
}
everywhere = pytest.mark.parametrize("name", FIXTURES)


def pixels(*shape, seed=0):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def noise(like, seed=0):
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def published(name):
    golden = Golden(name)
    network = trainable("wfvae", golden.config)
    network.load_state_dict(golden.weights)
    return golden, network


@everywhere
def test_coefficients_of_encoder_and_decoder_equal_the_published_ones(name):
    golden, network = published(name)
    with torch.no_grad():
        video, posterior, coefficients = network(golden["in/A"])
    golden.check("out/A_dec", video)  # the mean's, where there is no noise
    for key, got in zip(("enc_l1", "enc_l2"), coefficients.encoder, strict=True):
        golden.check(f"mid/A_{key}", got)
    for key, got in zip(("dec_l1", "dec_l2"), coefficients.decoder, strict=True):
        golden.check(f"mid/A_{key}", got)
    assert posterior.mean.shape == golden["out/A_mean"].shape


@pytest.mark.parametrize(
    ("config", "frames"),
    [
        ({**SMALL, "t_interpolation": "nearest"}, 9),
        ({**SMALL, "use_attention": False, "connect_res_layer_num": 2, "encoder_num_resblocks": 2}, 5),
        ({**SMALL, "attention_type": "AttnBlock3D"}, 9),
        ({**SMALL, **EIGHTFOLD, "t_interpolation": "nearest"}, 17),
        (GROUPNORM, 5),
    ],
    ids=["nearest", "no attention", "older attention", "8x8x8", "groupnorm"],
)
def test_weights_load_as_the_network_that_encodes(config, frames):
    network = trainable("wfvae", config, seed=5)
    ready = model.from_state_dict("wfvae", network.config, network.state_dict())
    for video in (pixels(2, 3, frames, 16, 24), pixels(1, 3, 1, 16, 16)):
        with torch.no_grad():
            mine, (theirs, _) = network.encode(video), ready.encode(video, moments=True)
            for got, want in (
                (mine.mean, theirs.mean),
                (mine.logvar, theirs.logvar),
                (network.decode(mine.mean), ready.decode(mine.mean)[0]),
            ):
                assert (got - want).abs().max() <= 2e-5 * max(1.0, want.abs().max())


@pytest.mark.parametrize("frames", [1, 5])
def test_every_parameter_has_a_gradient_and_filters_are_buffers(frames):
    network = trainable("wfvae", SMALL)
    video = pixels(1, 3, frames, 16, 16)
    reconstruction, posterior, _ = network(video, noise(network.encode(video).mean))
    (reconstruction.square().sum() + posterior.mean.square().sum()).backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []
    trained = {key for key, _ in network.named_parameters()}
    assert {key for key in network.state_dict() if key not in trained} == set(filter(is_filter, network.state_dict()))


def test_gradients_are_those_of_the_formulas():
    """The whole network in float64, compared with finite differences along one random direction, energy flow included."""
    torch.manual_seed(0)
    network = trainable("wfvae", SMALL).double()
    video = pixels(1, 3, 5, 16, 16).double()
    directions = [torch.randn_like(parameter) for parameter in network.parameters()]

    def loss():
        reconstruction, posterior, flow = network(video)
        bands = sum((a - b).square().mean() for a, b in zip(flow.encoder, flow.decoder, strict=True))
        return (reconstruction - video).square().mean() + bands + (posterior.mean.square() + posterior.logvar).mean()

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(network.parameters(), directions, strict=True)).item()
    found = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter += step * direction
            found.append(loss().item())
    assert slope == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5)


def test_training_reduces_the_published_objective():
    """Ten steps of Adam on stage I's objective; LPIPS would need weights, and a discriminator a trainer."""
    published = load_recipe("wfvae").stages[0].objective
    recipe = replace(published, terms={**published.terms, "lpips_sum": 0.0}, adversarial=None)
    assert isinstance(recipe, ObjectiveRecipe)
    objective, network = Objective(recipe, (-1.0, 1.0)), trainable("wfvae", SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    y, x = torch.meshgrid(torch.linspace(0, 6, 32), torch.linspace(0, 9, 32), indexing="ij")
    video = torch.stack([torch.sin(x + y * c + 0.4 * t) for c in range(3) for t in range(5)]).view(1, 3, 5, 32, 32)
    draw, losses = torch.Generator().manual_seed(0), []
    for _ in range(10):
        reconstruction, posterior, coefficients = network(video, torch.randn((1, 4, 2, 4, 4), generator=draw))
        loss, values = objective.generator_loss(video, reconstruction, posterior, coefficients, step=0, generator=draw)
        assert set(values) == {"frame_sum", "kl", "wl", "loss"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
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
        kept(trainable("wfvae", SMALL, seed=3, recompute=on), video) for on in (False, True)
    )
    assert less < 0.6 * size
    assert grads.keys() == again.keys()
    assert all(torch.equal(grads[key], again[key]) for key in grads)


def test_sixteen_bit_arithmetic_keeps_latents_and_coefficients_float32():
    network, video = trainable("wfvae", SMALL), pixels(1, 3, 5, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(video)
        low.video_BCTHW.sum().backward()
    full = network(video)
    tensors = (low.video_BCTHW, low.posterior.mean, low.posterior.logvar, *low.coefficients.decoder)
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(low.coefficients.encoder, full.coefficients.encoder, strict=True))
    error = (low.posterior.mean - full.posterior.mean).abs().max() / full.posterior.mean.abs().max()
    assert 1e-5 < error < 3e-2
    assert {parameter.grad.dtype for parameter in network.parameters() if parameter.grad is not None} == {torch.float32}


def test_initial_weights_depend_on_the_seed_only_and_give_activations_of_order_one():
    torch.manual_seed(1)
    one, same, other = (trainable("wfvae", SMALL, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(1)))  # untouched
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["encoder.conv_out.conv.weight"], other["encoder.conv_out.conv.weight"])
    kernel = one["decoder.up2.0.conv1.conv.weight"]  # uniform within +-fan_in^-0.5
    assert kernel.abs().max() <= kernel[0].numel() ** -0.5
    assert kernel.std().item() == pytest.approx((3 * kernel[0].numel()) ** -0.5, rel=0.05)
    with torch.no_grad():
        video, posterior, _ = trainable("wfvae", SMALL)(pixels(1, 3, 9, 32, 32))
    assert 0.02 < posterior.mean.std() < 2
    assert 0.02 < video.std() < 2


def test_invalid_configurations_and_inputs_are_refused():
    with pytest.raises(ValueError, match="base_channels must be a whole number"):
        trainable("wfvae", {**SMALL, "base_channels": 0})
    network = trainable("wfvae", SMALL)
    with pytest.raises(ValueError, match=r"4n\+1 frames"):
        network(pixels(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        network(pixels(1, 3, 5, 12, 16))
    with pytest.raises(ValueError, match=r"noise of the latent's shape \(1, 4, 2, 2, 2\), got \(1, 4, 1, 2, 2\)"):
        network(pixels(1, 3, 5, 16, 16), torch.zeros(1, 4, 1, 2, 2))
