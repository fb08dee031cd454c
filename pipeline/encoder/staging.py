"""Transfers of planes to the device, of latents back, and of causal states both ways. On CUDA they use pinned memory, and planes a
stream of their own, so that they overlap with work.

`upload` takes uint8 planes of chunks of equal shape, and returns `B T 3 H W` on the device, ordered before work that is launched later.
`download` returns a function that waits for the latents and returns them as numpy. `park` and `unpark` move a tensor to host memory and
back.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoder.network import load_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

BUFFERS = 2  # one is copied to the device while the other is filled
# A core copies some 5 GB/s; the 41,000 frames/s of 256x256 that an H200 may encode are 8. Decoders need the other cores.
COPY_THREADS = 4


class BatchCopy:
    """Copies chunks into one buffer by several threads, a chunk each at a time; NumPy copies without the interpreter lock."""

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(threads or min(COPY_THREADS, os.cpu_count() or 1), "stage")

    def fill(self, out_BT3HW: np.ndarray, planes: Sequence[np.ndarray]) -> None:
        """Copies `planes`, as many `T 3 H W` arrays as `out_BT3HW` has rows. Returns when all are there."""
        if len(planes) == 1:
            np.copyto(out_BT3HW[0], planes[0])
            return
        for done in [self._pool.submit(np.copyto, *pair) for pair in zip(out_BT3HW, planes, strict=True)]:
            done.result()


class HostStaging:
    """Staging for a CPU, where nothing is transferred."""

    overlaps = False

    def __init__(self) -> None:
        self._torch = load_torch()

    def upload(self, planes: Sequence[np.ndarray]) -> torch.Tensor:
        """`T 3 H W` arrays -> one tensor `B T 3 H W`."""
        # Arrays from Ray's object store are read-only, which torch warns about; stacking copies, and one chunk is cheap to copy.
        single = len(planes) == 1 and planes[0].flags.writeable
        return self._torch.from_numpy(planes[0][None] if single else np.stack(planes))

    def download(self, latent_BCthw: torch.Tensor) -> Callable[[], np.ndarray]:
        """Function that returns float32 `B C t h w`."""
        array: np.ndarray = latent_BCthw.float().numpy()
        return lambda: array

    def park(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself: it is in host memory."""
        return tensor

    unpark = park


class CudaStaging:
    """Staging for CUDA: two pinned buffers for the largest batch, and a copy stream; a batch is copied while the last one is encoded."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._torch = load_torch()
        self._device = device
        self._copies = self._torch.cuda.Stream(device)
        self._batch_copy = BatchCopy()
        self._buffers = [
            (self._torch.empty(0, dtype=self._torch.uint8), self._torch.cuda.Event()) for _ in range(BUFFERS)
        ]

    def upload(self, planes: Sequence[np.ndarray]) -> torch.Tensor:
        """`T 3 H W` arrays -> one tensor `B T 3 H W` on the device; work launched later on the current stream sees all of it."""
        torch = self._torch
        buffer, copied = self._free_buffer((len(planes), *planes[0].shape))
        self._batch_copy.fill(buffer.numpy(), planes)
        working = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            on_device = buffer.to(self._device, non_blocking=True)
            copied.record(self._copies)
        working.wait_event(copied)
        on_device.record_stream(working)  # memory of the copy stream must not be reused before the work ends
        return on_device

    def download(self, latent_BCthw: torch.Tensor) -> Callable[[], np.ndarray]:
        """Function that waits for the work and returns float32 `B C t h w`."""
        torch = self._torch
        pinned = torch.empty(latent_BCthw.shape, dtype=torch.float32, pin_memory=True)
        pinned.copy_(latent_BCthw, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))

        def wait() -> np.ndarray:
            done.synchronize()
            array: np.ndarray = pinned.numpy()
            return array

        return wait

    def park(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy in pinned memory, complete once the work launched so far has run; only `unpark` may read it."""
        host = self._torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def unpark(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy on the device, ordered after `park` and before work that is launched later."""
        return tensor.to(self._device, non_blocking=True)

    def _free_buffer(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        """Oldest buffer, after its last copy is done, as a view of this shape; enlarged if it is too small."""
        flat, copied = self._buffers.pop(0)
        copied.synchronize()  # returns at once for an event never recorded
        size = math.prod(shape)
        if flat.numel() < size:
            flat = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        self._buffers.append((flat, copied))
        return flat[:size].view(shape), copied
