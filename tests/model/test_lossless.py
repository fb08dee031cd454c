"""Promise 1 as properties, for every network and both directions: partitions, batches, interleavings, gathered states, prefixes.

Where a network claims exactness the results must be the same bits, elsewhere and in other devices' place to the stated rounding.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model
from model.losslessness import ROUNDING, decode_in, encode_in, examine, first_frame_of, synthetic_video
from tests.model.conftest import FIXTURES

pytestmark = pytest.mark.filterwarnings("error")
FEW = settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GROUPS = 4  # after the first frame

NETWORKS = {
    "leanvae": ("leanvae", "leanvae-tiny", {}),
    "wfvae": ("wfvae", "wfvae-tiny", {}),
    "wfvae nearest": ("wfvae", "wfvae-tiny", {"t_interpolation": "nearest"}),
    "wfvae 8x8x8": ("wfvae", "wfvae888-tiny", {}),
    "wfvae2": ("wfvae2", "wfvae2-tiny", {}),
    "ivvae": ("ivvae", "ivvae-tiny", {}),
}
everywhere = pytest.mark.parametrize("name", NETWORKS)
directions = pytest.mark.parametrize("direction", ["encode", "decode"])


@cache
def network(name: str, dtype: torch.dtype = torch.float32) -> Any:
    family, fixture, changes = NETWORKS[name]
    config = json.loads((FIXTURES / f"{fixture}.json").read_text())["config"]
    return model.load(family, config={**config, **changes}, untrained=1, dtype=dtype)


def claim(vae: Any, direction: str) -> str:
    return vae.spec.chunking if direction == "encode" else vae.decode_chunking


@cache
def material(
    name: str, direction: str, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three inputs of a direction and what each gives by itself, whole."""
    vae = network(name, dtype)
    videos = synthetic_video(vae, seed, 3, GROUPS, 16, 24)
    latents = torch.cat([vae.encode(videos[b : b + 1])[0].mean for b in range(3)])
    if direction == "encode":
        return videos, latents
    return latents, torch.cat([vae.decode(latents[b : b + 1])[0] for b in range(3)])


def run(vae: Any, direction: str, inputs: torch.Tensor, ends: list[int]) -> torch.Tensor:
    return (encode_in if direction == "encode" else decode_in)(vae, inputs, ends)


def step(vae: Any, direction: str, inputs: torch.Tensor, rows: slice, state: Any) -> tuple[torch.Tensor, Any]:
    if direction == "decode":
        return vae.decode(inputs[:, :, rows], state, last=rows.stop == inputs.shape[2])
    frames = slice(first_frame_of(vae.spec, rows.start), first_frame_of(vae.spec, rows.stop))
    posterior, state = vae.encode(inputs[:, :, frames], state)
    return posterior.mean, state


