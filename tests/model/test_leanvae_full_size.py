"""LeanVAE at the published sizes with random weights: parameter counts, activations, steps against the whole video, constant memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import model
from model.definition import definition
from model.leanvae.network import Network
from model.registry import complete


@pytest.fixture(scope="module")
def full():
    return model.load("leanvae-dim16", untrained=0)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 0.5


@pytest.mark.parametrize(("name", "total"), [("leanvae-dim4", 39_767_496), ("leanvae-dim16", 39_785_940)])
def test_parameter_counts_are_the_published_ones(name, total):
    network = Network.empty(complete(name))
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in network.named_children()}
    assert sum(count.values()) == total
    assert (count["encoder"], count["decoder"]) == (11_432_704, 11_432_640)


def test_untrained_activations_are_of_order_one(full):
    posterior, _ = full.encode(pixels(1, 3, 5, 64, 64), moments=True)
    video, _ = full.decode(posterior.mean)
    assert 0.5 < posterior.mean.std() < 4
    assert 0.5 < posterior.logvar.std() < 4
    assert 0.05 < video.std() < 0.5


def test_steps_agree_with_the_whole_video_and_chunks_are_exact(full):
    video = pixels(1, 3, 5, 264, 272)
    whole = full.encode(video)[0].mean
    with torch.no_grad():
        at_once = definition("leanvae", full.config, full.network.state_dict()).encode(video).mean
    assert (whole - at_once).abs().max() <= 1e-5 * at_once.abs().max()
    first, state = full.encode(video[:, :, :1])
    rest, _ = full.encode(video[:, :, 1:], state)
    assert torch.equal(torch.cat([first.mean, rest.mean], dim=2), whole)
    both, _ = full.encode(torch.cat([video.flip(2)[:, :, :1], video[:, :, :1]]))
    assert torch.equal(both.mean[1:], whole[:, :, :1])


def test_full_size_decode_is_exact_in_chunks(full):
    torch.set_num_threads(2)
    latent = full.encode(pixels(1, 3, 9, 40, 48))[0].mean
    whole = full.decode(latent)[0]
    first, state = full.decode(latent[:, :, :2], last=False)
    rest, _ = full.decode(latent[:, :, 2:], state)
    assert whole.shape == (1, 3, 9, 40, 48)
    assert torch.equal(torch.cat([first, rest], dim=2), whole)


MEMORY = """
import resource, torch, model
torch.set_num_threads(1)
vae = model.load("leanvae-dim4", untrained=0)
peaks, state = [], None
for chunk in range(12):
    video = torch.rand(1, 3, 16 + (chunk == 0), 96, 96) - 0.5
    state = vae.encode(video, state)[1]
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(peaks[3], peaks[-1])
"""


def test_memory_of_a_chunked_encode_does_not_grow():
    answer = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, timeout=300)
    short, long = map(float, answer.stdout.split())
    assert long - short < 4, f"{short:.0f} MB after 65 frames, {long:.0f} MB after 193"
