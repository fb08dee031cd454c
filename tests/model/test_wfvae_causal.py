"""Time in WF-VAE: frames a decoder holds back, states at the end of a video, interpolation, steps of a GPU.

Agreement of any chunks, batches and interleavings is tested for every network in `test_lossless.py`.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import model
from model import stepped_vae
from model.history import WHOLE
from model.wfvae.layers import Upsample, normaliser
from tests.model.conftest import Golden

pytestmark = pytest.mark.filterwarnings("error")


@cache
def network(fixture, **changes):
    config = Golden(fixture).config
    return model.load("wfvae2" if "wfvae2" in fixture else "wfvae", config={**config, **changes}, untrained=1)


def pixels(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize(
    ("vae", "counts"),
    [
        (network("wfvae-tiny"), [1, 2, 4, 4, 6]),
        (network("wfvae-tiny", t_interpolation="nearest"), [1, 4, 4, 4, 4]),
        (network("wfvae888-tiny"), [1, 2, 8, 8, 14]),
        (network("wfvae888-tiny", t_interpolation="nearest"), [1, 8, 8, 8, 8]),
        (network("wfvae2-tiny"), [1, 2, 4, 4, 6]),
    ],
    ids=["4x", "4x nearest", "8x", "8x nearest", "second"],
)
def test_frames_are_returned_as_soon_as_they_are_final(vae, counts):
    stride = vae.spec.time_stride
    latent = vae.encode(pixels(1, 3, 4 * stride + 1, 16, 24))[0].mean
    frames, state = [], None
    for row in range(5):
        video, state = vae.decode(latent[:, :, row : row + 1], state, last=row == 4)
        frames.append(video)
    assert [video.shape[2] for video in frames] == counts
    assert torch.equal(torch.cat(frames, dim=2), vae.decode(latent)[0])


def test_each_latent_is_decoded_once():
    """No latent is decoded twice for look-ahead."""
    vae, seen = network("wfvae-tiny"), []
    latent = vae.encode(pixels(1, 3, 17, 16, 16))[0].mean
    with vae._running.decoder.conv_in.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[2])):
        state = None
        for row in range(5):
            _, state = vae.decode(latent[:, :, row : row + 1], state, last=row == 4)
    assert seen == [1] * 5


@pytest.mark.parametrize(
    ("interpolation", "want"),
    [("nearest", [0, 4, 4, 8, 8, 16, 16]), ("trilinear", [0, 4, 5, 7, 10, 14, 16])],
)
def test_frames_after_the_first_are_doubled_by_the_published_weights(interpolation, want):
    """A quarter of a neighbour and three quarters of the frame itself; frame 0 stays alone."""
    upsample = Upsample(1, over_time=True, interpolation=interpolation)
    frames = torch.tensor([0.0, 4.0, 8.0, 16.0]).view(1, 1, 4, 1, 1)
    assert upsample._doubled(frames, WHOLE).flatten().tolist() == want


def test_norms_of_groups_of_each_frame_do_not_mix_frames():
    x = torch.randn(2, 64, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + torch.arange(3.0).view(3, 1, 1)
    groups = x.unflatten(1, (32, 2))
    for each_frame, axes in ((True, (2, 4, 5)), (False, (2, 3, 4, 5))):
        mean, variance = groups.mean(axes, keepdim=True), groups.var(axes, keepdim=True, unbiased=False)
        want = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        assert torch.allclose(normaliser("groupnorm", 64, each_frame=each_frame)(x), want, atol=1e-5)


def test_a_state_after_the_last_latent_is_refused():
    vae = network("wfvae-tiny")
    latent = vae.encode(pixels(1, 3, 9, 16, 16))[0].mean
    _, state = vae.decode(latent)
    assert state.nbytes == 0
    with pytest.raises(ValueError, match=r"cannot be continued.*last=False"):
        vae.decode(latent, state)


def test_states_before_and_after_the_first_latent_do_not_stack():
    """One holds a frame back and the other does not; encoders have no such difference."""
    vae = network("wfvae-tiny")
    latent = vae.encode(pixels(1, 3, 9, 16, 16))[0].mean
    begun, going = (vae.decode(latent[:, :, :rows], last=False)[1] for rows in (1, 2))
    with pytest.raises(ValueError, match=r"cannot be stacked.*after the first latent"):
        vae.stack_states([begun, going])
    first, later = (vae.encode(pixels(1, 3, frames, 16, 16))[1] for frames in (1, 9))
    assert vae.stack_states([first, later]).batch == 2


@pytest.mark.parametrize("fixture", ["wfvae-tiny", "wfvae888-tiny", "wfvae2-tiny"])
def test_states_do_not_grow_and_own_their_memory(fixture):
    vae = network(fixture)
    stride = vae.spec.time_stride
    latent, state = vae.encode(pixels(2, 3, 6 * stride + 1, 16, 16))
    sizes = {vae.encode(pixels(2, 3, n * stride + 1, 16, 16))[1].nbytes for n in (0, 1, 2)}
    assert sizes == {state.nbytes}
    states = [state, *(vae.decode(latent.mean[:, :, :rows], last=False)[1] for rows in (1, 2, 5))]
    assert states[2].nbytes == states[3].nbytes
    for state in [*states, *vae.split_state(states[3])]:
        for tensor in state.tensors:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_whole_chunk_steps_are_equal_up_to_rounding(monkeypatch):
    """Steps of a GPU, run on the CPU: whole batches and chunks, equal up to rounding."""
    vae = network("wfvae-tiny")
    video = pixels(2, 3, 17, 16, 24)
    want = vae.encode(video, moments=True)[0]
    frames = vae.decode(want.mean)[0]
    monkeypatch.setattr(stepped_vae, "by_rows", lambda device: False)
    got, state = vae.encode(video[:, :, :9], moments=True)
    rest, _ = vae.encode(video[:, :, 9:], state, moments=True)
    assert torch.allclose(torch.cat([got.mean, rest.mean], dim=2), want.mean, atol=1e-5)
    assert torch.allclose(torch.cat([got.logvar, rest.logvar], dim=2), want.logvar, atol=1e-5)
    begin, state = vae.decode(want.mean[:, :, :3], last=False)
    end, _ = vae.decode(want.mean[:, :, 3:], state)
    assert (begin.shape[2], end.shape[2]) == (7, 10)
    assert torch.allclose(torch.cat([begin, end], dim=2), frames, atol=1e-5)
