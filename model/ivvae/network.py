"""IV-VAE as its authors define it: a key-frame branch of 2-D and a motion branch of 3-D convolutions, causal by groups of four frames.

Video `B 3 T H W` in [-1, 1], T = 4n+1 (one frame is an image) -> posterior `B z t h w` -> video. Modules and parameters have their
published names. A video may come in steps, with a `History` of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model import inputs
from model.history import WHOLE
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
    activated,
    begins_group,
)
from model.layers import run, set_products
from model.posterior import Posterior
from model.reconstruction import Reconstruction
from model.registry import complete, spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from model.history import History

GROUP = 4  # frames of a latent


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration. `widths`: channels of a branch at 1, 1/2, 1/4 and 1/8 of the frame size."""

    z_dim: int
    dim: int
    widths: tuple[int, int, int, int]

    @classmethod
    def of(cls, published: Mapping[str, Any]) -> Config:
        """From a complete configuration in published keys, which `registry.spec` has checked."""
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

    def forward(self, video_BTHWC: torch.Tensor, history: History, *, recompute: bool = False) -> torch.Tensor:
        """`B T H W 3` -> `B t h w 2z`."""
        h = run([self.conv1, *self.downsamples, *self.middle], video_BTHWC, history, recompute=recompute)
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

    def forward(self, latent_BTHWC: torch.Tensor, history: History, *, recompute: bool = False) -> torch.Tensor:
        """`B t h w z` -> `B T H W 3`: the last 2-D output for frame 0 and the first frame of each group, the 3-D one for others."""
        h = run([self.conv1, *self.middle, *self.upsamples], latent_BTHWC, history, recompute=recompute)
        flat, deep = self.head[2](activated(h, self.head[0]), history).chunk(2, dim=-1)
        return torch.where(begins_group(flat.shape[1], GROUP, history, flat.device), flat, deep)


class Network(nn.Module):
    """IV-VAE. Under `torch.autocast` the first and last convolutions and latents stay float32 (on CUDA: in
    the precision of float32 products that PyTorch is set to).

    Images do not use the layers that halve and double time; these get a gradient of zero, not None.

    Attributes:
        config: complete published configuration. spec: LatentSpec. recompute: blocks keep only their input and run again in the backward
            pass (saves memory).
    """

    def __init__(self, config: Mapping[str, Any], *, recompute: bool = False) -> None:
        """Gains of norms are arbitrary, the other weights PyTorch's initial ones.

        Raises:
            ValueError: an impossible configuration.
        """
        super().__init__()
        self.config = complete("ivvae", config)
        self.spec = spec("ivvae", self.config)
        self.recompute = recompute
        made = Config.of(self.config)
        self.encoder = Encoder(made)
        self.conv1 = ConvPair(2 * made.z_dim, made.z_dim, 1, full_precision=True)
        self.conv2 = ConvPair(made.z_dim, made.z_dim // 2, 1, full_precision=True)
        self.decoder = Decoder(made)

    def encode(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> Posterior:
        """`B 3 T H W` -> mean and log-variance (not clamped, as published) `B z t h w`. Raises ValueError for a video that does not fit."""
        inputs.check_video(video_BCTHW, self.spec, first=history.first)
        heads = self.encoder(self._channels_last(video_BCTHW), history, recompute=self.recompute)
        # of both branches, means before log-variances
        moments = self.conv1(heads).unflatten(-1, (2, 2, -1))
        mean, logvar = (half.flatten(-2).movedim(-1, 1) for half in moments.unbind(-2))
        return Posterior(mean, logvar)

    def decode(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B z t h w` (neither scaled nor shifted) -> `B 3 T H W`, not clamped. Raises ValueError for a latent that does not fit."""
        inputs.check_latent(latent_BCthw, self.spec)
        both = self.conv2(self._channels_last(latent_BCthw))
        return cast("torch.Tensor", self.decoder(both, history, recompute=self.recompute)).movedim(-1, 1)

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A video -> its reconstruction, not clamped. The latent is mean + deviation * noise, or the mean without noise.

        Raises:
            ValueError: a video that does not fit; noise of another shape than the latent.
        """
        posterior = self.encode(video_BCTHW)
        return Reconstruction(self.decode(posterior.with_noise(noise_BCthw)), posterior)

    def prepare(self, dtype: torch.dtype) -> None:
        """For inference: products of 16 bits in between, all else in at least float32."""
        set_products(self, dtype)

    def last_layer(self) -> nn.Parameter:
        """Kernel of key frames and images, where adaptive weights compare gradients; every clip has a key frame."""
        return cast("nn.Parameter", cast("ConvPair", self.decoder.head[2]).conv_2d.weight)

    def _channels_last(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        return x_BCTHW.movedim(1, -1).to(self.last_layer().dtype).contiguous()


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)
