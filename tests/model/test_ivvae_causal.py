"""Causal rules of IV-VAE: content of a state, frames that a group sees, several groups and videos in one step as on other devices.

Random partitions, batches and interleavings of every network are in `test_lossless.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import model
from model.definition import definition
from model.history import History
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
    """All eight partitions of four latents, both directions."""
    small = pixels(1, 1, 13, 16, 16)
    latent, frames = vae.encode(small)[0].mean, vae.decode(vae.encode(small)[0].mean)[0]
    for inner in itertools.chain.from_iterable(itertools.combinations(range(1, 4), n) for n in range(4)):
        ends = [*inner, 4]
        assert torch.equal(encode_chunked(vae, small, ends), latent), ends
        assert torch.equal(decode_chunked(vae, latent, ends), frames), ends


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


def test_a_state_holds_one_frame_of_every_convolution(vae):
    """What each 3x3x3 convolution adds to the next frame: 13 in the encoder, 19 in the decoder."""
    video = pixels(5, 2, 9, 16, 24)
    posterior, encoding = vae.encode(video)
    _, decoding = vae.decode(posterior.mean)
    assert (len(encoding.tensors), len(decoding.tensors)) == (13, 19)
    conv = vae.network.encoder.conv1.conv_3d
    first = F.conv2d(video[:, :, -1], conv.weight[:, :, 0], padding=1)
    assert torch.allclose(encoding.tensors[0][:, 0].permute(0, 3, 1, 2), first, atol=1e-6)
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


@pytest.mark.parametrize("ends", [[1, 3, 5], [2, 5], [5]])
@torch.no_grad()
def test_several_groups_of_several_videos_in_one_step_give_the_same(golden, ends):
    """As on other devices. Float64, so that only an error of order is more than rounding."""
    network = definition("ivvae", golden.config, golden.weights).double()
    video = pixels(7, 2, 17, 16, 24).double()
    whole, encoded, decoded, pasts = network.encode(video).mean, [], [], [None, None]
    for start, end in zip([0, *ends], ends, strict=False):
        encoding, decoding = (History(past) for past in pasts)
        encoded.append(network.encode(video[:, :, max(0, 4 * start - 3) : 4 * end - 3], encoding).mean)
        decoded.append(network.decode(whole[:, :, start:end], decoding))
        pasts = [encoding.tensors(), decoding.tensors()]
    for parts, want in ((encoded, whole), (decoded, network.decode(whole))):
        got = torch.cat(parts, dim=2)
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-12
