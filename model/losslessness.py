"""Measures the promise of lossless chunking on a network: any chunking, batch and interleaving give the same latents and videos.

`examine` yields one `Finding` per property. `lathe check` prints them; the property tests reuse the functions with random partitions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Allowed difference relative to the largest value if results are equal up to rounding. bfloat16 keeps 8 bits, and a network amplifies.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Finding:
    """Measured difference for one property in one direction: largest absolute difference, largest value, allowed difference."""

    direction: str  # "encode" | "decode"
    name: str
    difference: float
    magnitude: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the difference is allowed; False for NaN."""
        return self.difference <= self.allowed


def synthetic_video(vae: Any, seed: int, batch: int, groups: int, height: int, width: int) -> torch.Tensor:
    """Test video `B 3 T H W` in the network's range, noise over moving gradients, of `lead_frames + time_stride * groups` frames."""
    spec = vae.spec
    frames = spec.lead_frames + groups * spec.time_stride
    generator, dtype = torch.Generator().manual_seed(seed), torch.float32
    t, y, x = torch.meshgrid(
        torch.arange(frames, dtype=dtype) / frames,
        torch.linspace(0, 1, height, dtype=dtype),
        torch.linspace(0, 1, width, dtype=dtype),
        indexing="ij",
    )
    phase = torch.rand((batch, 3, 1, 1, 1), generator=generator, dtype=dtype)
    wave = 0.5 + 0.35 * torch.sin(6.3 * (x + y * phase + t + phase))
    noise = torch.rand((batch, 3, frames, height, width), generator=generator, dtype=dtype)
    low, high = spec.value_range
    return low + (high - low) * (0.7 * wave + 0.3 * noise)


def first_frame_of(spec: Any, row: int) -> int:
    """Index of the first frame that latent row `row` covers."""
    return max(0, spec.lead_frames + (row - spec.lead_frames) * spec.time_stride)


def encode_chunked(vae: Any, video_BCTHW: torch.Tensor, ends: Sequence[int], *, moments: bool = False) -> torch.Tensor:
    """Latents of a video encoded in chunks that end at these latent rows; `moments` stacks the log-variance below the mean."""
    parts, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        frames = slice(first_frame_of(vae.spec, start), first_frame_of(vae.spec, stop))
        posterior, state = vae.encode(video_BCTHW[:, :, frames], state, moments=moments)
        parts.append(torch.cat([posterior.mean, posterior.logvar], dim=1) if moments else posterior.mean)
    return torch.cat(parts, dim=2)


