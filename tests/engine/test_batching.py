"""Batches hold one shape, never two chunks of one clip, each clip's chunks in order; no shape waits without limit."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.engine.worker.batching import PATIENCE, Batcher, ClipRun
from pipeline.records import FrameChunk


def chunk(clip=0, frames=4, size=8, *, first=False, last=False):
    planes = np.zeros((frames, 3, size, size), np.uint8)
    return FrameChunk(clip, planes, tuple(float(i) for i in range(frames)), "bt709", first, last)


def test_full_groups_go_first_and_partial_ones_wait_with_full_only():
    batcher = Batcher(lambda shape: 2)
    a, b, c = ClipRun("a"), ClipRun("b"), ClipRun("c")
    batcher.add(a, chunk(frames=4))
    assert batcher.take(full_only=True) == []
    batcher.add(b, chunk(frames=5, first=True))
    batcher.add(c, chunk(frames=5, first=True))
    assert [run.token for run, _ in batcher.take(full_only=True)] == ["b", "c"]
    assert [run.token for run, _ in batcher.take()] == ["a"]
    assert len(batcher) == 0
    assert batcher.nbytes == 0


def test_rare_shape_is_taken_before_full_batches_after_its_patience():
    batcher = Batcher(lambda shape: 1)
    odd = ClipRun("odd")
    waiting = Batcher(lambda shape: 1 if shape[1] == 4 else 2)
    waiting.add(odd, chunk(frames=8))
    for n in range(PATIENCE + 2):
        waiting.add(ClipRun(f"r{n}"), chunk(frames=4))
        taken = [run.token for run, _ in waiting.take()]
        if "odd" in taken:
            break
    assert "odd" in taken
    assert n >= PATIENCE - 1
    assert len(batcher) == 0


def test_drop_removes_chunks_and_their_bytes():
    batcher = Batcher(lambda shape: 4)
    run = ClipRun("a")
    batcher.add(run, chunk())
    batcher.add(run, chunk())
    batcher.drop(run)
    assert batcher.nbytes == 0
    assert batcher.take() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([4, 8])), max_size=40), st.integers(1, 3), st.booleans())
def test_every_chunk_is_taken_once_in_the_order_of_its_clip(arrivals, largest, interleave):
    batcher = Batcher(lambda shape: largest)
    runs = {n: ClipRun(n) for n in range(5)}
    sent = {n: [] for n in runs}
    got = {n: [] for n in runs}

    def take():
        batch = batcher.take()
        assert len(batch) <= largest
        assert len({id(run) for run, _ in batch}) == len(batch)
        assert len({c.shape for _, c in batch}) <= 1
        for run, c in batch:
            got[run.token].append(c)
        return batch

    for n, frames in arrivals:
        c = chunk(frames=frames)
        sent[n].append(c)
        batcher.add(runs[n], c)
        if interleave:
            take()
    while take():
        pass
    for n in runs:
        assert [id(c) for c in got[n]] == [id(c) for c in sent[n]]
    assert batcher.nbytes == 0
