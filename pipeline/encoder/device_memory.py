"""Memory of the encoder's device: bytes free for a step, bytes that a step took. On a CPU, where memory is not counted, all are 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class DeviceMemory:
    """Memory of one device as this process sees it.

    Args:
        device: a CUDA device or the CPU.
        cuda: `torch.cuda`.
    """

    def __init__(self, device: torch.device, cuda: Any) -> None:
        self._device, self._cuda = device, cuda
        self._counted = device.type == "cuda"
        self._private: tuple[int, int] = (
            -1,
            0,
        )  # bytes reserved when private pools were looked up last, bytes idle in them

    def reserved(self) -> int:
        """Bytes that this process holds."""
        return int(self._cuda.memory_reserved(self._device)) if self._counted else 0

    def total(self) -> int:
        """Bytes that the device has."""
        return int(self._cuda.get_device_properties(self._device).total_memory) if self._counted else 0

    def free(self) -> int:
        """Bytes available to a step: those that nobody holds, and those that the allocator has reserved, does not use and may give to it.

        Memory of CUDA graphs lies in private pools. It is idle between replays, but nothing else may use it.
        """
        if not self._counted:
            return 0
        free, _ = self._cuda.mem_get_info(self._device)
        reserved = self.reserved()
        return int(free) + reserved - int(self._cuda.memory_allocated(self._device)) - self._idle_in_pools(reserved)

    def watch(self) -> int:
        """Starts to watch a step; pass the result to `peak_since`."""
        if not self._counted:
            return 0
        self._cuda.reset_peak_memory_stats(self._device)
        return int(self._cuda.memory_allocated(self._device))

    def peak_since(self, before: int) -> int:
        """Most bytes allocated at a time since `watch`, beyond those before it."""
        return int(self._cuda.max_memory_allocated(self._device)) - before if self._counted else 0

    def release(self) -> None:
        """Gives reserved memory that is not used back to the device."""
        if self._counted:
            self._cuda.empty_cache()

    def _idle_in_pools(self, reserved: int) -> int:
        """Bytes in private pools that hold no tensor. Looked up again only if `reserved` has changed: a snapshot takes milliseconds."""
        if self._private[0] != reserved:
            idle = sum(
                segment["total_size"] - segment["allocated_size"]
                for segment in self._cuda.memory_snapshot()
                if segment["device"] == self._device.index and tuple(segment["segment_pool_id"]) != (0, 0)
            )
            self._private = reserved, int(idle)
        return self._private[1]