def agree(vae: Any, direction: str, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    allowed = 0.0 if claim(vae, direction) == "exact" else ROUNDING[vae.dtype] * max(1.0, want.abs().max().item())
    assert (got - want).abs().max().item() <= allowed


ROWS = GROUPS + 1
partitions = st.sets(st.integers(1, ROWS - 1)).map(lambda inner: [*sorted(inner), ROWS])
seeds = st.sampled_from([0, 1])


@directions
@everywhere
@FEW
@given(ends=partitions, batch=st.integers(1, 3), seed=seeds)
def test_any_partition_of_any_batch(name, direction, ends, batch, seed):
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    agree(vae, direction, run(vae, direction, inputs[:batch], ends), alone[:batch])


@directions
@everywhere
@FEW
@given(order=st.permutations(range(3)), take=st.integers(2, 3), seed=seeds)
def test_any_composition_of_a_batch(name, direction, order, take, seed):
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    chosen = order[:take]
    agree(vae, direction, run(vae, direction, inputs[chosen], [ROWS]), alone[chosen])


@directions
@everywhere
@FEW
@given(turns=st.permutations([0] * ROWS + [1] * ROWS), seed=seeds)
def test_interleaved_videos_never_touch(name, direction, turns, seed):
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    parts: list[list[torch.Tensor]] = [[], []]
    states: list[Any] = [None, None]
    for which in turns:
        row = len(parts[which])
        part, states[which] = step(vae, direction, inputs[which : which + 1], slice(row, row + 1), states[which])
        parts[which].append(part)
    for which in (0, 1):
        agree(vae, direction, torch.cat(parts[which], dim=2), alone[which : which + 1])


@directions
@everywhere
@FEW
@given(order=st.permutations(range(3)), first=st.integers(1, 3), seed=seeds)
def test_states_gather_and_scatter(name, direction, order, first, seed):
    """Videos begun alone go on in one batch, in any order, and end alone, as continuous batching has it."""
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    begun = [step(vae, direction, inputs[b : b + 1], slice(0, first), None) for b in range(3)]
    stacked = vae.stack_states([begun[b][1] for b in order])
    middle, state = (
        step(vae, direction, inputs[order], slice(first, ROWS - 1), stacked) if first < ROWS - 1 else (None, stacked)
    )
    for place, (b, one) in enumerate(zip(order, vae.split_state(state), strict=True)):
        last, _ = step(vae, direction, inputs[b : b + 1], slice(ROWS - 1, ROWS), one)
        parts = [begun[b][0], *([] if middle is None else [middle[place : place + 1]]), last]
        agree(vae, direction, torch.cat(parts, dim=2), alone[b : b + 1])


@directions
@everywhere
@pytest.mark.parametrize("rows", range(1, ROWS))
def test_a_prefix_gives_the_prefix(name, direction, rows):
    """Of a decoder that looks ahead: what it gives out while more may follow."""
    vae = network(name)
    inputs, alone = material(name, direction, 0)
    part, _ = step(vae, direction, inputs, slice(0, rows), None)
    assert part.shape[2] > 0
    agree(vae, direction, part, alone[:, :, : part.shape[2]])


@everywhere
def test_an_image_is_the_first_latent(name):
    vae = network(name)
    videos, latents = material(name, "encode", 0)
    agree(vae, "encode", vae.encode(videos[:, :, :1])[0].mean, latents[:, :, :1])


@everywhere
def test_moments_have_the_bits_of_the_mean(name):
    vae = network(name)
    videos, latents = material(name, "encode", 0)
    posterior, _ = vae.encode(videos[:1], moments=True)
    assert torch.equal(posterior.mean, latents[:1])
    chunked = encode_in(vae, videos[:1], [1, ROWS], moments=True)
    agree(vae, "encode", chunked, torch.cat([posterior.mean, posterior.logvar], dim=1))


@directions
@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_too(name, direction, dtype):
    vae = network(name, dtype)
    inputs, alone = material(name, direction, 0, dtype)
    for ends in ([1, 2, ROWS], list(range(1, ROWS + 1))):
        agree(vae, direction, run(vae, direction, inputs, ends), alone)


@everywhere
def test_low_precision_is_the_same_network(name):
    """How far bfloat16 products are from float32 on a tiny random network: a bound, so that a wrong cast is seen."""
    _, exact = material(name, "encode", 0)
    _, low = material(name, "encode", 0, torch.bfloat16)
    assert 0 < ((low - exact).norm() / exact.norm()).item() < 0.03


@everywhere
def test_the_examination_finds_what_is_so_and_what_is_not(name, monkeypatch):
    vae = network(name)
    findings = list(examine(vae, height=16, width=24, groups=3))
    assert len(findings) == 19
    assert all(finding.ok for finding in findings)
    honest = vae.encode

    def forgetful(video, state=None, **how):
        posterior, after = honest(video, state, **how)
        if state is not None:
            posterior.mean.add_(1e-3 * vae.spec.value_range[1] * posterior.mean.abs().max())
        return posterior, after

    monkeypatch.setattr(vae, "encode", forgetful)
    broken = {finding.name for finding in examine(vae, height=16, width=24, groups=3) if not finding.ok}
    assert {
        "one latent row at a time",
        "uneven chunks",
        "two videos interleaved",
        "states gathered and scattered",
    } <= broken
    assert "the same call again" not in broken


def test_frames_behind_a_row():
    spec = network("leanvae").spec
    assert [first_frame_of(spec, row) for row in range(4)] == [0, 1, 5, 9]
    assert [b - a for a, b in pairwise(first_frame_of(spec, row) for row in range(4))] == [1, 4, 4]
