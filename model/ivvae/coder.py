"""IV-VAE's encoder and decoder prepared for running: the blocks in order, and the numbering of what they remember.

Enters: parameters, then videos or latents with the past frames. Leaves: mean (and log-variance) or videos, and the new past. No checks
and no chunking here; `model.ivvae.vae` does both. Source: spec sections 3 to 5.

Inside, frames come first: `T B H W C`. One call is either a clip's first frame alone or whole groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.convolution import FrameConv
from model.ivvae import parameters
from model.ivvae.blocks import Attention, Residual2d, Residual3d, convolve
from model.ivvae.heads import GROUP, PixelHead, PosteriorHead
from model.ivvae.memory import Run, stripes
from model.ivvae.pair_conv import PairConv, PointPair
from model.ivvae.resample import Down, Up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

Block = Residual3d | Residual2d | Attention | Down | Up


class Prepared:
    """Shared by both directions: where and in which arithmetic, and the numbering of convolutions that carry state."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots = 0

    def new_slots(self, count: int) -> range:
        """The next free places in the state."""
        self.slots += count
        return range(self.slots - count, self.slots)

    def blocks(self, modules: Iterable[nn.Module], group: int, resampling: type[Down] | type[Up]) -> list[Block]:
        """Prepared blocks in order, `group` frames to a latent at first; a change of time halves or doubles that."""
        prepared: list[Block] = []
        for module in modules:
            match module:
                case parameters.Residual3d():
                    slots = self.new_slots(2)
                    prepared.append(Residual3d(module, group, slots, self.device, self.dtype))
                case parameters.Residual2d():
                    prepared.append(Residual2d(module, self.device, self.dtype))
                case parameters.Attention():
                    prepared.append(Attention(module, self.device, self.dtype))
                case parameters.Resample():
                    resample = resampling(module, self.device, self.dtype)
                    if resample.time:
                        group = group // 2 if resampling is Down else 2 * group
                    prepared.append(resample)
                case _:
                    raise TypeError(f"no block is made from a {type(module).__name__}")
        return prepared

    def run(self, past: Sequence[torch.Tensor] | None, buffers: dict[str, torch.Tensor]) -> Run:
        """What one step holds."""
        return Run(past, self.slots, buffers, self.device, self.dtype)


class Encoder(Prepared):
    """Pixels -> posterior."""

    def __init__(self, network: parameters.Network, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        coder, wide = network.encoder, torch.promote_types(dtype, torch.float32)
        # in float32 at least: eight-bit pixels would lose their last bit in bfloat16
        self.pixels, self.pixels_dtype = PairConv(coder.conv1, GROUP, device, wide), wide
        (self.pixels_slot,) = self.new_slots(1)
        self.stages = self.blocks([*coder.downsamples, *coder.middle], GROUP, Down)
        self.head = PosteriorHead(network, device, dtype)

    def __call__(
        self,
        video_BCTHW: torch.Tensor,
        past: Sequence[torch.Tensor] | None,
        buffers: dict[str, torch.Tensor],
        *,
        moments: bool,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """One frame where `past` is None, else `4n` -> mean `(t, B, h, w, z)` (and log-variance), the new state's tensors."""
        run = self.run(past, buffers)
        x = self._first_layer(video_BCTHW, run)
        for stage in self.stages:
            x = stage(x, run)
        return self.head(x, run, moments=moments), run.kept()

    def _first_layer(self, video_BCTHW: torch.Tensor, run: Run) -> torch.Tensor:
        B, colours, T, H, W = video_BCTHW.shape
        room = run.bordered("pixels", T + 1, B, H, W, colours, self.pixels_dtype)
        run.recall(self.pixels_slot, room)
        room[1:, :, 1:-1].copy_(video_BCTHW.permute(2, 0, 3, 4, 1))
        run.keep(self.pixels_slot, room)
        x = torch.empty((T, B, H, W, 2 * self.pixels.width), dtype=run.wide, device=run.device)
        for top, end in stripes(H, W, run.device):
            x[:, :, top:end] = convolve(self.pixels, room[:, :, top : end + 2], run)
        return x


class Decoder(Prepared):
    """Latents -> pixels."""

    def __init__(self, network: parameters.Network, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        coder, wide = network.decoder, torch.promote_types(dtype, torch.float32)
        self.mix = PointPair(network.conv2, device, wide)
        self.lift = FrameConv(coder.conv1.conv.weight, coder.conv1.conv.bias, device, wide, padding=1)
        self.stages = self.blocks([*coder.middle, *coder.upsamples], 1, Up)
        self.head = PixelHead(network, device, dtype)

    def __call__(
        self, latent_BCthw: torch.Tensor, past: Sequence[torch.Tensor] | None, buffers: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One latent where `past` is None, else any number -> frames `(T, B, H, W, 3)`, the new state's tensors."""
        run = self.run(past, buffers)
        x = self.mix(latent_BCthw.permute(2, 0, 3, 4, 1).contiguous())
        x = self.lift(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        for stage in self.stages:
            x = stage(x, run)
        return self.head(x, run), run.kept()
