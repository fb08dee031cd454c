"""State and buffers of one step through IV-VAE: past frames of its convolutions, bordered frames they read, stripes of rows.

On a CPU the work is split into stripes of rows: the operations between two convolutions (norm, SiLU, sums) then run in cache, and no large
memory is allocated repeatedly. Stripes depend on the frame size only, so chunking stays exact.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

STRIPE_PIXELS = 4096  # of one frame, on a CPU; changing it changes bits of latents
STRIPE_ROWS = 8  # least rows: each stripe reads two rows more than it writes


def stripes(height: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Row ranges processed at a time: a few thousand pixels on a CPU, all rows on other devices."""
    # an even number of rows, because some convolutions compute two at a time
    step = max(STRIPE_ROWS, STRIPE_PIXELS // width // 2 * 2) if device.type == "cpu" else height
    return [(start, min(start + step, height)) for start in range(0, height, step)]


class StreamState:
    """State of one step through the encoder or the decoder.

    Args:
        past: the previous state's tensors, one per group-causal convolution, `(B, H, W, C)`; None at the start of a clip.
        slots: number of these convolutions.
        buffers: memory shared by the steps of one call.
    """

    def __init__(
        self,
        past: Sequence[torch.Tensor] | None,
        slots: int,
        buffers: dict[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.first = past is None  # the clip's first frame, which has its own rules
        self.device, self.dtype, self.full_dtype = device, dtype, torch.promote_types(dtype, torch.float32)
        self._past, self._buffers = past, buffers
        self._saved: list[torch.Tensor | None] = [None] * slots

    def bordered(
        self,
        name: str,
        frames: int,
        batch: int,
        height: int,
        width: int,
        channels: int,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Buffer `(frames, batch, height + 2, width, channels)` with a row of zeros at top and bottom; the rest is uninitialised."""
        dtype = dtype or self.dtype
        shape = (frames, batch, height + 2, width, channels)
        needed = math.prod(shape)
        memory = self._buffers.get(f"{name} {dtype}")
        if memory is None or memory.numel() < needed:
            memory = self._buffers[f"{name} {dtype}"] = torch.empty(needed, dtype=dtype, device=self.device)
        buffer = memory[:needed].view(shape)
        buffer[:, :, 0].zero_()
        buffer[:, :, -1].zero_()
        return buffer

    def restore(self, slot: int, buffer_TBHWC: torch.Tensor) -> None:
        """Copies the last frame of the previous step to the front of a bordered buffer."""
        if self._past is not None:
            buffer_TBHWC[0, :, 1:-1].copy_(self._past[slot])

    def save(self, slot: int, buffer_TBHWC: torch.Tensor) -> None:
        """Saves the last frame of a bordered buffer for the next step."""
        self._saved[slot] = buffer_TBHWC[-1, :, 1:-1].clone()

    def next_tensors(self) -> tuple[torch.Tensor, ...]:
        """The new state's tensors. Raises RuntimeError if a convolution has not stream."""
        done = tuple(tensor for tensor in self._saved if tensor is not None)
        if len(done) != len(self._saved):
            raise RuntimeError(f"{len(self._saved) - len(done)} of {len(self._saved)} convolutions saved no frame")
        return done
