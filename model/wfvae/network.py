"""WF-VAE as its authors define it: an energy flow of wavelet bands beside a causal backbone (arXiv 2411.17459, section 3.2).

Video `B 3 T H W` in [-1, 1], T = 4n+1 (8n+1 for 8x8x8; one frame is an image) -> posterior `B d t h w` -> video. Modules and parameters
have their published names. A video may come in steps, with a `History` of each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from model import inputs
from model.history import WHOLE, History
from model.layers import COLOURS, run, set_products
from model.posterior import LOGVAR_RANGE, Posterior
from model.reconstruction import Coefficients, Reconstruction
from model.registry import complete, spec
from model.wfvae.facts import time_stride
from model.wfvae.layers import (
    Attention,
    CausalConv3d,
    Downsample,
    FrameConv,
    Residual,
    Upsample,
    activated,
    add_low,
    normaliser,
)
from model.wfvae.wavelets import Analysis, Synthesis

if TYPE_CHECKING:
    from collections.abc import Mapping

Bands = tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration. `time8x`: stride 8 in time, whose first resampling and second wavelet level are over frames too."""

    latent_dim: int
    base_channels: int
    encoder_energy_flow_hidden_size: int
    decoder_energy_flow_hidden_size: int
    encoder_num_resblocks: int
    decoder_num_resblocks: int
    connect_res_layer_num: int
    norm_type: str
    use_attention: bool
    attention_type: str
    t_interpolation: str
    time8x: bool

    @classmethod
    def of(cls, published: Mapping[str, Any]) -> Config:
        """From a complete configuration in published keys, which `registry.spec` has checked."""
        names = [item.name for item in fields(cls) if item.name != "time8x"]
        return cls(**{name: published[name] for name in names}, time8x=time_stride(published) == 8)

    def middle(self, channels: int, before: int, after: int) -> nn.Sequential:
        """Residual block, attention if there is one, residual block; `before` and `after` are the input and output widths."""
        mixes_frames = self.attention_type == "AttnBlock3D"
        attention = [Attention(channels, self.norm_type, mixes_frames=mixes_frames)] if self.use_attention else []
        return nn.Sequential(
            Residual(before, channels, self.norm_type),
            *attention,
            Residual(channels, after, self.norm_type),
        )


class Encoder(nn.Module):
    """Backbone of two levels, to which the energy flow adds the wavelet bands of each level.

    Of the paper: W1, W2, W3 are `bands1`, `bands2`, `bands3` (in the code over frames, of each frame, over frames); an inflow block is a
    `connect`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, e, norm = config.base_channels, config.encoder_energy_flow_hidden_size, config.norm_type
        blocks = range(config.encoder_num_resblocks)
        self.wavelet_transform_in = Analysis(over_time=True)
        self.wavelet_transform_l1 = Analysis(over_time=config.time8x)
        self.wavelet_transform_l2 = Analysis(over_time=True)
        self.down1 = nn.Sequential(
            FrameConv(24, c, full_precision=True),
            *(Residual(c, c, norm, over_time=False) for _ in blocks),
            Downsample(c, over_time=config.time8x),
        )
        self.connect_l1 = FrameConv(24 if config.time8x else 12, e, full_precision=True)
        self.down2 = nn.Sequential(
            FrameConv(c + e, 2 * c), *(Residual(2 * c, 2 * c, norm) for _ in blocks), Downsample(2 * c, over_time=True)
        )
        self.connect_l2 = FrameConv(24, e, full_precision=True)
        self.mid = config.middle(4 * c, 2 * c + e, 4 * c)
        self.norm_out = normaliser(norm, 4 * c)
        self.conv_out = CausalConv3d(4 * c, 2 * config.latent_dim, full_precision=True)

    def forward(
        self, video_BCTHW: torch.Tensor, history: History = WHOLE, *, recompute: bool = False
    ) -> tuple[torch.Tensor, Bands]:
        """Mean and log-variance as channels `B 2d t h w`, and the bands that the energy flow reads at the second and third level."""
        bands1 = self.wavelet_transform_in(video_BCTHW, history)
        bands2 = self.wavelet_transform_l1(bands1[:, :COLOURS], history)
        bands3 = self.wavelet_transform_l2(bands2[:, :COLOURS], history)
        h = run(self.down1, bands1, history, recompute=recompute)
        h = run(self.down2, torch.cat([h, self.connect_l1(bands2)], dim=1), history, recompute=recompute)
        h = run(self.mid, torch.cat([h, self.connect_l2(bands3)], dim=1), history, recompute=recompute)
        return self.conv_out(activated(h, self.norm_out), history), (bands2, bands3)


class Decoder(nn.Module):
    """The encoder's mirror: channels of each level split off as the energy flow; its outflow block, `connect`, gives the level's bands."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, e, norm = config.base_channels, config.decoder_energy_flow_hidden_size, config.norm_type
        blocks, how = config.decoder_num_resblocks, config.t_interpolation
        flow = range(config.connect_res_layer_num)
        self.width = 4 * c
        self.conv_in = CausalConv3d(config.latent_dim, 4 * c, full_precision=True)
        self.mid = config.middle(4 * c, 4 * c, 4 * c + e)
        self.connect_l2 = nn.Sequential(*(Residual(e, e, norm) for _ in flow), FrameConv(e, 24, full_precision=True))
        self.inverse_wavelet_transform_l2 = Synthesis(over_time=True)
        self.up2 = nn.Sequential(
            *(Residual(4 * c, 4 * c, norm) for _ in range(blocks)),
            Upsample(4 * c, over_time=True, interpolation=how),
            Residual(4 * c, 4 * c + e, norm),
        )
        self.connect_l1 = nn.Sequential(
            *(Residual(e, e, norm) for _ in flow), FrameConv(e, 24 if config.time8x else 12, full_precision=True)
        )
        self.inverse_wavelet_transform_l1 = Synthesis(over_time=config.time8x)
        self.up1 = nn.Sequential(
            *(Residual((2 if index else 4) * c, 2 * c, norm) for index in range(blocks)),
            Upsample(2 * c, over_time=config.time8x, interpolation=how),
            Residual(2 * c, 2 * c, norm),
        )
        self.layer = nn.Sequential(Residual(2 * c, c, norm), Residual(c, c, norm))
        self.norm_out = normaliser(norm, c)
        self.conv_out = FrameConv(c, 24, full_precision=True)
        self.inverse_wavelet_transform_out = Synthesis(over_time=True)

    def forward(
        self, latent_BCthw: torch.Tensor, history: History = WHOLE, *, recompute: bool = False
    ) -> tuple[torch.Tensor, Bands]:
        """Video `B 3 T H W`, and the bands predicted at the second and third level, with what is added to them."""
        width = self.width
        h = run([self.conv_in, *self.mid], latent_BCthw, history, recompute=recompute)
        bands3 = run(self.connect_l2, h[:, width:], history, recompute=recompute)
        h = run(self.up2, h[:, :width], history, recompute=recompute)
        bands2 = run(self.connect_l1, h[:, width:], history, recompute=recompute)
        bands2 = add_low(bands2, self.inverse_wavelet_transform_l2(bands3, history), history)
        h = run([*self.up1, *self.layer], h[:, :width], history, recompute=recompute)
        bands1 = self.conv_out(activated(h, self.norm_out))
        bands1 = add_low(bands1, self.inverse_wavelet_transform_l1(bands2, history), history)
        return self.inverse_wavelet_transform_out(bands1, history), (bands2, bands3)


