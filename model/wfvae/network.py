"""WF-VAE as its authors define it: an energy flow of wavelet bands beside a causal backbone (arXiv 2411.17459, section 3.2).

Video `B 3 T H W` in [-1, 1], T = 4n+1 (8n+1 for 8x8x8; one frame is an image) -> posterior `B d t h w` -> video. Modules and parameters
have their published names. A video may come in steps, with a `History` of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, activated, run
from model.network import Bands, Decoded, Encoded, Published, PublishedNetwork, from_published
from model.wfvae.facts import time_stride
from model.wfvae.layers import CausalConv3d, Downsample, FrameConv, Residual, Upsample, add_low, middle, normaliser
from model.wfvae.wavelets import Analysis, Synthesis


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration. `time8x`: stride 8 in time, whose first resampling and second wavelet level are over frames too.
    `mid_layers_type`: kinds of the middle blocks, as WFVAE2 publishes them.
    """

    latent_dim: int
    base_channels: int
    encoder_energy_flow_hidden_size: int
    decoder_energy_flow_hidden_size: int
    encoder_num_resblocks: int
    decoder_num_resblocks: int
    connect_res_layer_num: int
    norm_type: str
    t_interpolation: str
    mid_layers_type: tuple[str, ...]
    time8x: bool

    @classmethod
    def of(cls, published: Published) -> Config:
        """From a complete published configuration."""
        attention = [published["attention_type"]] if published["use_attention"] else []
        middle_kinds = ("ResnetBlock3D", *attention, "ResnetBlock3D")
        return from_published(cls, published, mid_layers_type=middle_kinds, time8x=time_stride(published) == 8)


class Encoder(nn.Module):
    """Backbone of two levels, to which the energy flow adds the wavelet bands of each level (section 3.2, figure 2).

    W(1) to W(3) of equation 1 are `bands1`, `bands2`, `bands3`: transforms over frames, of each frame (8x8x8: over frames), over frames.
    The inflow blocks of section 3.2 are `connect_l1` and `connect_l2`.
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
        self.mid = middle(config.mid_layers_type, norm, 4 * c, before=2 * c + e)
        self.norm_out = normaliser(norm, 4 * c)
        self.conv_out = CausalConv3d(4 * c, 2 * config.latent_dim, full_precision=True)

    def forward(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> tuple[torch.Tensor, Bands]:
        """Mean and log-variance as channels `B 2d t h w`, and the bands that the energy flow reads at levels 2 and 3 (W of equation 5)."""
        bands1 = self.wavelet_transform_in(video_BCTHW, history)
        bands2 = self.wavelet_transform_l1(bands1[:, :COLOURS], history)
        bands3 = self.wavelet_transform_l2(bands2[:, :COLOURS], history)
        h = run(self.down1, bands1, history)
        h = run(self.down2, torch.cat([h, self.connect_l1(bands2)], dim=1), history)
        h = run(self.mid, torch.cat([h, self.connect_l2(bands3)], dim=1), history)
        return self.conv_out(activated(h, self.norm_out), history), (bands2, bands3)


class Decoder(nn.Module):
    """The encoder's levels in reverse. Each ends in channels of the energy flow, whose bands its outflow block `connect` predicts (3.2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, e, norm = config.base_channels, config.decoder_energy_flow_hidden_size, config.norm_type
        blocks, flow = range(config.decoder_num_resblocks), range(config.connect_res_layer_num)
        how = config.t_interpolation
        self.width = 4 * c
        self.conv_in = CausalConv3d(config.latent_dim, 4 * c, full_precision=True)
        self.mid = middle(config.mid_layers_type, norm, 4 * c, after=4 * c + e)
        self.connect_l2 = nn.Sequential(*(Residual(e, e, norm) for _ in flow), FrameConv(e, 24, full_precision=True))
        self.inverse_wavelet_transform_l2 = Synthesis(over_time=True)
        self.up2 = nn.Sequential(
            *(Residual(4 * c, 4 * c, norm) for _ in blocks),
            Upsample(4 * c, over_time=True, interpolation=how),
            Residual(4 * c, 4 * c + e, norm),
        )
        self.connect_l1 = nn.Sequential(
            *(Residual(e, e, norm) for _ in flow), FrameConv(e, 24 if config.time8x else 12, full_precision=True)
        )
        self.inverse_wavelet_transform_l1 = Synthesis(over_time=config.time8x)
        self.up1 = nn.Sequential(
            *(Residual((2 if index else 4) * c, 2 * c, norm) for index in blocks),
            Upsample(2 * c, over_time=config.time8x, interpolation=how),
            Residual(2 * c, 2 * c, norm),
        )
        self.layer = nn.Sequential(Residual(2 * c, c, norm), Residual(c, c, norm))
        self.norm_out = normaliser(norm, c)
        self.conv_out = FrameConv(c, 24, full_precision=True)
        self.inverse_wavelet_transform_out = Synthesis(over_time=True)

    def forward(self, latent_BCthw: torch.Tensor, history: History = WHOLE) -> tuple[torch.Tensor, Bands]:
        """Video `B 3 T H W`, and the bands of the second (after `add_low`) and third level (W^ of equation 5)."""
        width = self.width
        h = run([self.conv_in, *self.mid], latent_BCthw, history)
        bands3 = run(self.connect_l2, h[:, width:], history)
        h = run(self.up2, h[:, :width], history)
        bands2 = run(self.connect_l1, h[:, width:], history)
        bands2 = add_low(bands2, self.inverse_wavelet_transform_l2(bands3, history), history)
        h = run([*self.up1, *self.layer], h[:, :width], history)
        bands1 = self.conv_out(activated(h, self.norm_out))
        bands1 = add_low(bands1, self.inverse_wavelet_transform_l1(bands2, history), history)
        return self.inverse_wavelet_transform_out(bands1, history), (bands2, bands3)


class Network(PublishedNetwork):
    """WF-VAE. Under `torch.autocast` Haar transforms, the first and last convolutions, latents and bands stay float32 (on CUDA: in the
    precision of float32 products that PyTorch is set to).
    """

    family, last_weight = "wfvae", "decoder.conv_out.weight"

    def add_layers(self) -> None:
        """Encoder and decoder."""
        config = Config.of(self.config)
        self.encoder: nn.Module = Encoder(config)
        self.decoder: nn.Module = Decoder(config)

    def run_encoder(self, video_BCTHW: torch.Tensor, history: History) -> Encoded:
        """`B 3 T H W` -> mean and log-variance `B d t h w`, and the encoder's bands."""
        heads, bands = self.encoder(video_BCTHW, history)
        mean, logvar = heads.chunk(2, dim=1)
        return Encoded(mean, logvar, bands)

    def run_decoder(self, latent_BCthw: torch.Tensor, history: History) -> Decoded:
        """`B d t h w` -> `B 3 T H W`, and the decoder's bands."""
        return Decoded(*self.decoder(latent_BCthw, history))
