"""Steps recorded once per shape as CUDA graphs and replayed, which removes the launch overhead of their kernels.

A step is a function of tensors that keeps no state. All tensors have the batch as first axis, and a row of a result depends on the same row
of the inputs only. Graphs are recorded for rounded batches (`rounded_batch`) and replayed with fewer rows, so that steps whose batch
varies share a few graphs. Results are always those of calling the step, in fresh memory, up to the rounding of products of another batch.
Shapes that are new, that exceed `CAPACITY`, or whose recording ran out of memory (`StepGraphs.unrecordable`) run eagerly.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    Tensors = tuple[torch.Tensor, ...]
    Step = Callable[..., Tensors]
    Replay = Callable[[Sequence[torch.Tensor]], Tensors]

CAPACITY = 8  # graphs kept: first and later chunks at four batches. All take turns in the memory of one step
# Eager runs of a shape before it is recorded: rare shapes are not worth a graph, and kernels compile meanwhile.
EAGER_RUNS = 2
IDLE_RUNS = 64  # runs after which an unused graph may be replaced; recording takes as long as many steps
SHAPES_COUNTED = 256


def rounded_batch(batch: int, largest: int) -> int:
    """Batch of the graph for a step of `batch` rows: the next power of two, but at most `largest`, the most rows that have run eagerly.

    More rows than have run might not fit into memory; and the batch that a build runs most, its largest, is not padded.
    """
    return min(1 << (batch - 1).bit_length(), max(batch, largest))


class StepGraphs:
    """Recorded steps by name and shapes, at most `CAPACITY`; an idle one is replaced. `record` makes one from a step, example tensors
    and the batch to record.

    Attributes:
        unrecordable: keys of steps whose recording ran out of memory; they always run eagerly.
    """

    def __init__(self, record: Callable[[Step, Sequence[torch.Tensor], int], Replay] | None = None) -> None:
        self._record = record or Recorder()
        self._largest: dict[Hashable, int] = {}  # most rows that ran, by step without its batch
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._runs = 0
        self._used: dict[Hashable, int] = {}  # number of the last run of each graph
        self.unrecordable: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        """`step(*tensors)`. Steps of one `name` and the same shapes after the first axis must be the same function.

        Raises:
            RuntimeError: out of memory even without any graph (`model.out_of_memory`).
        """
        kind = (name, tuple((tuple(tensor.shape[1:]), tensor.dtype) for tensor in tensors), _float32_products())
        batch = tensors[0].shape[0]
        self._largest[kind] = max(batch, self._largest.get(kind, 0))
        self._runs += 1
        try:
            return self._run((kind, rounded_batch(batch, self._largest[kind])), step, tensors)
        except (RuntimeError, MemoryError) as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
        # Free the graphs' memory and try again. Outside the except block, so that the traceback no longer holds tensors.
        self.clear()
        return step(*tensors)

    def clear(self) -> None:
        """Drops all graphs and frees their memory; shapes are counted from zero again."""
        self._graphs.clear()
        self._used.clear()
        self._seen.clear()

    def _run(self, key: tuple[Hashable, int], step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        replay = self._graphs.get(key)
        if replay is None and self._may_record(key):
            replay = self._record_or_none(key, step, tensors)
        if replay is None:
            return step(*tensors)
        self._graphs.move_to_end(key)
        self._used[key] = self._runs
        return replay(tensors)

    def _may_record(self, key: Hashable) -> bool:
        """Counts a run of the shape; whether it may be recorded now. Drops an idle graph if all places are taken."""
        if key in self.unrecordable:
            return False
        times = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > SHAPES_COUNTED:
            self._seen.popitem(last=False)
        if times <= EAGER_RUNS:
            return False
        if len(self._graphs) >= CAPACITY:
            oldest = next(iter(self._graphs))
            if self._runs - self._used[oldest] <= IDLE_RUNS:
                return False
            del self._graphs[oldest], self._used[oldest]
        return True

    def _record_or_none(self, key: tuple[Hashable, int], step: Step, tensors: Sequence[torch.Tensor]) -> Replay | None:
        """The new graph, or None if memory ran out."""
        try:
            replay = self._record(step, tensors, key[1])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.unrecordable.add(key)
            return None
        self._graphs[key] = replay
        return replay


def _float32_products() -> tuple[str, str]:
    """Precision of float32 products; part of the key, because a graph keeps the precision it was recorded with."""
    backends: Any = torch.backends  # the type stubs lack these attributes
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


class Recorder:
    """Records steps as CUDA graphs. All graphs of a recorder share one memory pool: they never run at once, nothing in the pool is read
    after the next replay, and a graph of its own per shape would hold the memory of a step each.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._recorded: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __call__(self, step: Step, tensors: Sequence[torch.Tensor], batch: int) -> Replay:
        """Graph of `step` for `batch` rows. A replay copies at most so many rows in and as many results out, on the current stream.

        Raises:
            RuntimeError: not enough memory to run the step again or to record it; everything allocated for it is freed.
        """
        static = [padded(tensor, batch) for tensor in tensors]
        # One stream of the network's own device: torch's is that of the first device that recorded, and libraries keep a workspace for
        # each stream, which they allocate in the first run and not in the graph's pool.
        current = torch.cuda.current_stream()
        recording = self._stream = self._stream or torch.cuda.Stream()
        recording.wait_stream(current)
        try:
            with torch.cuda.stream(recording):
                step(*static)
        finally:
            current.wait_stream(recording)  # after an error too: queued work still reads `static`
        graph = torch.cuda.CUDAGraph()
        # If a recording fails, torch leaves the capture stream current: the outer context returns to this one.
        # thread_local: other threads may allocate and copy meanwhile.
        try:
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, self._shared_pool(), recording, capture_error_mode="thread_local"),
            ):
                results = step(*static)
        except BaseException:
            self._recorded = (
                weakref.WeakSet()
            )  # the next graph gets a new pool: this one may hold what was half recorded
            raise
        self._recorded.add(graph)

        @torch.no_grad()
        def replay(inputs: Sequence[torch.Tensor]) -> Tensors:
            rows = inputs[0].shape[0]
            with torch.inference_mode(mode=False):
                for target, source in zip(static, inputs, strict=True):
                    target[:rows].copy_(source, non_blocking=True)  # other rows are those of an earlier step
                graph.replay()
            return tuple(result[:rows].clone() for result in results)

        return replay

    def _shared_pool(self) -> Any:
        """Pool of the graphs that are left; a new one if there are none, because torch frees a pool with its last graph."""
        if not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool


def padded(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Copy of the tensor with zeros after its rows, `batch` of them in all."""
    copy = tensor.new_zeros((batch, *tensor.shape[1:]))
    copy[: tensor.shape[0]].copy_(tensor)
    return copy
