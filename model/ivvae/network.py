"""IV-VAE as its authors define it: a key-frame branch of 2-D and a motion branch of 3-D convolutions, causal by groups of four frames.

Video `B 3 T H W` in [-1, 1], T = 4n+1 (one frame is an image) -> posterior `B z t h w` -> video. Modules and parameters have their
published names. A video may come in steps, with a `History` of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from model.history import History
from model.ivvae.layers import (
    Attention,
    ConvPair,
    Downsample,
    FrameConv2d,
    NormGain,
    PyramidHead,
    Residual2d,
    Residual3d,
    Upsample,
    begins_group,
)
from model.layers import activated, run
from model.network import Decoded, Encoded, Published, PublishedNetwork

GROUP = 4  # frames of a latent: t_c of supplement 2.1


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration. `widths`: channels of a branch at 1, 1/2, 1/4 and 1/8 of the frame size."""

    z_dim: int
    dim: int
    widths: tuple[int, int, int, int]

    @classmethod
    def of(cls, published: Published) -> Config:
        """From a complete published configuration."""
        full, half, quarter, eighth = (published["dim"] * factor for factor in published["dim_mult"])
        return cls(published["z_dim"], published["dim"], (full, half, quarter, eighth))


class Encoder(nn.Module):
    """Frames -> outputs of the pyramid head; groups of 4 frames become 2, then 1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        full, half, quarter, eighth = config.widths
        self.conv1 = ConvPair(3, config.dim, 3, GROUP, full_precision=True)
        self.downsamples = nn.Sequential(
            *(Residual3d(config.dim, full, 4), Residual3d(full, full, 4), Downsample(full, over_time=False)),
            *(Residual3d(full, half, 4), Residual3d(half, half, 4), Downsample(half, over_time=True)),
            *(Residual3d(half, quarter, 2), Residual3d(quarter, quarter, 2), Downsample(quarter, over_time=True)),
            *(Attention(eighth), Residual2d(eighth), Attention(eighth), Residual2d(eighth), Attention(eighth)),
        )
        self.middle = nn.Sequential(Residual2d(eighth), Attention(eighth), Residual2d(eighth))
        self.head = nn.Sequential(NormGain(2 * eighth, 3), nn.Identity(), PyramidHead(2 * eighth, config.z_dim))

    def forward(self, video_BTHWC: torch.Tensor, history: History) -> torch.Tensor:
        """`B T H W 3` -> `B t h w 2z`."""
        h = run([self.conv1, *self.downsamples, *self.middle], video_BTHWC, history)
        return cast("torch.Tensor", self.head[2](activated(h, self.head[0])))


class Decoder(nn.Module):
    """Latents of both branches -> frames; groups of 1 frame become 2, then 4."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        full, half, quarter, eighth = config.widths
        self.conv1 = FrameConv2d(config.z_dim, 2 * eighth, 3, full_precision=True)
        self.middle = nn.Sequential(Residual2d(eighth), Attention(eighth), Residual2d(eighth))
        self.upsamples = nn.Sequential(
            *(module for _ in range(3) for module in (Residual2d(eighth), Attention(eighth))),
            *(Upsample(eighth, over_time=True), Residual3d(eighth // 2, quarter, 2)),
            *(Residual3d(quarter, quarter, 2), Residual3d(quarter, quarter, 2)),
            *(Upsample(quarter, over_time=True), Residual3d(quarter // 2, half, 4)),
            *(Residual3d(half, half, 4), Residual3d(half, half, 4)),
            *(Upsample(half, over_time=False), Residual3d(half // 2, full, 4)),
            *(Residual3d(full, full, 4), Residual3d(full, full, 4)),
        )
        pixels = ConvPair(2 * full, 3, 3, GROUP, full_precision=True)
        self.head = nn.Sequential(NormGain(2 * full, 3), nn.Identity(), pixels)

    def forward(self, latent_BTHWC: torch.Tensor, history: History) -> torch.Tensor:
        """`B t h w z` -> `B T H W 3`: the last 2-D output for frame 0 and the first frame of each group, the 3-D one for others."""
        h = run([self.conv1, *self.middle, *self.upsamples], latent_BTHWC, history)
        flat, deep = self.head[2](activated(h, self.head[0]), history).chunk(2, dim=-1)
        return torch.where(begins_group(flat.shape[1], GROUP, history, flat.device), flat, deep)


class Network(PublishedNetwork):
    """IV-VAE. Under `torch.autocast` the first and last convolutions and latents stay float32 (on CUDA: in the precision of float32
    products that PyTorch is set to).

    Images do not use the layers that halve and double time; these get a gradient of zero, not None.
    """

    family, last_weight = "ivvae", "decoder.head.2.conv_2d.weight"  # of key frames: every clip has one
    logvar_range = None  # not clamped, as published

    def add_layers(self) -> None:
        """Encoder, `conv1` to moments, `conv2` from latents, decoder."""
        config = Config.of(self.config)
        self.encoder = Encoder(config)
        self.conv1 = ConvPair(2 * config.z_dim, config.z_dim, 1, full_precision=True)
        self.conv2 = ConvPair(config.z_dim, config.z_dim // 2, 1, full_precision=True)
        self.decoder = Decoder(config)

    def run_encoder(self, video_BCTHW: torch.Tensor, history: History) -> Encoded:
        """`B 3 T H W` -> mean and log-variance `B z t h w`."""
        heads = self.encoder(video_BCTHW.movedim(1, -1).contiguous(), history)
        # of both branches, means before log-variances
        moments = self.conv1(heads).unflatten(-1, (2, 2, -1))
        mean, logvar = (half.flatten(-2).movedim(-1, 1) for half in moments.unbind(-2))
        return Encoded(mean, logvar)

    def run_decoder(self, latent_BCthw: torch.Tensor, history: History) -> Decoded:
        """`B z t h w` -> `B 3 T H W`."""
        both = self.conv2(latent_BCthw.movedim(1, -1).contiguous())
        return Decoded(self.decoder(both, history).movedim(-1, 1))
