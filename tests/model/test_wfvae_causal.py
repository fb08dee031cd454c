"""Time in WF-VAE: frames a decoder holds back, states at the end of a video, full widths in chunks.

Agreement of any chunks, batches and interleavings is tested for every network in `test_lossless.py`.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

import model
from model.definition import definition
from model.registry import PRESETS
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


def test_each_latent_is_decoded_once(monkeypatch):
    """No latent is decoded twice for look-ahead: one call of the middle's first block per latent."""
    vae, seen = network("wfvae-tiny"), []
    latent = vae.encode(pixels(1, 3, 17, 16, 16))[0].mean
    conv_in = vae._decoder.conv_in
    monkeypatch.setattr(vae._decoder, "conv_in", lambda x, stream: seen.append(x.shape[1]) or conv_in(x, stream))
    state = None
    for row in range(5):
        _, state = vae.decode(latent[:, :, row : row + 1], state, last=row == 4)
    assert seen == [1] * 5


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
    """Steps of a GPU, run on the CPU: equal up to rounding, one step after the first frame."""
    vae = network("wfvae-tiny")
    video = pixels(2, 3, 17, 16, 24)
    want = vae.encode(video, moments=True)[0]
    frames = vae.decode(want.mean)[0]
    monkeypatch.setattr(type(vae), "_videos", lambda self, batch: iter([slice(0, batch)]))
    monkeypatch.setattr(type(vae), "_steps", lambda self, rows, first: [(0, 1), (1, rows)] if first else [(0, rows)])
    got, state = vae.encode(video[:, :, :9], moments=True)
    rest, _ = vae.encode(video[:, :, 9:], state, moments=True)
    assert torch.allclose(torch.cat([got.mean, rest.mean], dim=2), want.mean, atol=1e-5)
    assert torch.allclose(torch.cat([got.logvar, rest.logvar], dim=2), want.logvar, atol=1e-5)
    begin, state = vae.decode(want.mean[:, :, :3], last=False)
    end, _ = vae.decode(want.mean[:, :, 3:], state)
    assert (begin.shape[2], end.shape[2]) == (7, 10)
    assert torch.allclose(torch.cat([begin, end], dim=2), frames, atol=1e-5)


# ---- full width -----------------------------------------------------------------------------------------------------

HALF = {**PRESETS["wfvae-s-8ch"].config, "base_channels": 64, "decoder_energy_flow_hidden_size": 64}


@pytest.fixture(scope="module")
def wide():
    """Half as wide as the smallest published network, which is enough to use every fast path."""
    vae = model.load("wfvae", config=HALF, untrained=0)
    backends = {
        conv.conv.backend for block in vae._encoder.stages[2] for conv in (getattr(block, "conv1", None),) if conv
    }
    backends |= {block.conv1.conv.backend for block in vae._encoder.stages[1][1:-1]}
    assert backends == {"winograd", "onednn"}
    return vae


def test_full_width_in_chunks_and_batches_agrees_with_the_plain_network(wide):
    """With odd sides of the latent grid."""
    video = pixels(2, 3, 9, 24, 40)
    whole = wide.encode(video, moments=True)[0]
    with torch.no_grad():
        want = definition("wfvae", wide.config, wide.network.state_dict()).encode(video)
    for got, reference in ((whole.mean, want.mean), (whole.logvar, want.logvar)):
        assert (got - reference).abs().max() <= 1e-5 * reference.abs().max()
    state, parts = None, []
    for chunk in (video[1:, :, :1], video[1:, :, 1:5], video[1:, :, 5:]):
        posterior, state = wide.encode(chunk, state)
        parts.append(posterior.mean)
    assert torch.equal(torch.cat(parts, dim=2), whole.mean[1:])


def test_full_width_decoding_is_exact_in_chunks_and_close_in_bfloat16(wide):
    posterior = wide.encode(pixels(1, 3, 5, 16, 16), moments=True)[0]
    assert 0.2 < posterior.mean.std() < 4
    assert 0.2 < posterior.logvar.std() < 4
    whole = wide.decode(posterior.mean)[0]
    assert 0.05 < whole.std() < 1
    with torch.no_grad():
        plain = definition("wfvae", wide.config, wide.network.state_dict()).decode(posterior.mean)
    assert (whole - plain).abs().max() <= 1e-5 * plain.abs().max()
    first, state = wide.decode(posterior.mean[:, :, :1], last=False)
    rest, _ = wide.decode(posterior.mean[:, :, 1:], state)
    assert torch.equal(torch.cat([first, rest], dim=2), whole)
    rough = model.from_state_dict("wfvae", HALF, wide.network.state_dict(), dtype="bfloat16")
    for got, exact in (
        (rough.encode(pixels(1, 3, 5, 16, 16))[0].mean, posterior.mean),
        (rough.decode(posterior.mean)[0], whole),
    ):
        assert 1e-5 < (got - exact).abs().max() / exact.abs().max() < 3e-2
