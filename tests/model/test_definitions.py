"""The networks as published, in ways that golden vectors do not cover: weights of 16 bits, no memory, compiled for changing lengths."""

import pytest
import torch

from model import registry
from model.definition import DEFINED, definition

CONFIGS = {
    "leanvae": {
        **{"latent_dim": 4, "embedding_dim": 24, "l_dim": 8, "h_dim": 16, "sep_num_layer": 1, "fusion_num_layer": 1},
        **{"ista_iter_num": 1, "ista_layer_num": 1},
    },
    "wfvae": {
        **{
            "latent_dim": 4,
            "base_channels": 4,
            "encoder_energy_flow_hidden_size": 4,
            "decoder_energy_flow_hidden_size": 4,
        },
        **{"encoder_num_resblocks": 1, "decoder_num_resblocks": 1, "norm_type": "layernorm"},
    },
    "wfvae2": {
        **{"base_channels": [32, 32], "encoder_energy_flow_size": 32, "decoder_energy_flow_size": 32, "latent_dim": 4},
        **{"layer_type": ["thw"], "layer_res_type": ["ResnetBlock3D"], "norm_type": "groupnorm"},
    },
    "ivvae": {"z_dim": 4, "dim": 8},  # of two channels the RMS norm would amplify rounding
}


def random_network(family):
    module = __import__(registry.family_of(family).module, fromlist=["random_weights"])
    config = registry.complete(family, CONFIGS[family])
    return definition(family, config, module.random_weights(config, 0))


def video(frames, dtype=torch.float32):
    return (torch.rand(1, 3, frames, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5).to(dtype)


def error(found, exact):
    """Root mean square, of that of the exact values."""
    return ((found - exact).square().mean() / exact.square().mean()).sqrt()


@pytest.mark.parametrize("family", DEFINED)
@torch.no_grad()
def test_weights_of_16_bits_give_latents_and_videos_close_to_those_of_32(family):
    network = random_network(family)
    exact = network.encode(video(5)).mean
    decoded = network.decode(exact)
    rough = random_network(family).to(torch.bfloat16)
    found = rough.encode(video(5, torch.bfloat16)).mean.float()
    assert 1e-4 < error(found, exact) < 0.1
    assert error(rough.decode(exact.to(torch.bfloat16)).float(), decoded) < 0.1


@pytest.mark.parametrize("family", DEFINED)
@torch.no_grad()
def test_a_video_of_fewer_bits_gives_the_latents_of_its_values(family):
    network, rounded = random_network(family), video(5, torch.bfloat16)
    assert torch.equal(network.encode(rounded).mean, network.encode(rounded.float()).mean)


@pytest.mark.parametrize("family", DEFINED)
@torch.no_grad()
def test_shapes_are_known_without_memory(family):
    network = random_network(family).to("meta")
    mean = network.encode(torch.empty(2, 3, 9, 16, 16, device="meta")).mean
    assert mean.is_meta
    assert network.decode(mean).shape == (2, 3, 9, 16, 16)


def test_lengths_may_change_in_a_compiled_encode():
    """As in a training with `compile`: the second length makes the number of frames a symbol."""
    network = random_network("leanvae").eval().requires_grad_(False)
    compiled = torch.compile(lambda given: network.encode(given).mean, backend="eager", fullgraph=True)
    for frames in (9, 5):
        assert torch.equal(compiled(video(frames)), network.encode(video(frames)).mean)
