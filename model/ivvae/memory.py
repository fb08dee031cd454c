"""What a run of IV-VAE holds: bordered frames that convolutions read, the last frames of the chunk before, stripes of rows.

Enters: shapes, and the state's tensors. Leaves: memory. One `Run` lives for one call of the network; nothing outlives it but `kept`.

On a CPU the work is cut into stripes of rows: what lies between two convolutions (norm, SiLU, sums) then happens in cache, and large
memory is not asked for again and again. The stripes depend on the frame size only, so they are no danger to exact chunking.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

STRIPE_PIXELS = 4096  # of one frame, on a CPU; part of the numerics
STRIPE_ROWS = 8  # at least: each stripe reads two rows more than it writes


def stripes(height: int, width: int, device: torch.device) -> list[tuple[int, int]]:
    """Row ranges worked on at a time: a few thousand pixels on a CPU, everything elsewhere."""
    # an even number of rows: some ways to convolve take two at a time
    step = max(STRIPE_ROWS, STRIPE_PIXELS // width // 2 * 2) if device.type == "cpu" else height
    return [(start, min(start + step, height)) for start in range(0, height, step)]


class Run:
    """One step through the encoder or the decoder.

    Args:
        past: the state's tensors, one per group-causal convolution that needs one, `(B, H, W, C)`; None at the start of a clip.
        slots: how many there are.
        buffers: memory to use again, shared by the steps of one call.
    """

    def __init__(
        self,
        past: Sequence[torch.Tensor] | None,
        slots: int,
        buffers: dict[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.lead = past is None  # the first frame, which has rules of its own
        self.device, self.dtype, self.wide = device, dtype, torch.promote_types(dtype, torch.float32)
        self._past, self._buffers = past, buffers
        self._kept: list[torch.Tensor | None] = [None] * slots

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
        """Memory `(frames, batch, height + 2, width, channels)` with rows of zeros at top and bottom; the rest is unwritten."""
        dtype = dtype or self.dtype
        shape = (frames, batch, height + 2, width, channels)
        needed = math.prod(shape)
        flat = self._buffers.get(f"{name} {dtype}")
        if flat is None or flat.numel() < needed:
            flat = self._buffers[f"{name} {dtype}"] = torch.empty(needed, dtype=dtype, device=self.device)
        room = flat[:needed].view(shape)
        room[:, :, 0].zero_()
        room[:, :, -1].zero_()
        return room

    def recall(self, slot: int, room_TBHWC: torch.Tensor) -> None:
        """Puts the last frame of the chunk before in front."""
        if self._past is not None:
            room_TBHWC[0, :, 1:-1].copy_(self._past[slot])

    def keep(self, slot: int, room_TBHWC: torch.Tensor) -> None:
        """Remembers the last frame for the chunk that follows."""
        self._kept[slot] = room_TBHWC[-1, :, 1:-1].clone()

    def kept(self) -> tuple[torch.Tensor, ...]:
        """The new state's tensors; every convolution must have been run."""
        done = tuple(tensor for tensor in self._kept if tensor is not None)
        if len(done) != len(self._kept):
            raise RuntimeError(f"{len(self._kept) - len(done)} of {len(self._kept)} convolutions left no state")
        return done
