"""Transfers of planes to the device and of latents back. On CUDA they use pinned memory and a separate stream, so that they
overlap with work.

`upload` takes uint8 planes of chunks of equal shape, and returns `B T 3 H W` on the device, ordered before work that is launched later.
`download` returns a function that waits for the latents and returns them as numpy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.encoder.network import load_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

BUFFERS = 2  # one is copied to the device while the other is filled


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


class CudaStaging:
    """Staging for CUDA: two pinned buffers for the largest batch, and a copy stream; a batch is copied while the last one is encoded."""

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._torch = load_torch()
        self._device = device
        self._copies = self._torch.cuda.Stream(device)
        self._buffers = [
            (self._torch.empty(0, dtype=self._torch.uint8), self._torch.cuda.Event()) for _ in range(BUFFERS)
        ]

    def upload(self, planes: Sequence[np.ndarray]) -> torch.Tensor:
        """`T 3 H W` arrays -> one tensor `B T 3 H W` on the device; work launched later on the current stream sees all of it."""
        torch = self._torch
        buffer, copied = self._free_buffer((len(planes), *planes[0].shape))
        view = buffer.numpy()
        for index, chunk in enumerate(planes):
            view[index] = chunk
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

    def _free_buffer(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        """Oldest buffer, after its last copy is done, as a view of this shape; enlarged if it is too small."""
        flat, copied = self._buffers.pop(0)
        copied.synchronize()  # returns at once for an event never recorded
        size = math.prod(shape)
        if flat.numel() < size:
            flat = self._torch.empty(size, dtype=self._torch.uint8, pin_memory=True)
        self._buffers.append((flat, copied))
        return flat[:size].view(shape), copied
