"""Causal state of a network between chunks of a video: tensors with the batch as first axis, and which network they belong to.

State is an argument and a return value everywhere; no module keeps any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


ENDED = "ended"


@dataclass(frozen=True, slots=True)
class CausalState:
    """State of an encode or decode in progress. Treat as opaque; all `tensors` have the batch as first axis."""

    owner: str  # network, weights and dtype that made it
    kind: str  # "encode" | "decode"
    grid: tuple[int, int]  # latent height, width
    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    # Position in the video, for networks whose state has another shape at its start; `ENDED`: the video cannot be continued.
    phase: str = ""

    @property
    def batch(self) -> int:
        """Number of videos."""
        return int(self.tensors[0].shape[0])

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def describe(self) -> str:
        """Description for error messages."""
        phase = f", {self.phase}" if self.phase else ""
        return (
            f"{self.kind} state of {self.owner}, batch {self.batch}, latent grid {self.grid[0]}x{self.grid[1]}{phase}"
        )


def check(state: object, *, owner: str, kind: str, batch: int, grid: tuple[int, int], device: torch.device) -> None:
    """Raises ValueError if `state` cannot continue this call."""
    if not isinstance(state, CausalState):
        raise ValueError(f"state must be what the previous {kind} call returned, or None; got {type(state).__name__}")
    expected = f"{kind} state of {owner}, batch {batch}, latent grid {grid[0]}x{grid[1]}"
    if (state.owner, state.kind, state.batch, state.grid) != (owner, kind, batch, grid):
        raise ValueError(
            f"the state does not belong to this chunk: got {state.describe()}; expected {expected}. "
            "Pass the state returned for the previous chunk of the same videos, or None to start"
        )
    if state.phase == ENDED:
        raise ValueError(
            f"the state cannot be continued: that {kind} call ended its video. Start the next video with state None; "
            "if more chunks follow, decode with last=False"
        )
    if state.tensors[0].device != device:
        raise ValueError(
            f"the state is on {state.tensors[0].device}, the chunk on {device}; keep a video on one device"
        )


def stack(states: Sequence[CausalState]) -> CausalState:
    """Batches concatenated in order.

    Raises:
        ValueError: no states, or of different networks, kinds or sizes.
    """
    if not states:
        raise ValueError("stack_states got no states; it needs at least one")
    others = [type(state).__name__ for state in states if not isinstance(state, CausalState)]
    if others:
        raise ValueError(
            f"stack_states takes states that encode or decode returned, got {', '.join(others)}; batch videos at their start (None) "
            "separately"
        )
    first = states[0]
    if len(states) == 1:
        return first  # states are never written to, so sharing one is safe
    for other in states[1:]:
        if (other.owner, other.kind, other.grid, other.phase) != (first.owner, first.kind, first.grid, first.phase):
            raise ValueError(f"states cannot be stacked: got {other.describe()} next to {first.describe()}")
    parts = zip(*(state.tensors for state in states), strict=True)
    return CausalState(first.owner, first.kind, first.grid, tuple(torch.cat(part) for part in parts), first.phase)


def split(state: CausalState, which: Sequence[int] | None = None) -> list[CausalState]:
    """States of batch one that own their memory, so that keeping one does not keep the whole batch alive.

    `which`: places in the batch; the others are not copied. None: all.
    """
    places = range(state.batch) if which is None else which
    if state.batch == 1:
        return [state for _ in places]
    owner, kind, grid, phase = state.owner, state.kind, state.grid, state.phase
    return [
        CausalState(owner, kind, grid, tuple(tensor[b : b + 1].clone() for tensor in state.tensors), phase)
        for b in places
    ]


def ended(owner: str, kind: str, batch: int, grid: tuple[int, int], device: torch.device) -> CausalState:
    """State after the end of a video: empty, and rejected by the next call."""
    return CausalState(owner, kind, grid, (torch.empty((batch, 0), device=device),), ENDED)
