"""Encoder: runs steps of chunks through the network, with the causal states of their clips.

Takes `FrameChunk`s of equal shape with their states; returns new states at once, and numpy latents on request. On CUDA a launched step runs
while the next one is prepared. If memory runs out, the batch and then the chunk are halved, which does not change any value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pipeline.encoder.clip_states import ClipStates, stacked_order
from pipeline.encoder.compiling import check_compiled, prepare_compiler
from pipeline.encoder.conditions import Conditions
from pipeline.encoder.device_memory import DeviceMemory
from pipeline.encoder.network import Network, load_torch, load_vae, network_of
from pipeline.encoder.staging import CudaStaging, HostStaging
from pipeline.encoder.step_budget import StepBudget
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from model.interface import LatentSpec
    from pipeline.config import ModelConfig
    from pipeline.encoder.clip_states import ClipState
    from pipeline.records import ChunkShape, FrameChunk

# Pixel-frames per encode step. On a CPU the videos of a step run one after the other: it only has to be long beside the loop's own work.
# A GPU needs many rows at once to fill its matrix units.
STEP_PIXELS_CPU = 17 * 256 * 256
STEP_PIXELS_CUDA = 64 * 17 * 256 * 256
# Share of a GPU's memory for causal states unless the job sets it. Parking costs transfers, so not before memory gets scarce for steps.
STATE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of one chunk: float32 `CTHW` on the latent grid. `cond_Cthw`: of the condition."""

    mean_Cthw: np.ndarray = field(repr=False)
    logvar_Cthw: np.ndarray | None = field(repr=False)
    cond_Cthw: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Launched:
    """Launched step: `states` can be passed to the next step at once; `results` waits for the latents. Keep `results` only: a state that
    is referenced stays in memory.
    """

    states: list[ClipState | None] = field(repr=False)
    results: Callable[[], list[Encoded]]


