"""Recognises errors that mean memory ran out, whatever their class and text.

torch raises `OutOfMemoryError` only if its caching allocator fails. Failed allocations by cuBLAS, cuDNN, the CUDA driver (modules, graphs,
pinned memory) and the CPU allocator are plain RuntimeErrors.
"""

from __future__ import annotations

import re
import sys

import torch

CUDA_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, as `torch.AcceleratorError.error_code`
_TEXTS = re.compile(
    "|".join(
        (
            r"\bout of memory\b",  # "CUDA out of memory", "CUDA error: out of memory", "Triton Error [CUDA]: out of memory", MPS and HIP
            r"CUBLAS_STATUS_ALLOC_FAILED|CUSOLVER_STATUS_ALLOC_FAILED|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
            r"CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_(?:HOST|DEVICE)_ALLOCATION_FAILED",
            r"not enough workspace|workspace allocation failed|failed to allocate workspace",
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory",
            r"DefaultCPUAllocator: (?:not enough|can't allocate) memory|not enough memory: you tried to allocate",
        )
    ),
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if device or host memory ran out. Not for a C++ compiler that `torch.compile` started: it needs as much for smaller tensors."""
    inner = getattr(error, "inner_exception", None)
    if isinstance(inner, Exception):  # of an error of torch.compile, which quotes it
        compiler = sys.modules.get("torch._inductor.exc")
        return not (compiler and isinstance(inner, compiler.CppCompileError)) and is_out_of_memory(inner)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return getattr(error, "error_code", None) == CUDA_OUT_OF_MEMORY or _TEXTS.search(str(error)) is not None
