"""IV-VAE's encoder and decoder, prepared for speed: the blocks in order, and the numbering of their state slots (spec sections 3 to 5).

Takes videos or latents with the past frames; returns mean (and log-variance) or videos, and the new past frames. Checks of inputs and
splitting into steps are in `model.ivvae.vae`. Frames come first: `T B H W C`. One call is either a clip's first frame or whole groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from model.convolution import FrameConv
from model.ivvae import layers as published
from model.ivvae.fast.blocks import Attention, Residual2d, Residual3d, convolve
from model.ivvae.fast.heads import GROUP, PixelHead, PosteriorHead
from model.ivvae.fast.pair_conv import PairConv, PointPair
from model.ivvae.fast.resample import Downsample, Upsample
from model.ivvae.fast.stream_state import StreamState, stripes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from model.ivvae.network import Network

Block = Residual3d | Residual2d | Attention | Downsample | Upsample


class PreparedCoder:
    """Base of encoder and decoder: device, dtype, and the numbering of convolutions that have state."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots = 0

    def new_slots(self, count: int) -> range:
        """Numbers of the next free slots of the state."""
        self.slots += count
        return range(self.slots - count, self.slots)

    def blocks(
        self, modules: Iterable[nn.Module], group: int, resampling: type[Downsample] | type[Upsample]
    ) -> list[Block]:
        """Prepares blocks in order; the first sees `group` frames per latent, and resampling in time halves or doubles that."""
        prepared: list[Block] = []
        for module in modules:
            match module:
                case published.Residual3d():
                    slots = self.new_slots(2)
                    prepared.append(Residual3d(module, group, slots, self.device, self.dtype))
                case published.Residual2d():
                    prepared.append(Residual2d(module, self.device, self.dtype))
                case published.Attention():
                    prepared.append(Attention(module, self.device, self.dtype))
                case published.Resample():
                    resample = resampling(module, self.device, self.dtype)
                    if resample.time:
                        group = group // 2 if resampling is Downsample else 2 * group
                    prepared.append(resample)
                case _:
                    raise TypeError(f"cannot prepare a {type(module).__name__}; expected a block of model.ivvae.layers")
        return prepared

    def stream(self, past: Sequence[torch.Tensor] | None, buffers: dict[str, torch.Tensor]) -> StreamState:
        """State of one step."""
        return StreamState(past, self.slots, buffers, self.device, self.dtype)


class Encoder(PreparedCoder):
    """Encoder with prepared weights: pixels -> mean and log-variance."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        coder, full_dtype = network.encoder, torch.promote_types(dtype, torch.float32)
        # in at least float32: bfloat16 would lose the last bit of 8-bit pixels
        self.pixels, self.pixels_dtype = PairConv(coder.conv1, GROUP, device, full_dtype), full_dtype
        (self.pixels_slot,) = self.new_slots(1)
        self.stages = self.blocks([*coder.downsamples, *coder.middle], GROUP, Downsample)
        self.head = PosteriorHead(network, device, dtype)

    def __call__(
        self,
        video_BCTHW: torch.Tensor,
        past: Sequence[torch.Tensor] | None,
        buffers: dict[str, torch.Tensor],
        *,
        moments: bool,
    ) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        """One frame if `past` is None, else `4n` -> mean `(t, B, h, w, z)` (and log-variance), the new state's tensors."""
        stream = self.stream(past, buffers)
        x = self._first_layer(video_BCTHW, stream)
        for stage in self.stages:
            x = stage(x, stream)
        return self.head(x, stream, moments=moments), stream.next_tensors()

    def _first_layer(self, video_BCTHW: torch.Tensor, stream: StreamState) -> torch.Tensor:
        B, colours, T, H, W = video_BCTHW.shape
        buffer = stream.bordered("pixels", T + 1, B, H, W, colours, self.pixels_dtype)
        stream.restore(self.pixels_slot, buffer)
        buffer[1:, :, 1:-1].copy_(video_BCTHW.permute(2, 0, 3, 4, 1))
        stream.save(self.pixels_slot, buffer)
        x = torch.empty((T, B, H, W, 2 * self.pixels.width), dtype=stream.full_dtype, device=stream.device)
        for top, end in stripes(H, W, stream.device):
            x[:, :, top:end] = convolve(self.pixels, buffer[:, :, top : end + 2], stream)
        return x


class Decoder(PreparedCoder):
    """Decoder with prepared weights: latents -> pixels."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        coder, full_dtype = network.decoder, torch.promote_types(dtype, torch.float32)
        self.conv2 = PointPair(network.conv2, device, full_dtype)
        self.conv_in = FrameConv(coder.conv1.conv.weight, coder.conv1.conv.bias, device, full_dtype, padding=1)
        self.stages = self.blocks([*coder.middle, *coder.upsamples], 1, Upsample)
        self.head = PixelHead(network, device, dtype)

    def __call__(
        self, latent_BCthw: torch.Tensor, past: Sequence[torch.Tensor] | None, buffers: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """One latent if `past` is None, else any number -> frames `(T, B, H, W, 3)`, the new state's tensors."""
        stream = self.stream(past, buffers)
        x = self.conv2(latent_BCthw.permute(2, 0, 3, 4, 1).contiguous())
        x = self.conv_in(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        for stage in self.stages:
            x = stage(x, stream)
        return self.head(x, stream), stream.next_tensors()
