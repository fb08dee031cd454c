"""Recorded steps: when a shape is recorded, which graphs are dropped, and that values do not depend on it."""

from __future__ import annotations

import contextlib

import pytest
import torch

from model.kernels.graphs import CAPACITY, EAGER_RUNS, IDLE_RUNS, StepGraphs, padded, rounded_batch


class Recorder:
    """Replaces CUDA: keeps padded copies of the inputs as a graph does, and replays the step on them. `batches`: those recorded."""

    def __init__(self):
        self.recorded, self.replayed, self.batches = 0, 0, []

    def __call__(self, step, tensors, batch):
        held = [padded(tensor, batch) for tensor in tensors]
        self.recorded += 1
        self.batches.append(batch)

        def replay(now):
            self.replayed += 1
            rows = len(now[0])
            for mine, given in zip(held, now, strict=True):
                mine[:rows].copy_(given)
                if mine.is_floating_point():
                    mine[rows:].fill_(float("nan"))  # what an earlier step left is not for this one
            return tuple(result[:rows].clone() for result in step(*held))

        return replay


def double(x):
    return (2 * x,)


def test_a_repeated_shape_is_recorded_once():
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    for time in range(EAGER_RUNS + 3):
        x = torch.full((2, 3), float(time))
        (got,) = graphs.run("double", double, (x,))
        assert torch.equal(got, 2 * x)
    assert (recorder.recorded, recorder.replayed, len(graphs)) == (1, 3, 1)


def test_graphs_are_kept_by_name_shape_and_dtype():
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    calls = [
        ("double", double, torch.ones(1, 2)),
        ("double", double, torch.ones(1, 3)),
        ("double", double, torch.ones(1, 2, dtype=torch.float64)),
        ("negate", lambda x: (-x,), torch.ones(1, 2)),
    ]
    for _ in range(EAGER_RUNS + 2):
        for name, step, x in calls:
            (got,) = graphs.run(name, step, (x,))
            assert torch.equal(got, step(x)[0])
            assert got.dtype == x.dtype
    assert recorder.recorded == len(graphs) == 4


def test_only_idle_graphs_are_replaced():
    recorder = Recorder()
    graphs = StepGraphs(recorder)

    def use(*sizes):
        for size in sizes:
            x = torch.ones(1, size)
            assert torch.equal(graphs.run("double", double, (x,))[0], 2 * x)

    known = range(1, CAPACITY + 1)
    for size in known:
        use(*[size] * (EAGER_RUNS + 1))
    # one shape too many, in turns with the others: it is not recorded, and no graph is dropped
    for _ in range(IDLE_RUNS):
        use(*known, CAPACITY + 1)
    assert (recorder.recorded, len(graphs)) == (CAPACITY, CAPACITY)
    # all but the first are used; the first is idle and its graph is dropped
    for _ in range(IDLE_RUNS):
        use(*known[1:], CAPACITY + 1)
    assert (recorder.recorded, len(graphs)) == (CAPACITY + 1, CAPACITY)
    replayed = recorder.replayed
    use(1)
    assert recorder.replayed == replayed
    use(*known[1:], CAPACITY + 1)
    assert recorder.replayed == replayed + CAPACITY


def test_batch_is_rounded_to_a_power_of_two_but_not_beyond_what_has_run():
    assert [rounded_batch(batch, 64) for batch in (1, 2, 3, 5, 33, 64)] == [1, 2, 4, 8, 64, 64]
    assert [rounded_batch(batch, 48) for batch in (16, 17, 33, 48)] == [16, 32, 48, 48]
    assert rounded_batch(68, 0) == 68


def test_steps_whose_batch_varies_replay_a_few_graphs():
    recorder, generator = Recorder(), torch.Generator().manual_seed(0)
    graphs, steps = StepGraphs(recorder), 200
    batches = torch.randint(1, 49, (steps,), generator=generator).tolist()
    for batch in [48, *batches]:  # a build runs its largest batch as soon as it may
        x, y = torch.randn(batch, 3, generator=generator), torch.randn(batch, 2, generator=generator)
        got = graphs.run("both", lambda x, y: (x + y[:, :1], 2 * y), (x, y))
        assert torch.equal(got[0], x + y[:, :1])
        assert torch.equal(got[1], 2 * y)
    assert set(recorder.batches) <= {1, 2, 4, 8, 16, 32, 48}
    assert recorder.recorded == len(graphs)  # none was replaced
    assert recorder.replayed > 0.9 * steps


def test_results_are_not_overwritten_by_the_next_step():
    graphs = StepGraphs(Recorder())
    results = [graphs.run("double", double, (torch.full((2,), float(n)),))[0] for n in range(EAGER_RUNS + 3)]
    assert [float(result[0]) for result in results] == [2.0 * n for n in range(EAGER_RUNS + 3)]


