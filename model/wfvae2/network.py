"""WFVAE2 as published: WF-VAE with any number of levels, over frames ("thw") or of each frame ("hw"). Layers are WF-VAE's.

Video `B 3 T H W` in [-1, 1] -> posterior `B d t h w` -> video; the first transform is always over frames. Published names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, activated, run, without_autocast
from model.network import Bands, Published, from_published
from model.wfvae.layers import CausalConv3d, Downsample, FrameConv, Residual, Upsample, add_low, middle, normaliser
from model.wfvae.network import Network as WFVAENetwork
from model.wfvae.wavelets import Analysis, Synthesis
from model.wfvae2.facts import decoder_widths


@dataclass(frozen=True, slots=True)
class Level:
    """One level: channels in and out, whether it halves time too, whether its blocks are over frames."""

    before: int
    after: int
    over_time: bool
    blocks_over_time: bool


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration; `down` from the finest level, `up` from the deepest."""

    latent_dim: int
    encoder_num_resblocks: int
    decoder_num_resblocks: int
    encoder_energy_flow_size: int
    decoder_energy_flow_size: int
    mid_layers_type: tuple[str, ...]
    norm_type: str
    t_interpolation: str
    down: tuple[Level, ...]
    up: tuple[Level, ...]

    @classmethod
    def of(cls, published: Published) -> Config:
        """From a complete published configuration."""
        kinds = list(zip(published["layer_type"], published["layer_res_type"], strict=True))
        return from_published(
            cls,
            published,
            down=_levels(published["base_channels"], kinds),
            up=_levels(decoder_widths(published)[::-1], kinds[::-1]),
        )


class Down(nn.Module):
    """Level of the encoder: residual blocks (`out_res_block` is one of them), downsampling, then its bands join (inflow, WF-VAE 3.2)."""

    def __init__(self, level: Level, config: Config) -> None:
        super().__init__()
        c, e = level.before, config.encoder_energy_flow_size
        residual = partial(Residual, norm=config.norm_type, over_time=level.blocks_over_time)
        self.res_block = nn.ModuleList(residual(c, c) for _ in range(config.encoder_num_resblocks - 1))
        self.down = Downsample(c, over_time=level.over_time)
        self.wavelet_transform = Analysis(over_time=level.over_time)
        self.in_flow_conv = FrameConv(24 if level.over_time else 12, e, full_precision=True)
        self.out_res_block = residual(c + e, level.after)

    def forward(
        self, x_BCTHW: torch.Tensor, bands_BCTHW: torch.Tensor, history: History
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and bands of the level before, finer -> those of this level."""
        h = run([*self.res_block, self.down], x_BCTHW, history)
        bands = self.wavelet_transform(bands_BCTHW[:, :COLOURS], history)
        h = torch.cat([h, self.in_flow_conv(bands)], dim=1)
        return run([self.out_res_block], h, history), bands


class Up(nn.Module):
    """Level of the decoder: its bands split off (outflow, WF-VAE 3.2), blocks (with `branch_conv` and `out_res_block`), upsampling."""

    def __init__(self, level: Level, config: Config) -> None:
        super().__init__()
        c, e = level.before, config.decoder_energy_flow_size
        residual = partial(Residual, norm=config.norm_type, over_time=level.blocks_over_time)
        self.width = c
        self.branch_conv = residual(c, c + e)
        self.out_flow_conv = nn.Sequential(
            residual(e, e), FrameConv(e, 24 if level.over_time else 12, full_precision=True)
        )
        self.inverse_wavelet_transform = Synthesis(over_time=level.over_time)
        self.res_block = nn.ModuleList(residual(c, c) for _ in range(config.decoder_num_resblocks - 2))
        self.up = Upsample(c, over_time=level.over_time, interpolation=config.t_interpolation)
        self.out_res_block = residual(c, level.after)

    def forward(
        self, x_BCTHW: torch.Tensor, image_BCTHW: torch.Tensor | None, history: History
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features, and the image of the deeper levels (None at the deepest) -> features, image and bands of this level."""
        h = run([self.branch_conv], x_BCTHW, history)
        bands = run(self.out_flow_conv, h[:, self.width :], history)
        if image_BCTHW is not None:
            bands = add_low(bands, image_BCTHW, history)
        h = run([*self.res_block, self.up, self.out_res_block], h[:, : self.width], history)
        return h, self.inverse_wavelet_transform(bands, history), bands


class Encoder(nn.Module):
    """Levels from the finest to the deepest."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        first, last = config.down[0].before, config.down[-1].after
        self.wavelet_transform_in = Analysis(over_time=True)
        self.conv_in = FrameConv(24, first, full_precision=True)
        self.down_blocks = nn.ModuleList(Down(level, config) for level in config.down)
        self.mid = middle(config.mid_layers_type, config.norm_type, last)
        self.norm_out = normaliser(config.norm_type, last)
        self.conv_out = CausalConv3d(last, 2 * config.latent_dim, full_precision=True)

    def forward(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> tuple[torch.Tensor, Bands]:
        """Mean and log-variance as channels `B 2d t h w`, and the bands of each level after the first."""
        bands = self.wavelet_transform_in(video_BCTHW, history)
        h, read = self.conv_in(bands), []
        for level in self.down_blocks:
            h, bands = level(h, bands, history)
            read.append(bands)
        h = run(self.mid, h, history)
        return self.conv_out(activated(h, self.norm_out), history), tuple(read)


class Decoder(nn.Module):
    """Levels from the deepest to the finest."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        first, last = config.up[0].before, config.up[-1].after
        self.conv_in = CausalConv3d(config.latent_dim, first, full_precision=True)
        self.mid = middle(config.mid_layers_type, config.norm_type, first)
        self.up_blocks = nn.ModuleList(Up(level, config) for level in config.up)
        self.norm_out = normaliser(config.norm_type, last)
        self.conv_out = FrameConv(last, 24, full_precision=True)
        self.inverse_wavelet_transform_out = Synthesis(over_time=True)

    def forward(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> tuple[torch.Tensor, Bands]:
        """Video `B 3 T H W`, and the bands predicted at each level, in the encoder's order."""
        h = run([self.conv_in, *self.mid], latent_BCthw, history)
        image: torch.Tensor | None = None
        predicted: list[torch.Tensor] = []
        for level in self.up_blocks:
            h, image, bands = level(h, image, history)
            predicted.append(bands)
        bands = self.conv_out(without_autocast(self.norm_out, h))  # no activation here, unlike WF-VAE
        bands = add_low(bands, cast("torch.Tensor", image), history)  # there is at least one level
        return self.inverse_wavelet_transform_out(bands, history), tuple(predicted[::-1])


class Network(WFVAENetwork):
    """WFVAE2, with WF-VAE's interface and attributes. No weights were published."""

    family = "wfvae2"

    def add_layers(self) -> None:
        """Encoder and decoder."""
        config = Config.of(self.config)
        self.encoder, self.decoder = Encoder(config), Decoder(config)


def _levels(widths: Any, kinds: list[tuple[str, str]]) -> tuple[Level, ...]:
    return tuple(
        Level(before, after, layer == "thw", block == "ResnetBlock3D")
        for (before, after), (layer, block) in zip(pairwise(widths), kinds, strict=True)
    )
