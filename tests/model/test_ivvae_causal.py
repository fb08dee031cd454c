"""Causal rules of IV-VAE: content of a state, frames that a group sees, and whole chunks in one step as on other devices.

Random partitions, batches and interleavings of every network are in `test_lossless.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import model
from model.ivvae.fast.stream_state import stripes
from model.losslessness import decode_chunked, encode_chunked
from tests.model.conftest import Golden

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("ivvae-tiny")


def network(golden: Golden, dtype: str = "float32") -> Any:
    return model.from_state_dict("ivvae", golden.config, golden.weights, dtype=dtype)


@pytest.fixture(scope="module")
def vae(golden: Golden) -> Any:
    return network(golden)


def pixels(seed: int, batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, 3, frames, height, width), generator=generator) * 2 - 1


def test_every_partition_gives_the_same_bits(vae):
    """All eight partitions of four latents, both directions, a batch of two, frames of several stripes."""
    video = pixels(0, 2, 9, 24, 520)
    assert len(stripes(24, 520, vae.device)) > 1
    whole = vae.encode(video)[0].mean
    alone = torch.cat([vae.encode(video[b : b + 1])[0].mean for b in (0, 1)])
    assert torch.equal(alone, whole)
    small = pixels(1, 1, 13, 16, 16)
    latent, frames = vae.encode(small)[0].mean, vae.decode(vae.encode(small)[0].mean)[0]
    for inner in itertools.chain.from_iterable(itertools.combinations(range(1, 4), n) for n in range(4)):
        ends = [*inner, 4]
        assert torch.equal(encode_chunked(vae, small, ends), latent), ends
        assert torch.equal(decode_chunked(vae, latent, ends), frames), ends
    assert torch.equal(encode_chunked(vae, video, [1, 2, 3]), whole)


def test_a_latent_depends_on_its_own_group_and_earlier_frames(vae):
    """Latent k depends on frames 4k-3 .. 4k and earlier ones, never on a later one."""
    video = pixels(2, 1, 13, 16, 16)
    before = vae.encode(video)[0].mean
    for frame in range(13):
        changed = video.clone()
        changed[:, :, frame] *= -1
        moved = [
            not torch.equal(a, b) for a, b in zip(before.unbind(2), vae.encode(changed)[0].mean.unbind(2), strict=True)
        ]
        row = -(-frame // 4)
        assert moved[:row] == [False] * row
        assert moved[row], frame
    assert torch.equal(vae.encode(video[:, :, :9])[0].mean, before[:, :, :3])


def test_frames_of_a_latent_depend_on_no_later_latent(vae):
    latent = vae.encode(pixels(3, 1, 13, 16, 16))[0].mean
    video = vae.decode(latent)[0]
    for row in range(4):
        changed = latent.clone()
        changed[:, :, row] *= -1
        other = vae.decode(changed)[0]
        first = 4 * row - 3 if row else 0
        assert torch.equal(other[:, :, :first], video[:, :, :first])
        for frame in range(first, min(first + 4, 13) if row else 1):
            assert not torch.equal(other[:, :, frame], video[:, :, frame])


def test_a_later_chunk_of_one_frame_is_refused(vae):
    """The first frame is special because nothing precedes it; a later chunk is never treated as a first one."""
    video = pixels(4, 1, 5, 16, 16)
    image, state = vae.encode(video[:, :, :1])
    with pytest.raises(ValueError, match="4n frames in every chunk after the first, got 1"):
        vae.encode(video[:, :, 1:2], state)
    assert torch.equal(image.mean, vae.encode(video)[0].mean[:, :, :1])
    # a single latent later on stands for four frames, not for one
    latent = vae.encode(video)[0].mean
    first, state = vae.decode(latent[:, :, :1], last=False)
    second, _ = vae.decode(latent[:, :, 1:], state)
    assert (first.shape[2], second.shape[2]) == (1, 4)


def test_a_state_holds_the_last_frame_of_every_convolution(vae):
    """13 in the encoder; 18 in the decoder, whose head needs no past."""
    video = pixels(5, 2, 9, 16, 24)
    posterior, encoding = vae.encode(video)
    _, decoding = vae.decode(posterior.mean)
    assert (len(encoding.tensors), len(decoding.tensors)) == (13, 18)
    assert encoding.tensors[0].shape == (2, 16, 24, 3)
    assert torch.equal(encoding.tensors[0], video[:, :, -1].permute(0, 2, 3, 1))
    for state in (encoding, decoding):
        for tensor in state.tensors:
            assert tensor.shape[0] == 2
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert encoding.nbytes == vae.encode(video[:, :, :1])[1].nbytes


def test_a_state_can_be_used_twice(vae):
    video = pixels(6, 1, 9, 16, 16)
    _, state = vae.encode(video[:, :, :5])
    before = [tensor.clone() for tensor in state.tensors]
    first, second = (vae.encode(video[:, :, 5:], state)[0].mean for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_chunk_in_one_step_is_equal_up_to_rounding(golden, dtype):
    """As on other devices: all groups and videos in one step, with both ways to compute a pair."""
    vae = network(golden, dtype)
    video = pixels(7, 2, 17, 16, 24)
    stepped, state = vae.encode(video, moments=True)
    decoded, _ = vae.decode(stepped.mean)
    vae.stepwise = False
    at_once, other = vae.encode(video, moments=True)
    bound = {"float32": 1e-5, "bfloat16": 3e-2, "float64": 1e-13}[dtype]

    def agree(got: torch.Tensor, want: torch.Tensor) -> None:
        assert got.shape == want.shape
        assert (got.double() - want.double()).abs().max() <= bound * max(1.0, want.abs().max().item())

    agree(at_once.mean, stepped.mean)
    agree(at_once.logvar, stepped.logvar)
    agree(vae.decode(stepped.mean)[0], decoded)
    agree(decode_chunked(vae, stepped.mean, [1, 3, 5]), decoded)
    agree(decode_chunked(vae, stepped.mean, [2, 5]), decoded)
    agree(encode_chunked(vae, video, [2, 4, 5]), stepped.mean)
    for a, b in zip(state.tensors, other.tensors, strict=True):
        assert (a.double() - b.double()).abs().max() <= 3 * bound * a.abs().max()


@pytest.mark.parametrize("stepwise", [True, False])
def test_both_ways_to_compute_pairs_agree(golden, monkeypatch, stepwise):
    """Pairs as computed on other devices, in float32 to compare with the published vectors; groups and videos in one step."""
    monkeypatch.setattr("model.ivvae.fast.pair_conv.filters_minimally", lambda device, dtype: False)
    vae = network(golden)
    vae.stepwise = stepwise
    latent = golden["out/A_latent"] / golden.config["scale_factor"] + golden.config["shift_factor"]
    twice = vae.encode(golden["in/A"].repeat(2, 1, 1, 1, 1))[0].mean
    video = vae.decode(latent.repeat(2, 1, 1, 1, 1))[0]
    for b in (0, 1):
        golden.check("out/A_mu", twice[b : b + 1])
        golden.check("out/A_dec", video[b : b + 1])
    golden.check("out/B_mu", encode_chunked(vae, golden["in/B"], [1, 2]))
