"""LeanVAE in training: its linear start equals the linear autoencoder, and training improves it."""

from __future__ import annotations

import pytest
import torch

import model
from model.history import History
from model.leanvae.depthwise import causal_depthwise
from model.leanvae.network import Network
from model.training.linear import fit_linear
from model.training.networks import trainable

CONFIG = {
    **{"latent_dim": 6, "embedding_dim": 40, "l_dim": 16, "h_dim": 24, "sep_num_layer": 1, "fusion_num_layer": 2},
    **{"ista_iter_num": 2, "ista_layer_num": 2},
}


LATENT = (6, 3, 4, 6)  # of `moving_clips`


def noise(seed, count=1, frames=3):
    """Noise that a LeanVAE in training uses for the latents of `count` clips."""
    shape = (count, LATENT[0], frames, *LATENT[2:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moving_clips(count=6, frames=9, height=32, width=48, seed=0):
    """Drifting soft colours with little noise: blocks with a few strong components and many weak ones."""
    draw = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    clips = []
    for _ in range(count):
        turn, speed, phase = torch.rand(3, 3, 1, 1, 1, generator=draw) * 3
        time = torch.arange(frames)[None, :, None, None] * 0.2
        clip = 0.3 * torch.sin(turn * x + (2 - turn) * y + speed * time + 4 * phase)
        clips.append((clip + 0.02 * torch.randn(clip.shape, generator=draw))[None])
    return clips


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def clips():
    return moving_clips()


@pytest.fixture(scope="module")
def linear(clips):
    return fit_linear(clips, CONFIG["latent_dim"])


@pytest.fixture(scope="module")
def trained(clips, linear):
    """A few steps from the linear start, with the errors on the way."""
    network = trainable("leanvae", CONFIG, linear=linear)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    video, errors = torch.cat(clips[:2]), []
    for step in range(8):
        reconstruction, posterior, _ = network(video, noise(step, 2))
        loss = (reconstruction - video).abs().mean() + 1e-7 * posterior.logvar.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append((reconstruction - video).square().mean().item())
    return network, errors


def test_weights_load_as_the_network_that_encodes(trained, clips):
    network, _ = trained
    ready = model.from_state_dict("leanvae", network.config, network.state_dict())
    video = torch.cat(clips[:2])
    with torch.no_grad():
        mine = network.encode(video)
        theirs, _ = ready.encode(video, moments=True)
        assert (mine.mean - theirs.mean).abs().max() <= 1e-5 * max(1, mine.mean.abs().max())
        assert (mine.logvar - theirs.logvar).abs().max() <= 1e-4
        assert (network.decode(mine.mean) - ready.decode(mine.mean)[0]).abs().max() <= 1e-5
    assert list(network.state_dict()) == list(Network.empty(network.config).state_dict())


def test_an_image_is_coded_like_the_first_frame(trained, clips):
    network, _ = trained
    with torch.no_grad():
        whole, image = network.encode(clips[0]), network.encode(clips[0][:, :, :1])
        assert torch.allclose(whole.mean[:, :, :1], image.mean, atol=1e-5)
        assert network(clips[0][:, :, :1])[0].shape == (1, 3, 1, 32, 48)


def test_a_linear_start_equals_the_linear_autoencoder(clips, linear):
    network = trainable("leanvae", CONFIG, linear=linear)
    video = clips[0]
    with torch.no_grad():
        latent = linear.encode(video)
        reconstruction, posterior, _ = network(video)
        assert (posterior.mean - latent).abs().max() < 1e-4
        assert (reconstruction - linear.decode(latent)).abs().max() < 1e-5
        assert posterior.logvar.unique().tolist() == [-10.0]


def test_training_improves_on_the_linear_start(trained):
    errors = trained[1]
    assert errors[-1] < 0.7 * errors[0]
    assert max(errors) < 1.5 * errors[0]


def test_every_parameter_has_a_gradient(trained, clips):
    network, _ = trained
    network.zero_grad()
    reconstruction, posterior, _ = network(clips[0], noise(0))
    (reconstruction.square().sum() + posterior.mean.square().sum()).backward()
    silent = [key for key, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0]
    assert silent == []
    network.zero_grad()
    network(clips[0][:, :, :1], noise(0, frames=1))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # an image leaves zeros, not nothing


def test_gradients_are_those_of_the_formulas():
    """The whole network in float64, compared with finite differences along one random direction."""
    torch.manual_seed(5)  # one of many where no soft threshold is crossed within the difference
    network = trainable("leanvae", CONFIG).double()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    video = torch.rand(1, 3, 5, 16, 16, dtype=torch.float64) - 0.5
    directions = [torch.randn_like(parameter) for parameter in network.parameters()]

    def loss():
        reconstruction, posterior, _ = network(video)
        return (reconstruction - video).square().mean() + 1e-2 * (posterior.mean.square() + posterior.logvar).mean()

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(network.parameters(), directions, strict=True)).item()
    found = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, direction in zip(network.parameters(), directions, strict=True):
                parameter += step * direction
            found.append(loss().item())
    assert slope == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5)


