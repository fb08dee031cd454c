"""Bytes that count as free for a step, by a scripted allocator; copies of chunks into a batch."""

from __future__ import annotations

import threading

import numpy as np
import torch

from pipeline.encoder.device_memory import DeviceMemory
from pipeline.encoder.staging import BatchCopy


class Allocator:
    """Replaces `torch.cuda`: 100 bytes are free; segments as `torch.cuda.memory_snapshot` gives them."""

    def __init__(self, *segments):
        self.segments, self.snapshots = list(segments), 0

    def memory_reserved(self, device):
        return sum(segment["total_size"] for segment in self.segments if segment["device"] == device.index)

    def memory_allocated(self, device):
        return sum(segment["allocated_size"] for segment in self.segments if segment["device"] == device.index)

    def mem_get_info(self, device):
        return 100, 1000

    def memory_snapshot(self):
        self.snapshots += 1
        return self.segments


def segment(total, allocated, pool=(0, 0), device=0):
    return {"device": device, "total_size": total, "allocated_size": allocated, "segment_pool_id": pool}


def test_idle_memory_of_cuda_graphs_is_not_free():
    allocator = Allocator(segment(300, 120), segment(200, 50, pool=(0, 1)), segment(70, 0, pool=(0, 2), device=1))
    memory = DeviceMemory(torch.device("cuda:0"), allocator)
    assert memory.free() == 100 + (300 - 120)
    assert memory.free() == 100 + (300 - 120)
    assert allocator.snapshots == 1  # a snapshot takes milliseconds
    allocator.segments.append(segment(40, 10, pool=[0, 1]))
    assert memory.free() == 100 + (300 - 120)
    del allocator.segments[1:]
    assert memory.free() == 100 + (300 - 120)
    assert allocator.snapshots == 3


def test_memory_of_a_cpu_is_not_counted():
    memory = DeviceMemory(torch.device("cpu"), None)
    memory.release()
    assert (memory.free(), memory.total(), memory.reserved(), memory.peak_since(memory.watch())) == (0, 0, 0, 0)


def test_chunks_are_copied_by_several_threads(monkeypatch):
    planes = [np.full((2, 3, 4, 4), n, np.uint8) for n in range(6)]
    out = np.zeros((6, 2, 3, 4, 4), np.uint8)
    real, at_once = np.copyto, threading.Barrier(3, timeout=60)  # broken, hence an error, unless three copy at a time

    def copyto(target, source):
        at_once.wait()
        real(target, source)

    monkeypatch.setattr("pipeline.encoder.staging.np.copyto", copyto)
    BatchCopy(threads=3).fill(out, planes)
    np.testing.assert_array_equal(out, np.stack(planes))
