"""Lossless chunking of LeanVAE as properties: any chunking, batch or interleaving gives the same bits on a CPU.

No state is kept outside the returned one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model

pytestmark = pytest.mark.filterwarnings("error")
# The first example of a strategy is its simplest, so simplest here means cut, batched, interleaved or permuted.
FEW = settings(
    max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ROWS = 6  # latent frames of the longest video tried


def pixels(seed: int, batch: int, rows: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((batch, 3, 4 * rows - 3, height, width), generator=generator) - 0.5


def cuts(rows: int) -> st.SearchStrategy[list[int]]:
    """Ends of chunks in latent rows, the last one being `rows`."""
    return st.sets(st.integers(1, rows - 1), min_size=1).map(lambda inner: [*sorted(inner), rows])


def frame(row: int) -> int:
    return 4 * row - 3 if row else 0


def encode(vae, video, ends, **how):
    posteriors, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        posterior, state = vae.encode(video[:, :, frame(start) : frame(stop)], state, **how)
        posteriors.append(posterior)
    return torch.cat([posterior.mean for posterior in posteriors], dim=2), state


def decode(vae, latent, ends):
    videos, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        video, state = vae.decode(latent[:, :, start:stop], state, last=stop == ends[-1])
        videos.append(video)
    return torch.cat(videos, dim=2), state


sizes = st.tuples(st.sampled_from([40, 8, 16]), st.sampled_from([24, 8, 32]))


@FEW
@given(ends=cuts(ROWS), size=sizes, batch=st.sampled_from([2, 3, 1]), seed=st.integers(0, 99))
def test_any_partition_gives_the_same_bits(vae, ends, size, batch, seed):
    video = pixels(seed, batch, ROWS, *size)
    whole, whole_state = encode(vae, video, [ROWS])
    chunked, state = encode(vae, video, ends)
    assert torch.equal(chunked, whole)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, whole_state.tensors, strict=True))
    assert torch.equal(decode(vae, whole, ends)[0], decode(vae, whole, [ROWS])[0])


@FEW
@given(order=st.permutations([2, 0, 3, 1]), take=st.sampled_from([4, 3, 2]), seed=st.integers(0, 99))
def test_any_batch_gives_the_same_bits(vae, order, take, seed):
    videos = pixels(seed, 4, 3, 16, 24)
    alone = [vae.encode(videos[b : b + 1], moments=True)[0] for b in range(4)]
    chosen = order[:take]
    together, _ = vae.encode(videos[chosen], moments=True)
    decoded, _ = vae.decode(together.mean)
    for place, b in enumerate(chosen):
        assert torch.equal(together.mean[place : place + 1], alone[b].mean)
        assert torch.equal(together.logvar[place : place + 1], alone[b].logvar)
        assert torch.equal(decoded[place : place + 1], vae.decode(alone[b].mean)[0])


@FEW
@given(turns=st.permutations([0, 1] * 3), seed=st.integers(0, 99))
def test_interleaved_videos_do_not_affect_each_other(vae, turns, seed):
    videos = [pixels(seed, 1, 3, 16, 16), pixels(seed + 100, 1, 3, 16, 16)]
    latents: list[list[torch.Tensor]] = [[], []]
    states = [None, None]
    for which in turns:
        row = len(latents[which])
        posterior, states[which] = vae.encode(videos[which][:, :, frame(row) : frame(row + 1)], states[which])
        latents[which].append(posterior.mean)
    for which in (0, 1):
        assert torch.equal(torch.cat(latents[which], dim=2), vae.encode(videos[which])[0].mean)


@FEW
@given(starts=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=st.integers(0, 99), data=st.data())
def test_states_can_be_stacked_and_split(vae, starts, seed, data):
    """Videos at different positions continue in one batch, in any order, as in continuous batching."""
    videos = [pixels(seed + n, 1, 5, 16, 24) for n in range(len(starts))]
    order = data.draw(st.permutations(range(len(videos))))
    states = [vae.encode(video[:, :, : frame(row)])[1] for video, row in zip(videos, starts, strict=True)]
    stacked = vae.stack_states([states[n] for n in order])
    following = torch.cat([videos[n][:, :, frame(starts[n]) : frame(starts[n] + 1)] for n in order])
    posterior, after = vae.encode(following, stacked)
    for place, (n, state) in enumerate(zip(order, vae.split_state(after), strict=True)):
        whole = vae.encode(videos[n])[0].mean
        assert torch.equal(posterior.mean[place], whole[0, :, starts[n] : starts[n] + 1])
        rest, _ = vae.encode(videos[n][:, :, frame(starts[n] + 1) :], state)
        assert torch.equal(rest.mean, whole[:, :, starts[n] + 1 :])


@FEW
@given(rows=st.integers(1, ROWS), seed=st.integers(0, 99))
def test_a_prefix_of_the_video_is_the_prefix_of_the_latent(vae, rows, seed):
    video = pixels(seed, 1, ROWS, 16, 16)
    whole = vae.encode(video)[0].mean
    assert torch.equal(vae.encode(video[:, :, : frame(rows)])[0].mean, whole[:, :, :rows])
    assert torch.equal(vae.decode(whole[:, :, :rows])[0], vae.decode(whole)[0][:, :, : frame(rows)])


def test_an_image_is_the_first_latent(vae):
    video = pixels(1, 2, 3, 24, 16)
    assert torch.equal(vae.encode(video[:, :, :1])[0].mean, vae.encode(video)[0].mean[:, :, :1])


def test_a_state_can_be_used_twice(vae):
    video = pixels(2, 1, 3, 16, 16)
    _, state = vae.encode(video[:, :, :5])
    before = [tensor.clone() for tensor in state.tensors]
    first = vae.encode(video[:, :, 5:], state)[0].mean
    second = vae.encode(video[:, :, 5:], state)[0].mean
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors, before, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_split_states_own_their_memory(vae, batch):
    _, state = vae.encode(pixels(3, batch, 2, 16, 16))
    for part in vae.split_state(state):
        for tensor in part.tensors:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert sum(part.nbytes for part in vae.split_state(state)) == state.nbytes


def test_the_state_holds_two_rows_per_layer(vae):
    """The state after 3 rows is as large as after 30."""
    nbytes = {rows: vae.encode(pixels(4, 1, rows, 16, 16))[1].nbytes for rows in (1, 3, 30)}
    assert len(set(nbytes.values())) == 1
    for tensor in vae.encode(pixels(4, 1, 5, 16, 16))[1].tensors:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_as_lossless(golden, dtype):
    other = model.from_state_dict("leanvae", golden.config, golden.weights, dtype=dtype)
    video = pixels(6, 2, 4, 16, 24)
    whole, _ = encode(other, video, [4])
    assert torch.equal(encode(other, video, [1, 2, 4])[0], whole)
    assert torch.equal(torch.cat([encode(other, video[b : b + 1], [3, 4])[0] for b in (0, 1)]), whole)
    assert torch.equal(decode(other, whole, [1, 4])[0], decode(other, whole, [4])[0])
