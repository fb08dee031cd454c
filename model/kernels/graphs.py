"""Steps of the same shapes recorded once as CUDA graphs and replayed: no launch overhead, however many kernels a step has.

Enters: a step (a function of tensors that keeps nothing), and its tensors. Leaves: what the step returns, in fresh memory. A graph is an
optimisation only: a shape seen for the first time runs as it is, and any number of shapes may take turns (those that find no place run
as they are, and those that could not be recorded for lack of memory: `StepGraphs.given_up`).
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
PATIENCE = 2  # times a shape runs as it is before it is recorded: rare shapes are never worth a graph, and kernels compile meanwhile
IDLE = 64  # runs after which a graph nobody asked for may make room; recording takes as long as many steps
SHAPES_COUNTED = 256


class StepGraphs:
    """A small store of recorded steps; one that lies idle makes room. `record` makes one from a step and example tensors.

    Attributes:
        given_up: keys of steps whose recording ran out of memory. They run as they are and are never recorded again.
    """

    def __init__(self, record: Callable[[Step, Sequence[torch.Tensor]], Replay] | None = None) -> None:
        self._record = record or record_cuda
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._runs = 0
        self._used: dict[Hashable, int] = {}  # the last run of each graph
        self.given_up: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        """`step(*tensors)`. Steps of one `name` and the same shapes must be the same function.

        Raises:
            RuntimeError: the step does not fit, with no graph held (`model.out_of_memory`).
        """
        key = (name, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors), _float32_products())
        self._runs += 1
        try:
            return self._run(key, step, tensors)
        except (RuntimeError, MemoryError) as error:
            if not self._graphs or not is_out_of_memory(error):
                raise
        self.clear()  # what graphs hold may be what the step needs; out here the traceback is gone, and with it what it held
        return step(*tensors)

    def clear(self) -> None:
        """Forgets all graphs and gives their memory back; a shape must keep coming anew to be recorded again."""
        self._graphs.clear()
        self._used.clear()
        self._seen.clear()

    def _run(self, key: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        replay = self._graphs.get(key)
        if replay is None and self._has_place(key):
            replay = self._recorded(key, step, tensors)
        if replay is None:
            return step(*tensors)
        self._graphs.move_to_end(key)
        self._used[key] = self._runs
        return replay(tensors)

    def _has_place(self, key: Hashable) -> bool:
        """Counts the shape, and says whether it may be recorded now; an idle graph makes room."""
        if key in self.given_up:
            return False
        times = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > SHAPES_COUNTED:
            self._seen.popitem(last=False)
        if times <= PATIENCE:
            return False
        if len(self._graphs) >= CAPACITY:
            oldest = next(iter(self._graphs))
            if self._runs - self._used[oldest] <= IDLE:
                return False
            del self._graphs[oldest], self._used[oldest]
        return True

    def _recorded(self, key: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Replay | None:
        """The new graph, or None where memory does not suffice for one."""
        try:
            replay = self._record(step, tensors)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.given_up.add(key)
            return None
        self._graphs[key] = replay
        return replay


def _float32_products() -> tuple[str, str]:
    """A graph keeps the arithmetic it was recorded under, so that is part of what it is looked up by."""
    backends: Any = torch.backends  # what its stubs leave out
    return backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision


@torch.inference_mode(mode=False)
@torch.no_grad()
def record_cuda(step: Step, tensors: Sequence[torch.Tensor]) -> Replay:
    """One step as a CUDA graph with memory of its own; replaying copies the tensors in and the results out, on the current stream.

    Raises:
        RuntimeError: beside what is held there is no memory for the step once more, or for the graph; nothing of the attempt stays.
    """
    held = [tensor.clone() for tensor in tensors]
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(here)
    try:
        with torch.cuda.stream(aside):  # libraries set up their workspaces here, which recording must not do
            step(*held)
    finally:
        here.wait_stream(aside)  # also after an error: what was queued aside still reads `held`
    graph = torch.cuda.CUDAGraph()
    # torch leaves its capture stream current when it cannot end a recording: the outer context returns to this one.
    # thread_local: other threads may allocate and copy meanwhile
    with torch.cuda.stream(here), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = step(*held)

    @torch.no_grad()
    def replay(now: Sequence[torch.Tensor]) -> Tensors:
        with torch.inference_mode(mode=False):
            for mine, given in zip(held, now, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()
        return tuple(result.clone() for result in results)

    return replay
