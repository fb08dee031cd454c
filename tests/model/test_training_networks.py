"""Trainable networks by name of family or preset; the others are refused by name."""

from __future__ import annotations

import pytest
import torch

from model.ivvae.network import Network as IVVAENetwork
from model.leanvae.network import Network
from model.training.linear import fit_linear
from model.training.networks import FAMILIES, trainable
from model.wfvae.network import Network as WFVAENetwork

LEAN = {
    **{"latent_dim": 4, "embedding_dim": 24, "l_dim": 8, "h_dim": 16, "sep_num_layer": 1, "fusion_num_layer": 1},
    **{"ista_iter_num": 1, "ista_layer_num": 1},
}
WAVELET = {
    **{"latent_dim": 4, "base_channels": 4, "encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 4},
    **{"encoder_num_resblocks": 1, "decoder_num_resblocks": 1, "norm_type": "layernorm"},
}
NETWORKS = {
    "leanvae": (LEAN, Network),
    "leanvae-dim16": (LEAN, Network),
    "wfvae": (WAVELET, WFVAENetwork),
    "wfvae-s": (WAVELET, WFVAENetwork),
    "ivvae": ({"z_dim": 4, "dim": 2}, IVVAENetwork),
    "ivvae-z4-dim64": ({"dim": 2}, IVVAENetwork),  # an alias; the preset gives the rest
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_trainable_network_fulfils_the_interface(name):
    config, kind = NETWORKS[name]
    network = trainable(name, config, seed=3, recompute=True)
    assert type(network) is kind
    assert network.recompute
    assert {getattr(module, "recompute", False) for module in network.modules()} == {True}
    network.recompute = False
    assert not any(getattr(module, "recompute", False) for module in network.modules())
    assert config.items() <= network.config.items()
    again = trainable(name, network.config, seed=3).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in network.state_dict().items())
    video = torch.rand(1, 3, 5, 16, 16) - 0.5
    latent = (1, network.spec.latent_channels, 2, 2, 2)
    reconstruction, posterior, _ = network(video, torch.zeros(latent))
    assert reconstruction.shape == video.shape
    assert posterior.mean.shape == posterior.logvar.shape == latent
    assert any(network.last_layer() is parameter for parameter in network.parameters())
    (slope,) = torch.autograd.grad(reconstruction.square().sum(), network.last_layer())
    assert slope.abs().max() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_network_is_one_graph_with_recomputed_blocks(name):
    """Encodes only, since tracing IV-VAE takes seconds; `test_stepped_vae.py` traces both directions, without gradients. The backend
    `eager` compiles nothing.
    """
    torch._dynamo.reset()
    network = trainable(name, NETWORKS[name][0], recompute=True)
    clip = torch.rand(1, 3, 5, 16, 16) - 0.5
    compiled = torch.compile(lambda video: network.encode(video).mean, backend="eager", fullgraph=True, dynamic=False)
    mean = compiled(clip)
    assert mean.requires_grad
    assert torch.equal(mean, network.encode(clip).mean)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=f"cannot be trained here; expected one of {', '.join(FAMILIES)}"):
        trainable("wan-2.1", {})
    with pytest.raises(ValueError, match="of family wfvae2, which cannot be trained"):
        trainable("wfvae2", {})
    with pytest.raises(ValueError, match="unknown network 'leanvea'"):
        trainable("leanvea", {})
    with pytest.raises(ValueError, match="base_channels must be a whole number"):
        trainable("wfvae-s", {"base_channels": 1.5})


def test_only_leanvae_starts_as_a_linear_autoencoder():
    linear = fit_linear([torch.rand(2, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5], 4)
    video = torch.rand(1, 3, 5, 16, 16) - 0.5
    with torch.no_grad():
        mean = trainable("leanvae", LEAN, linear=linear).encode(video).mean
    assert (mean - linear.encode(video)).abs().max() < 1e-4
    with pytest.raises(
        ValueError, match="only leanvae can start as a linear autoencoder, got ivvae-z4 of family ivvae"
    ):
        trainable("ivvae-z4", {"dim": 2}, linear=linear)