class Network(nn.Module):
    """WF-VAE. Under `torch.autocast` Haar transforms, the first and last convolutions, latents and bands stay float32 (on CUDA: in the
    precision of float32 products that PyTorch is set to).

    Attributes:
        config: complete published configuration. spec: LatentSpec. recompute: blocks keep only their input and run again in the backward
            pass (saves memory).
    """

    family = "wfvae"

    def __init__(self, config: Mapping[str, Any], *, recompute: bool = False) -> None:
        """Weights are PyTorch's initial ones.

        Raises:
            ValueError: an impossible configuration.
        """
        super().__init__()
        self.config = complete(self.family, config)
        self.spec = spec(self.family, self.config)
        self.recompute = recompute
        self.encoder, self.decoder = self.coders()

    def coders(self) -> tuple[nn.Module, nn.Module]:
        """Encoder and decoder of the configuration."""
        made = Config.of(self.config)
        return Encoder(made), Decoder(made)

    def encode(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> Posterior:
        """`B 3 T H W` -> mean and clamped log-variance `B d t h w`. Raises ValueError for a video that does not fit."""
        return self._encoded(video_BCTHW, history)[0]

    def decode(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B d t h w` -> `B 3 T H W`, not clamped; steps before the last may hold frames back. Raises ValueError for a latent that does
        not fit.
        """
        return self._decoded(latent_BCthw, history)[0]

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A video -> its reconstruction, not clamped, with the bands of the WL loss. The latent is mean + deviation * noise, or the mean
        without noise.

        Raises:
            ValueError: a video that does not fit; noise of another shape than the latent.
        """
        posterior, encoded = self._encoded(video_BCTHW)
        video, decoded = self._decoded(posterior.with_noise(noise_BCthw))
        return Reconstruction(video, posterior, Coefficients(encoded, decoded))

    def prepare(self, dtype: torch.dtype) -> None:
        """Casts the weights for inference with large products in `dtype`."""
        set_products(self, dtype)

    def last_layer(self) -> nn.Parameter:
        """Kernel of the finest bands, where adaptive weights compare gradients."""
        return cast("nn.Parameter", cast("Any", self.decoder).conv_out.weight)

    def _encoded(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> tuple[Posterior, Bands]:
        inputs.check_video(video_BCTHW, self.spec, first=history.first)
        heads, bands = self.encoder(video_BCTHW.to(self.last_layer().dtype), history, recompute=self.recompute)
        mean, logvar = heads.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), bands

    def _decoded(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> tuple[torch.Tensor, Bands]:
        inputs.check_latent(latent_BCthw, self.spec)
        video, bands = self.decoder(latent_BCthw.to(self.last_layer().dtype), history, recompute=self.recompute)
        return video, bands


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)
