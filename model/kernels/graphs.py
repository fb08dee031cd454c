"""Steps recorded once per shape as CUDA graphs and replayed, which removes the launch overhead of their kernels.

A step is a function of tensors that keeps no state. Results are always those of calling it, in fresh memory: shapes that are new,
that exceed `CAPACITY`, or whose recording ran out of memory (`StepGraphs.unrecordable`) run eagerly.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from model.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    Tensors = tuple[torch.Tensor, ...]
    Step = Callable[..., Tensors]
    Replay = Callable[[Sequence[torch.Tensor]], Tensors]

CAPACITY = 4  # graphs kept; each holds the memory of one step
# Eager runs of a shape before it is recorded: rare shapes are not worth a graph, and kernels compile meanwhile.
EAGER_RUNS = 2
IDLE_RUNS = 64  # runs after which an unused graph may be replaced; recording takes as long as many steps
SHAPES_COUNTED = 256


class StepGraphs:
    """Recorded steps by name and shapes, at most `CAPACITY`; an idle one is replaced. `record` makes one from a step and example tensors.

    Attributes:
        unrecordable: keys of steps whose recording ran out of memory; they always run eagerly.
    """

    def __init__(self, record: Callable[[Step, Sequence[torch.Tensor]], Replay] | None = None) -> None:
        self._record = record or record_cuda
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._runs = 0
        self._used: dict[Hashable, int] = {}  # number of the last run of each graph
        self.unrecordable: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        """`step(*tensors)`. Steps of one `name` and the same shapes must be the same function.

        Raises:
            RuntimeError: out of memory even without any graph (`model.out_of_memory`).
        """
        key = (name, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors), _float32_products())
        self._runs += 1
        try:
            return self._run(key, step, tensors)
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

    def _run(self, key: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
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

    def _record_or_none(self, key: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Replay | None:
        """The new graph, or None if memory ran out."""
        try:
            replay = self._record(step, tensors)
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


@torch.inference_mode(mode=False)
@torch.no_grad()
def record_cuda(step: Step, tensors: Sequence[torch.Tensor]) -> Replay:
    """Records a step as a CUDA graph with its own memory. A replay copies the inputs in and the results out, on the current stream.

    Raises:
        RuntimeError: not enough memory to run the step again or to record it; everything allocated for it is freed.
    """
    static = [tensor.clone() for tensor in tensors]
    current, warmup = torch.cuda.current_stream(), torch.cuda.Stream()
    warmup.wait_stream(current)
    try:
        # libraries allocate their workspaces in this run, which is not allowed while recording
        with torch.cuda.stream(warmup):
            step(*static)
    finally:
        current.wait_stream(warmup)  # after an error too: queued work still reads `static`
    graph = torch.cuda.CUDAGraph()
    # If a recording fails, torch leaves its capture stream current: the outer context returns to this one.
    # thread_local: other threads may allocate and copy meanwhile.
    with torch.cuda.stream(current), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step(*static)

    @torch.no_grad()
    def replay(inputs: Sequence[torch.Tensor]) -> Tensors:
        with torch.inference_mode(mode=False):
            for target, source in zip(static, inputs, strict=True):
                target.copy_(source, non_blocking=True)
            graph.replay()
        return tuple(result.clone() for result in results)

    return replay
