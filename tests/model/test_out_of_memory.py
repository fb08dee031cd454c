"""Every out-of-memory error is recognised, and no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels.graphs import EAGER_RUNS, StepGraphs
from model.out_of_memory import is_out_of_memory

# As torch, its libraries and the driver say them.
TEXTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.20 GiB is free.",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasLtMatmul( ltHandle, computeDesc.descriptor(), &alpha_val )`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: not enough workspace for the chosen engine",
    "Triton Error [CUDA]: out of memory",
    "CUDA driver error: out of memory",
    "HIP out of memory. Tried to allocate 20.00 MiB",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000 bytes.",
    "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000 bytes.",
)
OTHERS = (
    "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: misaligned address",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448. Reducing block sizes may help.",
    "The size of tensor a (4) must match the size of tensor b (5) at non-singleton dimension 1",
    "unable to mmap 1024 bytes from file <w.safetensors>: Invalid argument (22)",
    "index 5 is out of bounds for dimension 0 with size 5",
)


@pytest.mark.parametrize("text", TEXTS)
def test_every_out_of_memory_text_is_recognised(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(ValueError(text))  # an argument that quotes one


@pytest.mark.parametrize("text", OTHERS)
def test_other_failures_are_not_recognised(text):
    assert not is_out_of_memory(RuntimeError(text))


def test_out_of_memory_classes_are_recognised():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    failed = torch.AcceleratorError("CUDA error: memory allocation")
    failed.error_code = 2
    assert is_out_of_memory(failed)
    failed.error_code = 700
    assert not is_out_of_memory(failed)


def test_an_error_of_torch_compile_is_judged_by_what_it_wraps_and_a_compiler_without_memory_is_none():
    from torch._inductor.exc import CppCompileError, InductorError

    def wrapped(inner):
        return is_out_of_memory(InductorError(inner, None))

    assert wrapped(torch.OutOfMemoryError(TEXTS[0]))
    assert wrapped(RuntimeError(TEXTS[0]))
    assert not wrapped(CppCompileError(["g++"], "cc1plus: out of memory allocating 65536 bytes"))
    assert not wrapped(OSError("fork: out of memory"))
    assert not wrapped(RuntimeError(OTHERS[0]))


def test_real_failed_allocations_are_recognised():
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 62, dtype=torch.uint8)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 62, np.uint8)
    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_numpy.value)


@pytest.mark.parametrize("text", TEXTS)
def test_a_recording_that_runs_out_of_memory_leaves_the_step_unrecorded(text):
    def record(step, tensors, batch):
        raise RuntimeError(text)

    graphs = StepGraphs(record)
    for _ in range(EAGER_RUNS + 2):
        (got,) = graphs.run("double", lambda x: (2 * x,), (torch.ones(2),))
        assert torch.equal(got, torch.full((2,), 2.0))
    assert len(graphs.unrecordable) == 1
