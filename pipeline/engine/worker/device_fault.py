"""Errors of a GPU or its driver, recognised among the errors of an encode step by their text. A process that met one is unusable.

A CUDA context stays broken after most of its errors ("sticky"), and the error may belong to an earlier step than the one that raised it.
"""

from __future__ import annotations

import re

_TEXT = re.compile(
    r"CUDA (driver )?error|CUDNN_STATUS|cuDNN error|CUBLAS_STATUS|device-side assert|uncorrectable ECC|illegal memory access|"
    r"unspecified launch failure|no CUDA-capable device|HIP error",
    re.IGNORECASE,
)
LINE = 160


def device_fault(error: BaseException) -> str | None:
    """The first line of an error of the device; None for any other error, lack of device memory included."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in text.lower():
        return None
    if type(error).__name__ != "AcceleratorError" and not _TEXT.search(text):
        return None
    return " ".join(text.strip().partition("\n")[0].split())[:LINE] or type(error).__name__
