"""Steps of the same shapes recorded once as CUDA graphs and replayed: no launch overhead, however many kernels a step has.

Enters: a step (a function of tensors that keeps nothing), and its tensors. Leaves: what the step returns, in fresh memory. A graph is an
optimisation only: a shape seen for the first time runs as it is, and any number of shapes may take turns (those that find no place run
as they are).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

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
    """A small store of recorded steps; one that lies idle makes room. `record` makes one from a step and example tensors."""

    def __init__(self, record: Callable[[Step, Sequence[torch.Tensor]], Replay] | None = None) -> None:
        self._record = record or record_cuda
        self._graphs: OrderedDict[Hashable, Replay] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._runs = 0
        self._used: dict[Hashable, int] = {}  # the last run of each graph

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, name: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Tensors:
        """`step(*tensors)`. Steps of one `name` and the same shapes must be the same function."""
        key = (name, tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
        self._runs += 1
        try:
            replay = self._graphs.get(key) or self._recorded(key, step, tensors)
            if replay is None:
                return step(*tensors)
            self._graphs.move_to_end(key)
            self._used[key] = self._runs
            return replay(tensors)
        except torch.OutOfMemoryError:
            self.clear()  # what graphs hold may be what the caller's smaller step needs
            raise

    def clear(self) -> None:
        """Forgets all graphs and gives their memory back."""
        self._graphs.clear()
        self._used.clear()

    def _recorded(self, key: Hashable, step: Step, tensors: Sequence[torch.Tensor]) -> Replay | None:
        times = self._seen[key] = self._seen.pop(key, 0) + 1
        if len(self._seen) > SHAPES_COUNTED:
            self._seen.popitem(last=False)
        if times <= PATIENCE:
            return None
        if len(self._graphs) >= CAPACITY:
            oldest = next(iter(self._graphs))
            if self._runs - self._used[oldest] <= IDLE:
                return None
            del self._graphs[oldest], self._used[oldest]
        self._graphs[key] = replay = self._record(step, tensors)
        return replay


@torch.inference_mode(mode=False)
@torch.no_grad()
def record_cuda(step: Step, tensors: Sequence[torch.Tensor]) -> Replay:
    """One step as a CUDA graph with memory of its own; replaying copies the tensors in and the results out, on the current stream."""
    held = [tensor.clone() for tensor in tensors]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set up their workspaces here, which recording must not do
        step(*held)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may allocate and copy meanwhile
        results = step(*held)

    @torch.no_grad()
    def replay(now: Sequence[torch.Tensor]) -> Tensors:
        with torch.inference_mode(mode=False):
            for mine, given in zip(held, now, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()
        return tuple(result.clone() for result in results)

    return replay
