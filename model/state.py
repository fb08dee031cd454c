"""What a causal network must remember between chunks of a video: tensors with the batch in front, and whose they are.

Enters: the tensors a call leaves for the next one. Leaves: the same tensors, after a check that they fit the next call; states put
together or taken apart along the batch. The state is an argument and a return value everywhere; no module keeps any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


ENDED = "ended"


@dataclass(frozen=True, slots=True)
class CausalState:
    """Memory of a running encode or decode. Treat as opaque; `tensors` all have the batch as first axis."""

    owner: str  # network, weights and arithmetic that made it
    kind: str  # "encode" | "decode"
    grid: tuple[int, int]  # latent height, width
    tensors: tuple[torch.Tensor, ...]
    phase: str = (
        ""  # where in the video, for networks whose memory has another shape at its start; `ENDED`: nothing may follow
    )

    @property
    def batch(self) -> int:
        """Videos carried."""
        return int(self.tensors[0].shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def describe(self) -> str:
        """One phrase for messages."""
        where = f", {self.phase}" if self.phase else ""
        return (
            f"{self.kind} state of {self.owner}, batch {self.batch}, latent grid {self.grid[0]}x{self.grid[1]}{where}"
        )


def check(state: object, *, owner: str, kind: str, batch: int, grid: tuple[int, int], device: torch.device) -> None:
    """Raises ValueError if `state` cannot continue this call; names got and expected."""
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
            f"the state does not continue: that {kind} was the end of its video. Start the next video with state None; "
            "while more chunks follow, decode with last=False"
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
    strange = [type(state).__name__ for state in states if not isinstance(state, CausalState)]
    if strange:
        raise ValueError(
            f"stack_states takes states that encode or decode returned, got {', '.join(strange)}; videos at their start (None) "
            "make a batch of their own"
        )
    first = states[0]
    if len(states) == 1:
        return first  # states are never written to, so sharing one is safe
    for other in states[1:]:
        if (other.owner, other.kind, other.grid, other.phase) != (first.owner, first.kind, first.grid, first.phase):
            raise ValueError(f"states cannot be stacked: got {other.describe()} next to {first.describe()}")
    parts = zip(*(state.tensors for state in states), strict=True)
    return CausalState(first.owner, first.kind, first.grid, tuple(torch.cat(part) for part in parts), first.phase)


def split(state: CausalState) -> list[CausalState]:
    """States of batch one that own their memory, so that keeping one does not keep the whole batch alive."""
    if state.batch == 1:
        return [state]
    owner, kind, grid, phase = state.owner, state.kind, state.grid, state.phase
    return [
        CausalState(owner, kind, grid, tuple(tensor[b : b + 1].clone() for tensor in state.tensors), phase)
        for b in range(state.batch)
    ]


def ended(owner: str, kind: str, batch: int, grid: tuple[int, int], device: torch.device) -> CausalState:
    """The state after a video's end: it remembers nothing and refuses to be continued."""
    return CausalState(owner, kind, grid, (torch.empty((batch, 0), device=device),), ENDED)
