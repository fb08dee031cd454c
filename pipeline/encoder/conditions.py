"""Conditions of image-to-video models: latents of a clip's first frame followed by zeros, in the steps that encode the clip.

Takes the chunks of a step with the `Condition`s of their clips so far; gives the next `Condition`s at once, and latents on request.
A chunk of zeros that leaves every bit of the causal state as it was does so again: the latents of all later chunks repeat those of this
one, and are not computed. Networks that encode whole clips have one chunk, which is computed as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoder.network import load_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from pipeline.encoder.clip_states import ClipState, ClipStates
    from pipeline.encoder.staging import CudaStaging, HostStaging
    from pipeline.records import FrameChunk

KNOWN_SIZES = 8  # frame sizes of which the settled state is kept on the device


@dataclass(eq=False, slots=True)
class Condition:
    """Condition of one clip so far. `state`: for its next chunk, until it has settled. `repeated`: latents `(C, t, h, w)` of all later
    chunks, once it has.
    """

    state: ClipState | None = field(repr=False)
    repeated: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class _Settled:
    """State that zeros leave as it is, and the latents that they give."""

    state: Any
    latent_Cthw: np.ndarray


class Conditions:
    """Conditions of the clips of one encoder. `computed`: chunks that went through the network."""

    def __init__(self, vae: Any, staging: CudaStaging | HostStaging, states: ClipStates) -> None:
        self._vae, self._staging, self._states = vae, staging, states
        self._torch = load_torch()
        self._settled: dict[tuple[int, int], _Settled] = {}  # by frame height and width
        self.computed = 0

    def launch(
        self, chunks: Sequence[FrameChunk], planes_BT3HW: torch.Tensor, before: Sequence[Condition | None]
    ) -> tuple[list[Condition | None], Callable[[], list[np.ndarray]]]:
        """Launches the conditions of a step: chunks of equal shape and their planes, on any device; `before` is None for first chunks.

        Returns what the next step needs, None for last chunks, and a function that waits for float32 latents `(C, t, h, w)`.
        """
        after: list[Condition | None] = list(before)
        running = [i for i, condition in enumerate(before) if condition is None or condition.repeated is None]
        finish = self._encode(chunks, planes_BT3HW, before, after, running) if running else dict
        frames = chunks[0].planes_T3HW.shape[0] // self._vae.spec.time_stride
        repeats = {i: old.repeated for i, old in enumerate(before) if old is not None and old.repeated is not None}

        def results() -> list[np.ndarray]:
            found: dict[int, np.ndarray] = finish()
            found |= {i: _tiled(latent, frames) for i, latent in repeats.items() if i not in found}
            return [found[i] for i in range(len(chunks))]

        return [None if chunk.last else after[i] for i, chunk in enumerate(chunks)], results

    def _encode(
        self,
        chunks: Sequence[FrameChunk],
        planes_BT3HW: torch.Tensor,
        before: Sequence[Condition | None],
        after: list[Condition | None],
        running: list[int],
    ) -> Callable[[], dict[int, np.ndarray]]:
        """Runs the chunks with numbers `running` through the network and puts their conditions into `after`."""
        olds = [before[i] for i in running]
        states = [old.state for old in olds if old is not None and old.state is not None]
        old = self._states.gather(states) if states else None
        matrices = [chunks[i].color_matrix for i in running]
        posterior, new = self._vae.encode_condition(planes_BT3HW[running], matrices, old)
        self.computed += len(running)
        made = [Condition(state) for state in self._states.keep(new, range(len(running)), [None] * len(running))]
        for i, condition in zip(running, made, strict=True):
            after[i] = condition
        size = planes_BT3HW.shape[3], planes_BT3HW.shape[4]
        known = self._settled.get(size)
        mean = self._staging.download(posterior.mean)
        stays = self._equal(old, new)
        arrived = self._equal(None if known is None else known.state, new)

        def finish() -> dict[int, np.ndarray]:
            means, stay, arrive = mean(), stays(), arrived()
            for place, condition in enumerate(made):
                if stay[place]:
                    condition.repeated = means[place].copy()  # not the latents of the whole batch
                    if size not in self._settled and len(self._settled) < KNOWN_SIZES:
                        self._settled[size] = _Settled(self._vae.split_state(new, [place])[0], condition.repeated)
                elif arrive[place] and known is not None:
                    condition.repeated = known.latent_Cthw
                if condition.repeated is not None:
                    condition.state = None
            return {i: means[place] for place, i in enumerate(running)}

        return finish

    def _equal(self, one: Any, many: Any) -> Callable[[], np.ndarray]:
        """Function that waits for whether each state of the batch `many` has the bits of that in `one`, a batch of as many or of one."""
        if one is None or one.phase != many.phase or _shapes(one) != _shapes(many):
            return lambda: np.zeros(many.batch)
        same = self._torch.ones(many.batch, dtype=self._torch.bool, device=many.tensors[0].device)
        for a, b in zip(one.tensors, many.tensors, strict=True):
            if b.numel():
                same &= (_bits(a, self._torch) == _bits(b, self._torch)).flatten(1).all(1)
        return self._staging.download(same)


def _shapes(state: Any) -> list[tuple[int, ...]]:
    """Shapes of the tensors of one clip."""
    return [tuple(tensor.shape[1:]) for tensor in state.tensors]


def _bits(tensor: torch.Tensor, module: Any) -> torch.Tensor:
    """Values as integers: -0.0 is not 0.0."""
    kinds = {1: module.uint8, 2: module.int16, 4: module.int32, 8: module.int64}
    return tensor.view(kinds[tensor.element_size()])


def _tiled(latent_Cthw: np.ndarray, frames: int) -> np.ndarray:
    """The latents again and again, `frames` of them."""
    times = -(-frames // latent_Cthw.shape[1])
    return np.tile(latent_Cthw, (1, times, 1, 1))[:, :frames]