class Encoder:
    """Network on its device. `threads`: of arithmetic (None: torch's choice); `batch`: most chunks per step (None: by size);
    `conditions`: whether the first frame followed by zeros is encoded as well; `state_bytes`: most bytes of causal states on a GPU
    (None: half of its memory); `compiled`: whether steps run through `torch.compile`, the first of each frame size after up to a
    minute of compiling.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: str,
        compute_dtype: str,
        *,
        moments: bool = False,
        conditions: bool = False,
        threads: int | None = None,
        batch: int | None = None,
        state_bytes: int | None = None,
        compiled: bool = False,
    ) -> None:
        if compiled:
            prepare_compiler(device, threads)
        torch = load_torch()
        if threads is not None:
            torch.set_num_threads(threads)
        from model.out_of_memory import is_out_of_memory  # imports torch, so only after `load_torch`

        self._is_out_of_memory = is_out_of_memory
        self._vae = load_vae(config, device, compute_dtype, compiled=compiled)
        self._vae.drop_decoder()
        self._torch = torch
        device_of_vae = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        cuda = device_of_vae.type == "cuda"
        self._moments = moments
        self._memory = DeviceMemory(device_of_vae, torch.cuda)
        self._staging = CudaStaging(device_of_vae) if cuda else HostStaging()
        self._states = ClipStates(
            self._vae, self._staging, (state_bytes or int(STATE_SHARE * self._memory.total())) if cuda else None
        )
        self._conditions = Conditions(self._vae, self._staging, self._states) if conditions else None
        self._budget = StepBudget(
            STEP_PIXELS_CUDA if cuda else STEP_PIXELS_CPU, batch, self._memory.free if cuda else None
        )
        self.spec: LatentSpec = self._vae.spec
        self.overlaps = self._staging.overlaps  # whether a step runs while the caller prepares the next

    def network(self) -> Network:
        """Identity of the loaded network, equal to that of `identify`."""
        return network_of(self._vae.identity(), moments=self._moments)

    def largest_batch(self, shape: ChunkShape) -> int:
        """Most chunks of this shape per step."""
        return self._budget.chunks(*shape[1:])

    def choices(self) -> dict[str, int]:
        """Chunks per step by chunk shape, as chosen so far."""
        return self._budget.choices()

    def compile_s(self) -> float:
        """Seconds spent compiling so far; grows while a step is being compiled. May be called from any thread."""
        return float(self._vae.compile_s)

    def device_bytes(self) -> int:
        """Memory of the GPU that this process has reserved for tensors; 0 on a CPU."""
        return self._memory.reserved()

    def encode(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> list[Encoded]:
        """Runs a step and waits for its results, without states."""
        return self.launch(chunks, states).results()

    def launch(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> Launched:
        """Launches a step: `chunks` have equal shapes, `states` (None for first chunks) are theirs, in order.

        Raises:
            ConfigError: a single group of frames does not fit into the device's memory.
            BuildError: `torch.compile` failed.
        """
        frames, _, height, width = chunks[0].planes_T3HW.shape
        if len(chunks) == 1 and self._budget.too_long(frames, height, width):
            return self._launch_in_parts(chunks[0], states[0])
        try:
            return self._step(chunks, states)
        except (RuntimeError, MemoryError) as error:
            if not self._is_out_of_memory(error):
                check_compiled(error, "encode into another output with engine.compile=off")
                raise
        # After the except block, so that the traceback no longer holds tensors.
        with self._torch.inference_mode():
            parked = self._states.park()
        self._memory.release()
        if parked:  # states of waiting clips took the memory, not this step
            return self.launch(chunks, states)
        self._budget.ran_out(len(chunks), frames, height, width)
        if len(chunks) == 1:
            return self._launch_in_parts(chunks[0], states[0])
        half = len(chunks) // 2
        a, b = self.launch(chunks[:half], states[:half]), self.launch(chunks[half:], states[half:])
        firsts, seconds = a.results, b.results
        return Launched(a.states + b.states, lambda: firsts() + seconds())

    def _launch_in_parts(self, chunk: FrameChunk, state: ClipState | None) -> Launched:
        """Runs a chunk that is too large in two parts along time, split at a group: the same latents with less memory."""
        spec, frames = self.spec, chunk.planes_T3HW.shape[0]
        lead = spec.lead_frames if chunk.first else 0
        groups = (frames - lead) // spec.time_stride
        if spec.chunking == "none" or groups < (1 if lead else 2):
            raise ConfigError(
                f"clips.size: {chunk.planes_T3HW.shape[2]}x{chunk.planes_T3HW.shape[3]} does not fit into the device's memory even "
                f"as {frames} frames alone; use a smaller size"
                + (f", or shorter clips: {spec.network} encodes whole clips" if spec.chunking == "none" else "")
            )
        cut = lead + groups // 2 * spec.time_stride
        planes, times = chunk.planes_T3HW, chunk.pts_s
        kind = type(chunk)
        head = kind(chunk.clip, planes[:cut], times[:cut], chunk.color_matrix, chunk.first, last=False)
        tail = kind(chunk.clip, planes[cut:], times[cut:], chunk.color_matrix, first=False, last=chunk.last)
        a = self.launch([head], [state])
        b = self.launch([tail], a.states)
        firsts, seconds = a.results, b.results
        return Launched(b.states, lambda: [_joined(firsts()[0], seconds()[0])])

    def _step(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> Launched:
        """Runs a step in the order of the stacked states, so that the same clips in another order are not copied."""
        order = stacked_order(states)
        launched = self._ordered_step([chunks[i] for i in order], [states[i] for i in order])
        place = {i: position for position, i in enumerate(order)}
        results_of = launched.results

        def results() -> list[Encoded]:
            found = results_of()
            return [found[place[i]] for i in range(len(order))]

        return Launched([launched.states[place[i]] for i in range(len(order))], results)

    def _ordered_step(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> Launched:
        before = self._memory.watch()
        planes_BT3HW = self._staging.upload([chunk.planes_T3HW for chunk in chunks])
        carried = [state for state in states if state is not None]
        conditions = [None if state is None else state.condition for state in states]
        matrices = [chunk.color_matrix for chunk in chunks]
        with self._torch.inference_mode():
            stacked = self._states.gather(carried) if carried else None
            posterior, after = self._vae.encode_planes(planes_BT3HW, matrices, stacked, moments=self._moments)
            mean = self._staging.download(posterior.mean)
            logvar = None if posterior.logvar is None else self._staging.download(posterior.logvar)
            cond = None
            if self._conditions is not None:
                conditions, cond = self._conditions.launch(chunks, planes_BT3HW, conditions)
            # The state of a last chunk would cost copies, and hold device memory until the clip is written.
            continuing = [i for i, chunk in enumerate(chunks) if not chunk.last]
            kept: list[ClipState | None] = [None] * len(chunks)
            states_kept = self._states.keep(after, continuing, [conditions[i] for i in continuing])
            for i, state in zip(continuing, states_kept, strict=True):
                kept[i] = state
        frames, _, height, width = chunks[0].planes_T3HW.shape
        # A later step needs the state twice more: as clips left it in other steps, and gathered from there.
        state_bytes = after.nbytes * (1 if cond is None else 2)
        self._budget.ran(len(chunks), frames, height, width, self._memory.peak_since(before), 2 * state_bytes)

        def results() -> list[Encoded]:
            logvars = [None] * len(chunks) if logvar is None else logvar()
            conds = [None] * len(chunks) if cond is None else cond()
            return [Encoded(*each) for each in zip(mean(), logvars, conds, strict=True)]

        return Launched(kept, results)


def _joined(a: Encoded, b: Encoded) -> Encoded:
    def joined(one: np.ndarray | None, two: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or two is None else np.concatenate([one, two], axis=1)

    mean = np.concatenate([a.mean_Cthw, b.mean_Cthw], axis=1)
    return Encoded(mean, joined(a.logvar_Cthw, b.logvar_Cthw), joined(a.cond_Cthw, b.cond_Cthw))
