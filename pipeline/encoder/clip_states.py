"""Causal states of clips between their steps, stacked as the step left them, so that a batch that stays together is not copied.

Takes the stacked state after a step and which of its clips continue; gives the stacked state for any later step. Clips that regroup are
copied once. A stack of which less than half is needed is copied together, so that a waiting clip does not keep its batch in memory. On a
GPU the states of clips that have waited longest are parked in host memory while more than a byte budget of them is on the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from pipeline.encoder.conditions import Condition
    from pipeline.encoder.staging import CudaStaging, HostStaging


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Stack:
    """States of some clips, batch first. `clips`: those that still need theirs. `parked`: in host memory. `number`: in order of making."""

    state: Any
    parked: bool
    number: int
    clips: weakref.WeakSet[ClipState] = field(default_factory=weakref.WeakSet)


@dataclass(eq=False, slots=True, weakref_slot=True)
class ClipState:
    """What a clip's next chunk needs: its place in the stacked causal state, and the condition where it is stored. Opaque."""

    stack: _Stack = field(repr=False)
    place: int
    condition: Condition | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.stack.clips.add(self)


class ClipStates:
    """States of the clips of one encoder; a clip's is freed when its `ClipState` is.

    Args:
        vae: the network, which stacks and splits states.
        staging: moves tensors to host memory and back, if there is a budget.
        device_bytes: most bytes of states on the device; None: nothing is parked.
    """

    def __init__(self, vae: Any, staging: CudaStaging | HostStaging, device_bytes: int | None = None) -> None:
        self._vae, self._staging, self._budget = vae, staging, device_bytes
        self._stacks: weakref.WeakValueDictionary[int, _Stack] = weakref.WeakValueDictionary()  # oldest first
        self._made = 0

    @property
    def device_bytes(self) -> int:
        """Bytes of states on the device."""
        return sum(stack.state.nbytes for stack in self._on_the_device())

    def gather(self, clips: Sequence[ClipState]) -> Any:
        """Stacked state of these clips in order, on the device. Not a copy if they are all clips of a stack there; do not write to it."""
        stack = clips[0].stack
        whole = all(clip.stack is stack and clip.place == place for place, clip in enumerate(clips))
        if whole and len(clips) == stack.state.batch:
            return self._on_device(stack, stack.state)
        return self._vae.stack_states(
            [self._on_device(clip.stack, _row(clip.stack.state, clip.place)) for clip in clips]
        )

    def keep(self, after: Any, places: Sequence[int], conditions: Sequence[Condition | None]) -> list[ClipState]:
        """Keeps the states at `places` of the stacked state after a step, each with its condition, and parks what exceeds the budget."""
        if not places:
            return []
        stack = self._add(after)
        kept = [ClipState(stack, place, condition) for place, condition in zip(places, conditions, strict=True)]
        for crowded in list(self._stacks.values()):
            if 2 * len(crowded.clips) < crowded.state.batch:
                self._compact(crowded)
        if self._budget is not None:
            self.park(self._budget)
        return kept

    def park(self, device_bytes: int = 0) -> int:
        """Moves states to host memory, oldest first, until at most `device_bytes` are on the device; returns how many bytes were moved.

        Nothing is moved without a budget.
        """
        if self._budget is None:
            return 0
        left, moved = self.device_bytes, 0
        for stack in self._on_the_device():
            if left - moved <= device_bytes:
                break
            moved += stack.state.nbytes
            self._park(stack)
        return moved

    def _on_the_device(self) -> list[_Stack]:
        """Stacks there, oldest first. One without clips is about to be freed: only the caller still refers to it."""
        return [stack for stack in self._stacks.values() if stack.clips and not stack.parked]

    def _park(self, stack: _Stack) -> None:
        # Each clip by itself: they are unlikely to continue together, and their memory in the host is freed one by one.
        for clip in list(stack.clips):
            row = _moved(_row(stack.state, clip.place), self._staging.park)
            self._place([clip], self._add(row, parked=True))

    def _compact(self, stack: _Stack) -> None:
        clips = sorted(stack.clips, key=lambda clip: clip.place)
        if not clips:
            return  # its last clip is just ending
        places = [clip.place for clip in clips]
        rows = (
            self._vae.split_state(stack.state, places)[0]
            if len(places) == 1
            else self._vae.stack_states([_row(stack.state, place) for place in places])
        )
        self._place(clips, self._add(rows))

    def _place(self, clips: Iterable[ClipState], stack: _Stack) -> None:
        for place, clip in enumerate(clips):
            clip.stack.clips.discard(clip)
            clip.stack, clip.place = stack, place
            stack.clips.add(clip)

    def _add(self, state: Any, *, parked: bool = False) -> _Stack:
        self._made += 1
        stack = self._stacks[self._made] = _Stack(state, parked, self._made)
        return stack

    def _on_device(self, stack: _Stack, state: Any) -> Any:
        return _moved(state, self._staging.unpark) if stack.parked else state


def stacked_order(states: Sequence[ClipState | None]) -> list[int]:
    """Order of a batch in which clips lie as in their stacks."""

    def key(i: int) -> tuple[int, int]:
        state = states[i]
        return (0, 0) if state is None else (state.stack.number, state.place)

    return sorted(range(len(states)), key=key)


def _row(state: Any, place: int) -> Any:
    """View of one clip's state, which shares memory."""
    return replace(state, tensors=tuple(tensor[place : place + 1] for tensor in state.tensors))


def _moved(state: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return replace(state, tensors=tuple(move(tensor) for tensor in state.tensors))
