"""Encoder: runs steps of chunks through the network, with the causal states of their clips.

Takes `FrameChunk`s of equal shape with their states; returns new states at once, and numpy latents on request. On CUDA a launched step runs
while the next one is prepared. If memory runs out, the batch and then the chunk are halved, which does not change any value.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoder.compiling import prepare_compiler
from pipeline.encoder.conditions import Conditions
from pipeline.encoder.network import Network, load_torch, load_vae, network_of
from pipeline.encoder.staging import CudaStaging, HostStaging
from pipeline.encoder.step_budget import StepBudget
from pipeline.errors import BuildError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from model.interface import LatentSpec
    from pipeline.config import ModelConfig
    from pipeline.encoder.conditions import Condition
    from pipeline.records import ChunkShape, FrameChunk

# Pixel-frames per encode step. On a CPU the videos of a step run one after the other: it only has to be long beside the loop's own work.
# A GPU needs many rows at once to fill its matrix units.
STEP_PIXELS_CPU = 17 * 256 * 256
STEP_PIXELS_CUDA = 64 * 17 * 256 * 256


@dataclass(frozen=True, slots=True)
class ClipState:
    """What a clip's next chunk needs: causal state of the network, and the condition where it is stored."""

    network: Any = field(repr=False)
    condition: Condition | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Result of one chunk: float32 `CTHW` on the latent grid, and the state for the clip's next chunk. `cond_Cthw`: of the condition."""

    mean_Cthw: np.ndarray = field(repr=False)
    logvar_Cthw: np.ndarray | None = field(repr=False)
    state: ClipState | None = field(repr=False)
    cond_Cthw: np.ndarray | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Launched:
    """Launched step: `states` can be passed to the next step at once; `results` waits for the latents."""

    states: list[ClipState | None] = field(repr=False)
    results: Callable[[], list[Encoded]]


