"""History of causal layers: the last frames of a layer's input, from the step before and for the next one.

A step is a network's run over some frames of a video; `History` is made for one step. Layers that look back call it in the order in
which they run, which is the same in every step: the order numbers them. Between steps the state of a video is the plain tuple of
tensors that `History.tensors` returns, all with the batch as first axis. Whole videos (training) run with `WHOLE`.
"""

from __future__ import annotations

from typing import Literal

import torch

StateTensors = tuple[torch.Tensor, ...]  # what one step leaves for the next; the first axis of each is the batch
Start = Literal["zeros", "first"]  # what a layer sees before a video: zeros, or the first frame repeated


class History:
    """What the layers of one step see of the frames before it.

    Attributes:
        first: whether the step begins the video. last: whether it ends the video. It must be false for every other step: interpolation
            in time (WF-VAE) holds a frame back until it sees the next one, and returns it in the last step.
    """

    def __init__(self, past: StateTensors | None = None, *, keep: bool = True, last: bool = True) -> None:
        """`past`: `tensors()` of the step before, None at a video's start. Without `keep` nothing is kept for a next step."""
        self.first, self.last = past is None, last
        self._past, self._keep, self._taken = past, keep, 0
        self._kept: list[torch.Tensor] = []

    def extend(self, x: torch.Tensor, frames: int, *, axis: int, start: Start) -> torch.Tensor:
        """`x` after the `frames` frames before it along `axis`, the layer's input before this step."""
        past = self.take()
        if past is None:
            edge = x.narrow(axis, 0, 1)
            past = torch.zeros_like(edge) if start == "zeros" else edge
            past = torch.cat([past] * frames, dim=axis)
        whole = torch.cat([past, x], dim=axis)
        self.keep(whole.narrow(axis, whole.shape[axis] - frames, frames))
        return whole

    def take(self) -> torch.Tensor | None:
        """The tensor that this layer kept in the step before; None at a video's start. Once a layer and step, before `keep`.

        Raises:
            RuntimeError: more layers than in the step before.
        """
        if self._past is None:
            return None
        if self._taken >= len(self._past):
            raise RuntimeError(
                f"layer {self._taken} has no history; the step before had {len(self._past)} layers with one"
            )
        self._taken += 1
        return self._past[self._taken - 1]

    def keep(self, x: torch.Tensor) -> None:
        """Keeps a copy of `x` for the next step, so that a state does not keep whole activations alive."""
        if self._keep:
            # Unlike clone, cat of one gives compact strides in the memory format of x; compiled steps drop it, see `_compact`.
            self._kept.append(torch.cat([x]))

    def tensors(self) -> StateTensors:
        """State for the next step.

        Raises:
            RuntimeError: another number of layers than in the step before.
        """
        if self._past is not None and (self._taken, len(self._kept)) != (len(self._past), len(self._past)):
            raise RuntimeError(
                f"{self._taken} layers took a history and {len(self._kept)} kept one, of {len(self._past)}"
            )
        return tuple(self._kept)


WHOLE = History(keep=False)
"""History of a whole video in one step: nothing comes before or after it."""
