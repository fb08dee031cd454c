"""Lossless chunking as properties of every network in both directions: partitions, batches, interleavings, stacked states, prefixes.

If a network claims exactness, results must have the same bits; otherwise they may differ by the stated rounding.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model
from model.losslessness import ROUNDING, decode_chunked, encode_chunked, examine, first_frame_of, synthetic_video
from tests.model.conftest import FIXTURES
from tests.model.diffusers_networks import TINY

pytestmark = pytest.mark.filterwarnings("error")
# The first example of a strategy is its simplest, so simplest here means cut, batched, interleaved or permuted.
FEW = settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GROUPS = 3  # after the first frame

NETWORKS = {
    "leanvae": ("leanvae", "leanvae-tiny", {}),
    "wfvae": ("wfvae", "wfvae-tiny", {}),
    "wfvae nearest": ("wfvae", "wfvae-tiny", {"t_interpolation": "nearest"}),
    "wfvae 8x8x8": ("wfvae", "wfvae888-tiny", {}),
    "wfvae2": ("wfvae2", "wfvae2-tiny", {}),
    "ivvae": ("ivvae", "ivvae-tiny", {}),
}
everywhere = pytest.mark.parametrize("name", NETWORKS)


def wan() -> list[str]:
    """Without diffusers "wan" is left out, but not on a GPU day, whose wheels have it: there it fails."""
    there = importlib.util.find_spec("diffusers") is not None
    return ["wan"] if there or os.environ.get("REQUIRE_CUDA") == "1" else []


ON_GPU = [*NETWORKS, *wan()]
# interpolation in time is the decoder's
both_ways = pytest.mark.parametrize(
    ("name", "direction"),
    [(name, way) for name in NETWORKS for way in ("encode", "decode") if (name, way) != ("wfvae nearest", "encode")],
)


@cache
def network(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    if name == "wan":
        return model.load("diffusers", config=TINY["wan-2.1"], untrained=1, dtype=dtype, device=device)
    family, fixture, changes = NETWORKS[name]
    config = json.loads((FIXTURES / f"{fixture}.json").read_text())["config"]
    return model.load(family, config={**config, **changes}, untrained=1, dtype=dtype, device=device)


def claim(vae: Any, direction: str) -> str:
    return vae.spec.chunking if direction == "encode" else vae.decode_chunking


@cache
def material(
    name: str, direction: str, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three inputs of a direction, and the whole result of each."""
    vae = network(name, dtype, device)
    videos = synthetic_video(vae, seed, 3, GROUPS, 16, 24)
    latents = torch.cat([vae.encode(videos[b : b + 1])[0].mean for b in range(3)])
    if direction == "encode":
        return videos, latents
    return latents, torch.cat([vae.decode(latents[b : b + 1])[0] for b in range(3)])


def run(vae: Any, direction: str, inputs: torch.Tensor, ends: list[int]) -> torch.Tensor:
    return (encode_chunked if direction == "encode" else decode_chunked)(vae, inputs, ends)


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
partitions = st.sets(st.integers(1, ROWS - 1), min_size=1).map(lambda inner: [*sorted(inner), ROWS])
seeds = st.sampled_from([0, 1])


@both_ways
@FEW
@given(ends=partitions, batch=st.sampled_from([3, 2, 1]), seed=seeds)
def test_any_partition_of_any_batch_gives_the_same_result(name, direction, ends, batch, seed):
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    agree(vae, direction, run(vae, direction, inputs[:batch], ends), alone[:batch])


@both_ways
@FEW
@given(order=st.permutations([2, 0, 1]), take=st.integers(2, 3), seed=seeds)
def test_any_composition_of_a_batch_gives_the_same_result(name, direction, order, take, seed):
    vae = network(name)
    inputs, alone = material(name, direction, seed)
    chosen = order[:take]
    agree(vae, direction, run(vae, direction, inputs[chosen], [ROWS]), alone[chosen])


@both_ways
@FEW
@given(turns=st.permutations([0, 1] * ROWS), seed=seeds)
def test_interleaved_videos_do_not_affect_each_other(name, direction, turns, seed):
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