class Encoder:
    """Network on its device. `threads`: of arithmetic (None: torch's choice); `batch`: most chunks per step (None: by size);
    `conditions`: whether the first frame followed by zeros is encoded as well; `compiled`: whether steps run through `torch.compile`,
    the first of each frame size after up to a minute of compiling.
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
        self._torch = torch
        self._device = torch.device(device)
        self._moments = moments
        self._cuda = self._device.type == "cuda"
        self._staging = CudaStaging(self._device) if self._cuda else HostStaging()
        self._conditions = Conditions(self._vae, self._staging) if conditions else None
        self._budget = StepBudget(
            STEP_PIXELS_CUDA if self._cuda else STEP_PIXELS_CPU, batch, self._free_bytes if self._cuda else None
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
        return int(self._torch.cuda.memory_reserved(self._device)) if self._cuda else 0

    def encode(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> list[Encoded]:
        """Runs a step and waits for its results."""
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
            if _compiling_failed(error):  # no video is to blame, and no other encoder would do better
                line = " ".join(str(error).split())[:400]
                raise BuildError(
                    f"engine.compile: torch.compile failed: {line}; encode into another output with engine.compile=off"
                ) from error
            if not self._is_out_of_memory(error):
                raise
            self._budget.ran_out(len(chunks), frames, height, width)
        self._release_memory()  # after the except block, so that the traceback no longer holds tensors
        if len(chunks) == 1:
            return self._launch_in_parts(chunks[0], states[0])
        half = len(chunks) // 2
        a, b = self.launch(chunks[:half], states[:half]), self.launch(chunks[half:], states[half:])
        return Launched(a.states + b.states, lambda: a.results() + b.results())

    def _launch_in_parts(self, chunk: FrameChunk, state: ClipState | None) -> Launched:
        """Runs a chunk that is too large in two parts along time, split at a group: the same latents with less memory."""
        spec, frames = self.spec, chunk.planes_T3HW.shape[0]
        lead = spec.lead_frames if chunk.first else 0
        groups = (frames - lead) // spec.time_stride
        if spec.chunking == "none" or groups < (1 if lead else 2):
            raise ConfigError(
                f"clips.size: {chunk.planes_T3HW.shape[2]}x{chunk.planes_T3HW.shape[3]} does not fit into the device's memory even "
                f"as {frames} frames alone; use a smaller size, "
                + (
                    f"or shorter clips: {spec.network} encodes whole clips"
                    if spec.chunking == "none"
                    else "or fewer engine.decoders or variants: each variant of each clip in progress keeps its causal state there"
                )
            )
        cut = lead + groups // 2 * spec.time_stride
        planes, times = chunk.planes_T3HW, chunk.pts_s
        kind = type(chunk)
        head = kind(chunk.clip, planes[:cut], times[:cut], chunk.color_matrix, chunk.first, last=False)
        tail = kind(chunk.clip, planes[cut:], times[cut:], chunk.color_matrix, first=False, last=chunk.last)
        a = self.launch([head], [state])
        b = self.launch([tail], a.states)
        return Launched(b.states, lambda: [_joined(a.results()[0], b.results()[0])])

    def _step(self, chunks: Sequence[FrameChunk], states: Sequence[ClipState | None]) -> Launched:
        before = self._watch_memory()
        planes_BT3HW = self._staging.upload([chunk.planes_T3HW for chunk in chunks])
        carried = [state.network for state in states if state is not None]
        before_each = [None if state is None else state.condition for state in states]
        matrices = [chunk.color_matrix for chunk in chunks]
        with self._torch.inference_mode():
            stacked = self._vae.stack_states(carried) if carried else None
            posterior, after = self._vae.encode_planes(planes_BT3HW, matrices, stacked, moments=self._moments)
            mean = self._staging.download(posterior.mean)
            logvar = None if posterior.logvar is None else self._staging.download(posterior.logvar)
            conditions, cond = before_each, None
            if self._conditions is not None:
                conditions, cond = self._conditions.launch(chunks, planes_BT3HW, before_each)
        # Only clips that continue: the state of a last chunk would cost copies, and hold device memory until the clip is written.
        kept: list[ClipState | None] = [None] * len(chunks)
        continuing = [i for i, chunk in enumerate(chunks) if not chunk.last]
        for i, part in zip(continuing, self._vae.split_state(after, continuing), strict=True):
            kept[i] = ClipState(part, conditions[i])
        frames, _, height, width = chunks[0].planes_T3HW.shape
        # A later step needs the state three times more: as input, stacked, and split.
        state_bytes = after.nbytes * (1 if cond is None else 2)
        self._budget.ran(len(chunks), frames, height, width, self._peak_since(before), 3 * state_bytes)

        def results() -> list[Encoded]:
            logvars = [None] * len(chunks) if logvar is None else logvar()
            conds = [None] * len(chunks) if cond is None else cond()
            return [Encoded(*each) for each in zip(mean(), logvars, kept, conds, strict=True)]

        return Launched(kept, results)

    # ---- memory of the device ---------------------------------------------------------------------------------------

    def _free_bytes(self) -> int:
        """Memory available to this process, including what the allocator has reserved but not used."""
        cuda = self._torch.cuda
        free, _ = cuda.mem_get_info(self._device)
        return int(free + cuda.memory_reserved(self._device) - cuda.memory_allocated(self._device))

    def _watch_memory(self) -> int:
        if not self._cuda:
            return 0
        self._torch.cuda.reset_peak_memory_stats(self._device)
        return int(self._torch.cuda.memory_allocated(self._device))

    def _peak_since(self, before: int) -> int:
        return int(self._torch.cuda.max_memory_allocated(self._device)) - before if self._cuda else 0

    def _release_memory(self) -> None:
        if self._cuda:
            self._torch.cuda.empty_cache()


def _compiling_failed(error: Exception) -> bool:
    exceptions = sys.modules.get("torch._dynamo.exc")  # imported where anything was compiled
    return exceptions is not None and isinstance(error, exceptions.TorchDynamoException)


def _joined(a: Encoded, b: Encoded) -> Encoded:
    def joined(one: np.ndarray | None, two: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or two is None else np.concatenate([one, two], axis=1)

    mean = np.concatenate([a.mean_Cthw, b.mean_Cthw], axis=1)
    return Encoded(mean, joined(a.logvar_Cthw, b.logvar_Cthw), b.state, joined(a.cond_Cthw, b.cond_Cthw))