def test_out_of_memory_frees_all_graphs():
    graphs = StepGraphs(Recorder())
    for _ in range(EAGER_RUNS + 1):
        graphs.run("double", double, (torch.ones(2),))
    assert len(graphs) == 1

    def too_large(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("large", too_large, (torch.ones(2),))
    assert len(graphs) == 0


def test_a_step_too_large_to_record_always_runs_eagerly():
    recorder, attempts = Recorder(), []

    def record(step, tensors, batch):
        if batch < 3:
            return recorder(step, tensors, batch)
        attempts.append(batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs = StepGraphs(record)
    for time in range(EAGER_RUNS + 4):
        for size in (2, 3):
            x = torch.full((size,), float(time))
            assert torch.equal(graphs.run("double", double, (x,))[0], 2 * x)
    assert attempts == [3]
    assert len(graphs.unrecordable) == 1
    # the other shape keeps its graph
    assert (recorder.recorded, recorder.replayed, len(graphs)) == (1, 4, 1)


def test_other_failures_of_a_recording_are_raised():
    def record(step, tensors, batch):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = StepGraphs(record)
    for _ in range(EAGER_RUNS):
        graphs.run("double", double, (torch.ones(2),))
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.run("double", double, (torch.ones(2),))
    assert not graphs.unrecordable


def test_a_step_that_fits_without_graphs_is_retried_without_them():
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    calls = []

    def fits_alone(x):
        calls.append(len(graphs))
        if len(graphs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return (x + 1,)

    for _ in range(EAGER_RUNS + 1):
        graphs.run("double", double, (torch.ones(2),))
    (got,) = graphs.run("large", fits_alone, (torch.ones(2),))
    assert torch.equal(got, torch.full((2,), 2.0))
    assert calls == [1, 0]
    # what was forgotten must keep coming to be recorded again
    for _ in range(EAGER_RUNS):
        graphs.run("double", double, (torch.ones(2),))
    assert (recorder.recorded, len(graphs)) == (1, 0)
    graphs.run("double", double, (torch.ones(2),))
    assert (recorder.recorded, len(graphs)) == (2, 1)


def test_a_step_that_never_fits_is_retried_once_if_graphs_were_held():
    graphs, tries = StepGraphs(Recorder()), []

    def too_large(x):
        tries.append(len(graphs))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("large", too_large, (torch.ones(2),))
    assert tries == [0]
    for _ in range(EAGER_RUNS + 1):
        graphs.run("double", double, (torch.ones(2),))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.run("large", too_large, (torch.ones(2),))
    assert tries == [0, 1, 0]


def test_a_replay_that_runs_out_of_memory_falls_back_to_the_step():
    def record(step, tensors, batch):
        def replay(now):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return replay

    graphs = StepGraphs(record)
    for _ in range(EAGER_RUNS + 1):
        assert torch.equal(graphs.run("double", double, (torch.ones(2),))[0], torch.full((2,), 2.0))
    assert len(graphs) == 0


class FakeStream:
    def wait_stream(self, other):
        assert other is not self


class FakeCuda:
    """What `graphs.Recorder` needs of `torch.cuda`. `pools`: of each capture. `captured`: the graph being recorded."""

    def __init__(self):
        self.pools, self.streams, self.handles = [], [], 0
        self.current, self.captured, self.fails = FakeStream(), None, False

    def current_stream(self):
        return self.current

    def Stream(self):  # noqa: N802 - torch's name
        self.streams.append(FakeStream())
        return self.streams[-1]

    def stream(self, stream):
        assert stream in (self.current, *self.streams)
        return contextlib.nullcontext()

    def graph_pool_handle(self):
        self.handles += 1
        return self.handles

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert stream in self.streams
        self.pools.append(pool)
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.captured = graph
        yield
        self.captured = None

    class CUDAGraph:
        def replay(self):
            self.again()


def test_recorded_graphs_share_a_stream_and_a_pool(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr("model.kernels.graphs.torch.cuda", cuda)

    def step(x):
        y = 2 * x
        if cuda.captured is not None:  # a replay writes the same memory again
            cuda.captured.again = lambda: torch.mul(x, 2, out=y)
        return (y,)

    graphs = StepGraphs()

    def run(size):
        for rows in (*[3] * (EAGER_RUNS + 2), 2):
            x = torch.randn(rows, size)
            assert torch.equal(graphs.run("double", step, (x,))[0], 2 * x)

    run(1)
    run(2)
    assert (len(cuda.streams), cuda.pools) == (1, [1, 1])
    graphs.clear()
    run(1)
    assert cuda.pools == [1, 1, 2]  # torch has freed the first pool with its last graph
    cuda.fails = True
    run(2)
    cuda.fails = False
    run(3)
    assert cuda.pools[3:] == [2, 3]  # nothing is recorded into the pool of a recording that failed
    assert len(graphs) == 2


@pytest.fixture
def convolutions():
    """torch's switch for float32 convolutions, restored afterwards."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


def test_a_graph_is_not_replayed_under_another_float32_precision(convolutions):
    recorder = Recorder()
    graphs = StepGraphs(recorder)
    for precision in ("ieee", "tf32"):
        convolutions.fp32_precision = precision
        for _ in range(EAGER_RUNS + 1):
            graphs.run("double", double, (torch.ones(2),))
    assert (recorder.recorded, recorder.replayed) == (2, 2)
