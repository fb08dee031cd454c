"""Discriminators are those of the papers: sizes, shapes, initial weights."""

from __future__ import annotations

import pytest
import torch

from model.training.discriminators import DISCRIMINATORS, PatchDiscriminator2d, PatchDiscriminator3d


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_sizes_are_those_of_the_papers():
    # 3*64*16+64, 64*128*16+2*128, 128*256*16+2*256, 256*512*16+2*512, 512*16+1
    assert parameters(PatchDiscriminator2d()) == 3136 + 131328 + 524800 + 2098176 + 8193 == 2_765_633
    # the same with kernels of 27
    assert parameters(PatchDiscriminator3d()) == 5248 + 221440 + 885248 + 3539968 + 13825 == 4_665_729


def test_a_logit_of_single_frames_sees_70_pixels():
    network = PatchDiscriminator2d(4).eval()
    frame = torch.zeros(1, 3, 96, 96, requires_grad=True)
    logits = network(frame)
    assert logits.shape == (1, 1, 10, 10)
    logits[0, 0, 5, 5].backward()
    rows = frame.grad.abs().sum((0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_clips_are_downsampled_twice_in_time():
    assert PatchDiscriminator3d(4)(torch.zeros(2, 3, 17, 32, 48)).shape == (2, 1, 5, 4, 6)
    assert PatchDiscriminator3d(4)(torch.zeros(2, 3, 1, 32, 32)).shape == (2, 1, 1, 4, 4)  # images too


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_initial_weights_are_those_of_pix2pix(name):
    network = DISCRIMINATORS[name](32)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)
            assert 0.01 < module.weight.std().item() < 0.03
            assert not module.bias.any()
    same, other = DISCRIMINATORS[name](32), DISCRIMINATORS[name](32, seed=1)
    key = "layers.0.weight"
    assert torch.equal(network.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(network.state_dict()[key], other.state_dict()[key])


def test_dropout_follows_every_norm_and_draws_from_the_global_generator():
    """As in WF-VAE's code: 0.3 after each of the four layers with a norm of its four-layer discriminator."""
    network = PatchDiscriminator3d(4, 4, dropout=0.3)
    kinds = [type(module).__name__ for module in network.layers]
    assert kinds == ["Conv3d", "LeakyReLU", *["Conv3d", "BatchNorm3d", "LeakyReLU", "Dropout"] * 4, "Conv3d"]
    assert {module.p for module in network.layers if isinstance(module, torch.nn.Dropout)} == {0.3}
    clip, logits = torch.randn(1, 3, 5, 32, 32), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(network(clip))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_each_refuses_the_others_input():
    with pytest.raises(ValueError, match="expected frames"):
        PatchDiscriminator2d(4)(torch.zeros(1, 3, 1, 32, 32))
    with pytest.raises(ValueError, match="expected clips"):
        PatchDiscriminator3d(4)(torch.zeros(1, 3, 32, 32))