def test_recomputed_layers_give_the_same_gradients(clips):
    grads = []
    for recompute in (False, True):
        network = trainable("leanvae", CONFIG, seed=3, recompute=recompute)
        network(clips[0], noise(0))[0].square().sum().backward()
        grads.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_latent_is_mean_plus_deviation_times_noise(trained, clips):
    network, _ = trained
    with torch.no_grad():
        posterior = network.encode(clips[0])
        latent = posterior.mean + (0.5 * posterior.logvar).exp() * noise(1)
        assert torch.equal(network(clips[0], noise(1))[0], network.decode(latent))
        assert torch.equal(network(clips[0])[0], network.decode(posterior.mean))
        assert not torch.equal(latent, posterior.mean)
    with pytest.raises(ValueError, match=r"latent's shape \(1, 6, 3, 4, 6\), got \(1, 6, 2, 4, 6\)"):
        network(clips[0], noise(1, frames=2))


def test_sixteen_bit_arithmetic_keeps_pixels_and_latents_exact(clips, linear):
    network = trainable("leanvae", CONFIG, linear=linear)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        reconstruction, posterior, _ = network(clips[0])
    assert reconstruction.dtype == posterior.mean.dtype == torch.float32
    assert (posterior.mean - linear.encode(clips[0])).abs().max() < 1e-4


def test_the_same_seed_gives_the_same_network():
    one, same, other = (trainable("leanvae", CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["latent_bottleneck.phi"], other["latent_bottleneck.phi"])


# ---- the linear autoencoder -----------------------------------------------------------------------------------------


def test_linear_latents_are_principal_components(clips, linear):
    video = torch.cat(clips).double()
    latent = linear.encode(video)[:, :, 1:].permute(0, 2, 3, 4, 1).reshape(-1, 6)
    assert latent.mean(0).abs().max() < 1e-9
    assert (torch.cov(latent.T, correction=0) - torch.eye(6, dtype=torch.float64)).abs().max() < 1e-9
    # no linear map of six numbers does better: the error is what the other components hold
    blocks = linear.video
    error = (linear.decode(linear.encode(video)) - video)[:, :, 1:].square().mean() * 768
    assert error.item() == pytest.approx(torch.linalg.eigvalsh(blocks.covariance)[:-6].sum().item(), rel=1e-9)


def test_a_frame_and_its_repetition_have_similar_latents(clips, linear):
    still = torch.cat(clips)[:, :, :1].expand(-1, -1, 5, -1, -1)
    image, video = linear.encode(still).unbind(2)
    assert torch.nn.functional.cosine_similarity(image.flatten(), video.flatten(), dim=0) > 0.8


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((1, 3, 8, 16, 16), 4, "4n\\+1 frames"),
        ((1, 3, 5, 16, 12), 4, "multiples of 8"),
        ((1, 3, 5, 8, 8), 4, "too few"),
        ((4, 3, 1, 16, 16), 4, "too few"),
        ((1, 3, 5, 16, 16), 193, "1..192"),
    ],
)
def test_invalid_clips_are_refused_for_fitting(shape, channels, message):
    with pytest.raises(ValueError, match=message):
        fit_linear([torch.zeros(shape)], channels)


def test_a_linear_start_that_does_not_fit_is_refused(linear):
    with pytest.raises(ValueError, match="6 channels and blocks of side 8, the network 4"):
        trainable("leanvae", {**CONFIG, "latent_dim": 4}, linear=linear)
    with pytest.raises(ValueError, match="at least latent_dim, got 4 and 36 for 6"):
        trainable("leanvae", {**CONFIG, "l_dim": 4, "h_dim": 36}, linear=linear)
    with pytest.raises(ValueError, match="embedding_dim must be"):
        trainable("leanvae", {**CONFIG, "l_dim": 15})


def test_constant_clips_give_a_finite_start():
    linear = fit_linear([torch.full((1, 3, 5, 32, 32), 0.25)], 6)
    with torch.no_grad():
        video, *_ = trainable("leanvae", CONFIG, linear=linear)(torch.full((1, 3, 5, 16, 16), 0.25))
    assert (video - 0.25).abs().max() < 1e-4


@pytest.mark.parametrize("conv2d", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_fast_convolution_has_the_librarys_gradients(rows, conv2d):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, rows, 5, 6, 8), (8, 1, 3, 3, 3), (8,))
    mine = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in mine]
    padded = torch.nn.functional.pad(theirs[0].permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
    want = torch.nn.functional.conv3d(padded, theirs[1], theirs[2], groups=8).permute(0, 2, 3, 4, 1)
    got = causal_depthwise(*mine, conv2d=conv2d)
    assert torch.allclose(got, want)
    history = History()
    first = causal_depthwise(mine[0][:, :1], *mine[1:], history, conv2d=conv2d)
    rest = [first]
    for row in range(1, rows):
        history = History(history.tensors())
        rest.append(causal_depthwise(mine[0][:, row : row + 1], *mine[1:], history, conv2d=conv2d))
    assert torch.allclose(torch.cat(rest, dim=1), want)
    weight = torch.randn(want.shape, generator=draw, dtype=torch.float64)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("conv2d", [False, True])
def test_the_convolution_is_float32_under_autocast(conv2d):
    x, weight, bias = torch.randn(1, 3, 4, 5, 8), torch.randn(8, 1, 3, 3, 3), torch.randn(8)
    want = causal_depthwise(x, weight, bias, conv2d=conv2d)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_depthwise(x, weight, bias, conv2d=conv2d), want)
        low = causal_depthwise(x.bfloat16(), weight, bias, History(), conv2d=conv2d)
    assert low.dtype == want.dtype == torch.float32