@both_ways
@FEW
@given(order=st.permutations([2, 0, 1]), first=st.sampled_from([2, 1, 3]), seed=seeds)
def test_states_can_be_stacked_and_split(name, direction, order, first, seed):
    """Videos that start separately continue in one batch, in any order, and end separately, as in continuous batching."""
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


@both_ways
@pytest.mark.parametrize("rows", range(1, ROWS))
def test_a_prefix_gives_the_prefix(name, direction, rows):
    """A decoder with look-ahead is compared on the frames it returns before the end."""
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
def test_computing_moments_does_not_change_the_mean(name):
    vae = network(name)
    videos, latents = material(name, "encode", 0)
    posterior, _ = vae.encode(videos[:1], moments=True)
    assert torch.equal(posterior.mean, latents[:1])
    chunked = encode_chunked(vae, videos[:1], [1, ROWS], moments=True)
    agree(vae, "encode", chunked, torch.cat([posterior.mean, posterior.logvar], dim=1))


@both_ways
@pytest.mark.parametrize(("dtype", "ends"), [(torch.bfloat16, [1, 2, 3, ROWS]), (torch.float16, [2, ROWS])])
def test_low_precision_is_lossless_too(name, direction, dtype, ends):
    vae = network(name, dtype)
    inputs, alone = material(name, direction, 0, dtype)
    agree(vae, direction, run(vae, direction, inputs, ends), alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("name", ON_GPU)
def test_chunks_on_a_gpu_are_lossless_up_to_rounding(name, direction, dtype):
    """Encoded chunks that replay CUDA graphs, where a network has them, as well."""
    vae = network(name, dtype, "cuda")
    inputs, alone = material(name, direction, 0, dtype, "cuda")
    assert claim(vae, "encode") == "rounding"
    for ends in 3 * ([1, 2, 3, ROWS], [2, ROWS]):
        agree(vae, direction, run(vae, direction, inputs, ends), alone)
    if dtype == torch.float32:
        here = run(network(name), direction, inputs.cpu(), [ROWS])
        assert (here - alone.cpu()).abs().max() <= 1e-4 * max(1.0, float(alone.abs().max()))


def test_a_gpu_day_never_leaves_wan_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("REQUIRE_CUDA", raising=False)
    assert wan() == []
    monkeypatch.setenv("REQUIRE_CUDA", "1")
    assert wan() == ["wan"]


@everywhere
def test_low_precision_stays_close_to_float32(name):
    """Bound for the difference between bfloat16 and float32 products on a tiny random network, to notice a wrong cast."""
    _, exact = material(name, "encode", 0)
    _, low = material(name, "encode", 0, torch.bfloat16)
    assert 0 < ((low - exact).norm() / exact.norm()).item() < 0.03


@everywhere
def test_examine_reports_true_and_false_claims(name, monkeypatch):
    vae = network(name)
    findings = list(examine(vae, height=16, width=24, groups=3))
    assert len(findings) == 19
    assert [finding.direction for finding in findings] == ["encode"] * 10 + ["decode"] * 9
    assert all(finding.ok for finding in findings)
    honest = vae.encode

    def forgetful(video, state=None, **how):
        posterior, after = honest(video, state, **how)
        if state is not None:
            posterior.mean.add_(1e-3 * vae.spec.value_range[1] * posterior.mean.abs().max())
        return posterior, after

    monkeypatch.setattr(vae, "encode", forgetful)
    of_encode = islice(examine(vae, height=16, width=24, groups=3), 10)
    broken = {finding.name for finding in of_encode if not finding.ok}
    assert {
        "one latent row at a time",
        "uneven chunks",
        "two videos interleaved",
        "states gathered and scattered",
    } <= broken
    assert "the same call again" not in broken


def test_first_frame_of_a_latent_row():
    spec = network("leanvae").spec
    assert [first_frame_of(spec, row) for row in range(4)] == [0, 1, 5, 9]
    assert [b - a for a, b in pairwise(first_frame_of(spec, row) for row in range(4))] == [1, 4, 4]
