"""Promise 1, examined on a real network: any chunking, batch and interleaving give the same latents and videos.

Enters: a network ready to run and a frame size. Leaves: one `Finding` per property, with the largest difference seen and the one allowed.
`lathe check` prints them; the property tests draw the partitions at random and use the same walks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# Of the largest value, where results are the same but for rounding. bfloat16 keeps 8 bits, and a network amplifies.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One property of one direction: the largest absolute difference, the largest value it is measured against, what is allowed."""

    direction: str  # "encode" | "decode"
    name: str
    difference: float
    magnitude: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Within what is allowed; never for NaN."""
        return self.difference <= self.allowed


def synthetic_video(vae: Any, seed: int, batch: int, groups: int, height: int, width: int) -> torch.Tensor:
    """Noise over drifting gradients, `B 3 T H W` in the network's range, of `lead + stride * groups` frames."""
    spec = vae.spec
    frames = spec.lead_frames + groups * spec.time_stride
    generator = torch.Generator().manual_seed(seed)
    t, y, x = torch.meshgrid(
        torch.arange(frames) / frames, torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij"
    )
    phase = torch.rand((batch, 3, 1, 1, 1), generator=generator)
    wave = 0.5 + 0.35 * torch.sin(6.3 * (x + y * phase + t + phase))
    noise = torch.rand((batch, 3, frames, height, width), generator=generator)
    low, high = spec.value_range
    return low + (high - low) * (0.7 * wave + 0.3 * noise)


def first_frame_of(spec: Any, row: int) -> int:
    """Index of the first frame behind latent row `row`."""
    return max(0, spec.lead_frames + (row - spec.lead_frames) * spec.time_stride)


def encode_in(vae: Any, video_BCTHW: torch.Tensor, ends: Sequence[int], *, moments: bool = False) -> torch.Tensor:
    """Latents of a video taken in chunks that end at these latent rows; with `moments` the log-variance stacked below the mean."""
    parts, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        frames = slice(first_frame_of(vae.spec, start), first_frame_of(vae.spec, stop))
        posterior, state = vae.encode(video_BCTHW[:, :, frames], state, moments=moments)
        parts.append(torch.cat([posterior.mean, posterior.logvar], dim=1) if moments else posterior.mean)
    return torch.cat(parts, dim=2)