def decode_chunked(vae: Any, latent_BCthw: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Video of latents decoded in chunks that end at these latent rows."""
    parts, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        video, state = vae.decode(latent_BCthw[:, :, start:stop], state, last=stop == ends[-1])
        parts.append(video)
    return torch.cat(parts, dim=2)


def examine(vae: Any, *, height: int = 64, width: int = 64, groups: int = 4, seed: int = 0) -> Iterator[Finding]:
    """Checks every property that the network claims, one after the other; networks for whole clips only are checked on whole clips."""
    videos = synthetic_video(vae, seed, 3, groups, height, width)
    rows = vae.spec.lead_frames + groups
    single = [encode_chunked(vae, videos[b : b + 1], [rows]) for b in range(3)]
    latents = torch.cat(single)
    yield from _compare_walks(vae, "encode", vae.spec.chunking, videos, single, encode_chunked, rows)
    if vae.spec.lead_frames and vae.spec.chunking != "none":
        image = vae.encode(videos[:1, :, :1])[0].mean
        yield _compare(vae, "encode", "image = first latent", image, single[0][:, :, :1], vae.spec.chunking)
    decoded = [decode_chunked(vae, latents[b : b + 1], [rows]) for b in range(3)]
    yield from _compare_walks(vae, "decode", vae.decode_chunking, latents, decoded, decode_chunked, rows)


def _compare_walks(
    vae: Any,
    direction: str,
    chunking: str,
    inputs: torch.Tensor,
    single: Sequence[torch.Tensor],
    run: Callable[[Any, torch.Tensor, Sequence[int]], torch.Tensor],
    rows: int,
) -> Iterator[Finding]:
    """The properties common to both directions. `single`: the result of each whole input, run by itself."""

    def finding(name: str, got: torch.Tensor, want: torch.Tensor) -> Finding:
        return _compare(vae, direction, name, got, want, chunking)

    yield finding("the same call again", run(vae, inputs[:1], [rows]), single[0])
    together = run(vae, inputs, [rows])
    yield finding("batch of three = each alone", together, torch.cat(list(single)))
    yield finding("batch in another order", run(vae, inputs.flip(0), [rows]), torch.cat(list(single)).flip(0))
    if chunking == "none":
        return
    yield finding("one latent row at a time", run(vae, inputs[:1], range(1, rows + 1)), single[0])
    yield finding("two rows at a time", run(vae, inputs[:1], [*range(2, rows, 2), rows]), single[0])
    yield finding("uneven chunks", run(vae, inputs[:1], sorted({1, rows - 1, rows})), single[0])
    yield finding("two videos interleaved", *_interleaved(vae, direction, inputs, single, rows))
    yield finding("states gathered and scattered", *_regrouped(vae, direction, inputs, single, rows))
    yield finding("a prefix gives the prefix", *_prefix(vae, direction, inputs, single, rows))


def _step(
    vae: Any, direction: str, inputs: torch.Tensor, start: int, stop: int, state: Any, rows: int
) -> tuple[torch.Tensor, Any]:
    """Runs one chunk, latent rows `start..stop`, in either direction; returns its result and state."""
    if direction == "decode":
        video, state = vae.decode(inputs[:, :, start:stop], state, last=stop == rows)
        return video, state
    frames = slice(first_frame_of(vae.spec, start), first_frame_of(vae.spec, stop))
    posterior, state = vae.encode(inputs[:, :, frames], state)
    return posterior.mean, state


def _interleaved(
    vae: Any, direction: str, inputs: torch.Tensor, single: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    states, parts = [None, None], [[], []]  # type: ignore[var-annotated]
    for row in range(rows):
        for which in (0, 1):
            part, states[which] = _step(vae, direction, inputs[which : which + 1], row, row + 1, states[which], rows)
            parts[which].append(part)
    return torch.cat([torch.cat(one, dim=2) for one in parts]), torch.cat(list(single[:2]))


def _regrouped(
    vae: Any, direction: str, inputs: torch.Tensor, single: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos start separately, continue in one batch in swapped order, and end separately."""
    first = [_step(vae, direction, inputs[b : b + 1], 0, 2, None, rows) for b in (0, 1)]
    middle, state = _step(
        vae, direction, inputs[[1, 0]], 2, rows - 1, vae.stack_states([first[1][1], first[0][1]]), rows
    )
    after = list(reversed(vae.split_state(state)))
    last = [_step(vae, direction, inputs[b : b + 1], rows - 1, rows, after[b], rows)[0] for b in (0, 1)]
    got = [torch.cat([first[b][0], middle[1 - b : 2 - b], last[b]], dim=2) for b in (0, 1)]
    return torch.cat(got), torch.cat(list(single[:2]))


def _prefix(
    vae: Any, direction: str, inputs: torch.Tensor, single: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All but the last latent row; a decoder with look-ahead is compared on the frames it returns before the end."""
    part, _ = _step(vae, direction, inputs[:1], 0, rows - 1, None, rows)
    return part, single[0][:, :, : part.shape[2]]


def _compare(vae: Any, direction: str, name: str, got: torch.Tensor, want: torch.Tensor, chunking: str) -> Finding:
    if got.shape != want.shape:
        raise RuntimeError(f"{direction}, {name}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    difference = float((got.double() - want.double()).abs().max())
    magnitude = float(want.double().abs().max())
    allowed = 0.0 if chunking == "exact" else ROUNDING[vae.dtype] * max(1.0, magnitude)
    return Finding(direction, name, difference, magnitude, allowed)
