"""WF-VAE's decoder prepared for running, as a stream: each step gives out all frames it can know, and holds nothing twice.

Enters: parameters, then the latents a step brings and its `Memory`. Leaves: frames `B 3 T H W`.

Interpolation in time makes the wide path late by one frame per doubling; the images of the energy-flow path, which are early, wait for
it in short queues. So no latent is ever computed twice, and any cut of a video gives the same frames (spec section 6).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from model.wfvae import wavelets
from model.wfvae.blocks import Bench, Causal, Grow, GrowClip, Norm, Residual
from model.wfvae.blocks import Frames as FrameBlock
from model.wfvae.encoder import prepare_middle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from model.wfvae.memory import Memory


class Image:
    """A small image from the energy flow: residual blocks, bands, plus the smaller image on the low band, inverse transform."""

    def __init__(self, bench: Bench, published: Any, filters: torch.Tensor) -> None:
        self.blocks = [Residual(bench, block) for block in published[:-1]]
        self.bands = FrameBlock(bench, published[-1], wide=True)
        self.volume, self.slot = filters.shape[0] == 8, bench.slot()
        self.synthesis = wavelets.per_colour(filters).T.contiguous().to(bench.device, bench.wide)

    def __call__(
        self, flow_BTHWC: torch.Tensor, memory: Memory, smaller_BTHWC: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow `B T H W e` -> image `B T' 2H 2W 3` (T' = 2T, or 2T - 1 at the start, or T of frames), bands after the addition."""
        for block in self.blocks:
            flow_BTHWC = block(flow_BTHWC, memory)
        bands = self.bands(flow_BTHWC)
        memory.keep(self.slot, bands.new_empty((bands.shape[0], 0)))
        if smaller_BTHWC is not None:
            bands[..., :3] += memory.queued(self.slot, smaller_BTHWC, bands.shape[1])
        cells = F.linear(bands, self.synthesis)
        if self.volume:
            return wavelets.from_volume_cells(cells, first=memory.first), bands
        return wavelets.from_plane_cells(cells), bands


class Screen:
    """The last convolution with the last inverse transform folded in, plus the image of the energy flow."""

    def __init__(self, bench: Bench, conv: nn.Conv2d, filters: torch.Tensor) -> None:
        weight = wavelets.fold_synthesis(conv.weight, filters)
        bias = wavelets.fold_synthesis(_bias(conv), filters)
        self.conv, self.slot = bench.frame_conv(weight, bias, wide=True, padding=1), bench.slot()
        self.spread = wavelets.per_colour(filters)[:3].T.contiguous().to(bench.device, bench.wide)

    def __call__(self, h_BTHWC: torch.Tensor, image_BTHWC: torch.Tensor, memory: Memory) -> torch.Tensor:
        """`B T H W C` and image frames `B T' H W 3` -> video `B 3 2T 2H 2W` (2T - 1 at the start)."""
        B, T, H, W, _ = h_BTHWC.shape
        pixels = self.conv(h_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view(B, T, H, W, -1)
        pixels = pixels + F.linear(memory.queued(self.slot, image_BTHWC, T), self.spread)
        return wavelets.from_volume_cells(pixels, first=memory.first).permute(0, 4, 1, 2, 3)


def _bias(conv: nn.Conv2d) -> torch.Tensor:
    if conv.bias is None:
        raise ValueError("the last convolution must have a bias")
    return conv.bias


class Level:
    """Blocks of the wide path, whose last channels then part as the flow of one image."""

    def __init__(self, blocks: Sequence[Any], width: int, image: Image) -> None:
        self.blocks, self.width, self.image = blocks, width, image


class Decoder:
    """Latents -> pixels: levels from the deepest on, then the rest of the wide path (spec section 5)."""

    def __init__(
        self,
        bench: Bench,
        enter: Causal,
        levels: Sequence[Level],
        rest: Sequence[Any],
        finish: Callable[[torch.Tensor], torch.Tensor],
        screen: Screen,
    ) -> None:
        self.enter, self.levels, self.rest, self.finish, self.screen = enter, levels, rest, finish, screen
        self.slots = bench.slots

    def __call__(
        self, latent_BTHWC: torch.Tensor, memory: Memory, bands: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """`B t h w d` in at least float32 -> video `B 3 T H W`; the bands of every level are put in front of `bands`."""
        h = self.enter(latent_BTHWC, memory)
        image: Any = None  # of the level before; the deepest has none
        for level in self.levels:
            for block in level.blocks:
                h = block(h, memory)
            image, found = level.image(h[..., level.width :], memory, image)
            h = h[..., : level.width]
            if bands is not None:
                bands.insert(0, found)
        for block in self.rest:
            h = block(h, memory)
        return self.screen(self.finish(h), image, memory)


def prepare_decoder(
    published: Any,
    weights: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """WF-VAE's decoder. `weights` are the whole network's, by published key: the Haar filters are read from there."""
    bench = Bench(device, dtype, pace=1)
    width, nearest = 4 * config["base_channels"], config["t_interpolation"] == "nearest"
    out, l1, l2 = (
        wavelets.filters_of(weights, f"decoder.inverse_wavelet_transform_{where}") for where in ("out", "l1", "l2")
    )
    enter = Causal(bench, published.conv_in, wide=True)
    middle = prepare_middle(bench, published.mid, mixing=config["attention_type"] == "AttnBlock3D")
    levels = [
        Level(middle, width, Image(bench, published.connect_l2, l2)),
        Level(_rising(bench, published.up2, nearest=nearest), width, Image(bench, published.connect_l1, l1)),
    ]
    rest = [
        *_rising(bench, published.up1, nearest=nearest),
        *(Residual(bench, block) for block in published.layer),
    ]
    screen = Screen(bench, published.conv_out, out)
    return Decoder(bench, enter, levels, rest, Norm(bench, published.norm_out).activated, screen)


def prepare_growth(bench: Bench, published: Any, *, nearest: bool) -> Grow | GrowClip:
    """An enlargement of frames, or over frames."""
    flat = isinstance(published.conv, nn.Conv2d)
    return Grow(bench, published) if flat else GrowClip(bench, published, nearest=nearest)


def _rising(bench: Bench, published: Any, *, nearest: bool) -> list[Any]:
    """Residual blocks, an enlargement, a residual block."""
    before = [Residual(bench, block) for block in published[:-2]]
    return [*before, prepare_growth(bench, published[-2], nearest=nearest), Residual(bench, published[-1])]