def decode_in(vae: Any, latent_BCthw: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """The video of latents taken in chunks that end at these rows."""
    parts, state = [], None
    for start, stop in itertools.pairwise([0, *ends]):
        video, state = vae.decode(latent_BCthw[:, :, start:stop], state, last=stop == ends[-1])
        parts.append(video)
    return torch.cat(parts, dim=2)


def examine(vae: Any, *, height: int = 64, width: int = 64, groups: int = 4, seed: int = 0) -> Iterator[Finding]:
    """Every property the network claims, one after the other; a network for whole clips only is examined on whole clips."""
    videos = synthetic_video(vae, seed, 3, groups, height, width)
    rows = vae.spec.lead_frames + groups
    alone = [encode_in(vae, videos[b : b + 1], [rows]) for b in range(3)]
    latents = torch.cat(alone)
    yield from _walks(vae, "encode", vae.spec.chunking, videos, alone, lambda x, ends: encode_in(vae, x, ends), rows)
    if vae.spec.lead_frames and vae.spec.chunking != "none":
        image = vae.encode(videos[:1, :, :1])[0].mean
        yield _compare(vae, "encode", "image = first latent", image, alone[0][:, :, :1], vae.spec.chunking)
    decoded = [decode_in(vae, latents[b : b + 1], [rows]) for b in range(3)]
    yield from _walks(
        vae, "decode", vae.decode_chunking, latents, decoded, lambda x, ends: decode_in(vae, x, ends), rows
    )


def _walks(
    vae: Any,
    direction: str,
    chunking: str,
    inputs: torch.Tensor,
    alone: Sequence[torch.Tensor],
    run: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    rows: int,
) -> Iterator[Finding]:
    """The properties common to both directions. `alone` are the whole results of each input by itself."""

    def found(name: str, got: torch.Tensor, want: torch.Tensor) -> Finding:
        return _compare(vae, direction, name, got, want, chunking)

    yield found("the same call again", run(inputs[:1], [rows]), alone[0])
    together = run(inputs, [rows])
    yield found("batch of three = each alone", together, torch.cat(list(alone)))
    yield found("batch in another order", run(inputs.flip(0), [rows]), torch.cat(list(alone)).flip(0))
    if chunking == "none":
        return
    yield found("one latent row at a time", run(inputs[:1], range(1, rows + 1)), alone[0])
    yield found("two rows at a time", run(inputs[:1], [*range(2, rows, 2), rows]), alone[0])
    yield found("uneven chunks", run(inputs[:1], sorted({1, rows - 1, rows})), alone[0])
    yield found("two videos interleaved", *_interleaved(vae, direction, inputs, alone, rows))
    yield found("states gathered and scattered", *_scattered(vae, direction, inputs, alone, rows))
    yield found("a prefix gives the prefix", *_prefix(vae, direction, inputs, alone, rows))


def _step(
    vae: Any, direction: str, inputs: torch.Tensor, start: int, stop: int, state: Any, rows: int
) -> tuple[torch.Tensor, Any]:
    """One chunk of latent rows `start..stop` in either direction."""
    if direction == "decode":
        video, state = vae.decode(inputs[:, :, start:stop], state, last=stop == rows)
        return video, state
    frames = slice(first_frame_of(vae.spec, start), first_frame_of(vae.spec, stop))
    posterior, state = vae.encode(inputs[:, :, frames], state)
    return posterior.mean, state


def _interleaved(
    vae: Any, direction: str, inputs: torch.Tensor, alone: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    states, parts = [None, None], [[], []]  # type: ignore[var-annotated]
    for row in range(rows):
        for which in (0, 1):
            part, states[which] = _step(vae, direction, inputs[which : which + 1], row, row + 1, states[which], rows)
            parts[which].append(part)
    return torch.cat([torch.cat(one, dim=2) for one in parts]), torch.cat(list(alone[:2]))


def _scattered(
    vae: Any, direction: str, inputs: torch.Tensor, alone: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two videos start alone, go on in one batch in the other order, and end alone."""
    first = [_step(vae, direction, inputs[b : b + 1], 0, 2, None, rows) for b in (0, 1)]
    middle, state = _step(
        vae, direction, inputs[[1, 0]], 2, rows - 1, vae.stack_states([first[1][1], first[0][1]]), rows
    )
    after = list(reversed(vae.split_state(state)))
    last = [_step(vae, direction, inputs[b : b + 1], rows - 1, rows, after[b], rows)[0] for b in (0, 1)]
    got = [torch.cat([first[b][0], middle[1 - b : 2 - b], last[b]], dim=2) for b in (0, 1)]
    return torch.cat(got), torch.cat(list(alone[:2]))


def _prefix(
    vae: Any, direction: str, inputs: torch.Tensor, alone: Sequence[torch.Tensor], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a decoder with look-ahead: the frames it gives out while more may follow."""
    part, _ = _step(vae, direction, inputs[:1], 0, rows - 1, None, rows)
    return part, alone[0][:, :, : part.shape[2]]


def _compare(vae: Any, direction: str, name: str, got: torch.Tensor, want: torch.Tensor, chunking: str) -> Finding:
    if got.shape != want.shape:
        raise RuntimeError(f"{direction}, {name}: shapes {tuple(got.shape)} and {tuple(want.shape)} differ")
    difference = float((got.double() - want.double()).abs().max())
    magnitude = float(want.double().abs().max())
    allowed = 0.0 if chunking == "exact" else ROUNDING[vae.dtype] * max(1.0, magnitude)
    return Finding(direction, name, difference, magnitude, allowed)
