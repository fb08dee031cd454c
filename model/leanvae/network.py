"""LeanVAE as its authors define it: Haar wavelets, patches, ResNAF layers, a compressed-sensing bottleneck (arXiv 2503.14325, section 3).

Video `B 3 T H W` in `spec.value_range`, T = 4n+1 -> posterior `B d t h w` -> video. Frame 0 is coded alone, every four frames after it as
one row: the h x w tokens of a latent frame. Names are the published ones. A video runs whole or, with a `History`, in steps of rows.

Shape suffixes: B batch, C channels, T H W frames and pixels or wavelet coefficients, t h w tokens (channel-last) or latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from model.history import WHOLE, History
from model.layers import COLOURS, for_weights, no_autocast, recomputed
from model.leanvae import haar
from model.leanvae.depthwise import causal_depthwise
from model.leanvae.facts import PATCH_FRAMES
from model.network import Decoded, Encoded, Published, PublishedNetwork, from_published


@dataclass(frozen=True, slots=True)
class Config:
    """Published configuration. `embedding_dim`: channels of low and high tokens together, `l_dim + h_dim`. `patch`: side of a patch in
    wavelet coefficients, half of its side in pixels.
    """

    latent_dim: int
    embedding_dim: int
    l_dim: int
    h_dim: int
    sep_num_layer: int
    fusion_num_layer: int
    ista_iter_num: int
    ista_layer_num: int
    patch: int

    @classmethod
    def of(cls, published: Published) -> Config:
        """From a complete published configuration."""
        return from_published(cls, published, patch=published["patch_size"][1])


class Network(PublishedNetwork):
    """LeanVAE. Under `torch.autocast` linear maps of NAF layers multiply in 16 bits; pixels, the residual stream, norms and latents
    stay float32.
    """

    family, last_weight = "leanvae", "decoder.video_high_proj.0.weight"

    def add_layers(self) -> None:
        """Encoder, bottleneck and decoder; `std_layer` is the log-variance's counterpart of the sensing matrix phi."""
        config = Config.of(self.config)
        self.latent_bottleneck = Bottleneck(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.std_layer = FullPrecisionLinear(config.embedding_dim, config.latent_dim)

    def run_encoder(self, video_BCTHW: torch.Tensor, history: History) -> Encoded:
        """`B 3 T H W` -> mean and log-variance `B d t h w`."""
        features_BthwC = self.encoder(video_BCTHW, history)
        mean, logvar = self.latent_bottleneck.compress(features_BthwC), self.std_layer(features_BthwC)
        return Encoded(mean.permute(0, 4, 1, 2, 3), logvar.permute(0, 4, 1, 2, 3))

    def run_decoder(self, latent_BCthw: torch.Tensor, history: History) -> Decoded:
        """`B d t h w` -> `B 3 T H W`."""
        features_BthwC = self.latent_bottleneck.recover(latent_BCthw.permute(0, 2, 3, 4, 1), history)
        return Decoded(self.decoder(features_BthwC, history))

    def prepare(self, dtype: torch.dtype) -> None:
        """Casts linear maps of NAF layers in place for inference in `dtype`."""
        for module in self.modules():
            if isinstance(module, Stack):
                module.prepare(dtype)


class Encoder(nn.Module):
    """Video `B 3 T H W` -> features `B t h w C`: patches of wavelet bands, stacks xi_l, xi_h, of both xi_f (appendix F, variant 2)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch = config.patch
        for name, (width, coefficients) in _projections(config).items():
            # The published module has a rearrangement without parameters at 0.
            self.add_module(name, nn.Sequential(nn.Identity(), FullPrecisionLinear(coefficients, width)))
        self.low_layer = Stack(config.l_dim, config.sep_num_layer)
        self.high_layer = Stack(config.h_dim, config.sep_num_layer)
        self.fusion_layer = Stack(config.embedding_dim, config.fusion_num_layer)

    def forward(self, video_BCTHW: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """Features of all tokens; at a video's start row 0 is frame 0."""
        image, video = video_BCTHW.split([lead := int(history.first), video_BCTHW.shape[2] - lead], dim=2)
        rows = [self._tokens(haar.analyse(video, haar.video_signs()), "video", PATCH_FRAMES)]
        if history.first:
            rows.insert(0, self._tokens(haar.analyse(image, haar.image_signs()), "image", 1))
        low, high = (torch.cat(parts, dim=1) for parts in zip(*rows, strict=True))
        separate = self.low_layer(low, history), self.high_layer(high, history)
        return self.fusion_layer(torch.cat(separate, dim=-1), history)

    def _tokens(self, bands_BCTHW: torch.Tensor, kind: str, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high tokens `B t h w C` of wavelet bands; the low band comes first, 3 channels a band."""
        bands = bands_BCTHW[:, :COLOURS], bands_BCTHW[:, COLOURS:]
        low, high = (patches_of(part, frames, self.patch) for part in bands)
        return getattr(self, f"{kind}_low_proj")(low), getattr(self, f"{kind}_high_proj")(high)


class Decoder(nn.Module):
    """Features `B t h w C` -> video `B 3 T H W`, the encoder's layers in reverse (figure 9: "symmetric")."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch, self.l_dim = config.patch, config.l_dim
        for name, (width, coefficients) in _projections(config).items():
            self.add_module(name, nn.Sequential(FullPrecisionLinear(width, coefficients)))
        self.low_layer = Stack(config.l_dim, config.sep_num_layer)
        self.high_layer = Stack(config.h_dim, config.sep_num_layer)
        self.fusion_layer = Stack(config.embedding_dim, config.fusion_num_layer)

    def forward(self, features_BthwC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """The video of all tokens."""
        fused = self.fusion_layer(features_BthwC, history)
        low = self.low_layer(fused[..., : self.l_dim], history)
        high = self.high_layer(fused[..., self.l_dim :], history)
        lead = int(history.first)
        video = haar.synthesise(self._bands(low[:, lead:], high[:, lead:], "video", PATCH_FRAMES), haar.video_signs())
        if not history.first:
            return video
        image = haar.synthesise(self._bands(low[:, :1], high[:, :1], "image", 1), haar.image_signs())
        return torch.cat([image, video], dim=2)

    def _bands(self, low_BthwC: torch.Tensor, high_BthwC: torch.Tensor, kind: str, frames: int) -> torch.Tensor:
        """Wavelet bands of low and high tokens."""
        parts = getattr(self, f"{kind}_low_proj")(low_BthwC), getattr(self, f"{kind}_high_proj")(high_BthwC)
        return torch.cat([bands_of(part, frames, self.patch) for part in parts], dim=1)


class Bottleneck(nn.Module):
    """Channel compression: the sensing matrix phi, and K ISTA-Net+ iterations that recover features (section 3, appendix D).

    `Q`: first estimate. Of an iteration: step size `weights`, soft threshold `threshold`, networks F (`forward_l`) and F~ (`backward_l`).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        steps, layers = range(config.ista_iter_num), config.ista_layer_num
        self.phi = nn.Parameter(torch.empty(config.latent_dim, config.embedding_dim))
        self.Q = nn.Parameter(torch.empty(config.embedding_dim, config.latent_dim))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(())) for _ in steps)
        self.threshold = nn.ParameterList(nn.Parameter(torch.empty(1)) for _ in steps)
        self.forward_l = nn.ModuleList(Stack(config.embedding_dim, layers, residual=False) for _ in steps)
        self.backward_l = nn.ModuleList(Stack(config.embedding_dim, layers, residual=False) for _ in steps)

    def compress(self, features_BthwC: torch.Tensor) -> torch.Tensor:
        """`B t h w C` -> latents `B t h w d`."""
        return linear_without_autocast(features_BthwC, self.phi)

    def recover(self, latent_Bthwd: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B t h w d` -> features `B t h w C`. An iteration: a gradient step on |phi r - z|^2 / 2, then r + F~(soft threshold of F(r))."""
        r = linear_without_autocast(latent_Bthwd, self.Q)
        steps = zip(self.weights, self.threshold, self.forward_l, self.backward_l, strict=True)
        for weight, threshold, analysis, synthesis in steps:
            error = self.compress(r) - latent_Bthwd
            r = r - weight * linear_without_autocast(error, self.phi.T)
            sparse = soft_threshold(analysis(r, history), threshold)
            r = r + synthesis(sparse, history)
        return r


class Stack(nn.Module):
    """ResNAF layers: causal depthwise convolution, then feed-forward, each added to its input. NAF layers if `residual` is false."""

    recompute = False  # see `PublishedNetwork`

    def __init__(self, channels: int, layers: int, *, residual: bool = True) -> None:
        super().__init__()
        hidden = int(8 / 3 * channels)
        self.residual = residual
        self.dconv_layer = nn.ModuleList(
            nn.ModuleDict({"ds_conv": nn.Conv3d(channels, channels, 3, groups=channels)}) for _ in range(layers)
        )
        self.ffd_layer = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(channels),
                nn.Linear(channels, 2 * hidden, bias=False),
                nn.Identity(),  # GEGLU
                nn.Identity(),  # dropout of 0
                nn.Linear(hidden, channels, bias=False),
            )
            for _ in range(layers)
        )

    def prepare(self, dtype: torch.dtype) -> None:
        """Casts the feed-forward's weights to `dtype`, its hidden layer padded once."""
        for ffd in cast("Any", self.ffd_layer):
            weights = ffd[1].weight, ffd[4].weight
            for weight, padded in zip(weights, padded_geglu(*weights), strict=True):
                weight.data = padded.to(dtype)

    def forward(self, x_BthwC: torch.Tensor, history: History = WHOLE) -> torch.Tensor:
        """`B t h w C` -> `B t h w C`."""
        for conv, ffd in zip(self.dconv_layer, self.ffd_layer, strict=True):
            ds_conv = cast("nn.ModuleDict", conv)["ds_conv"]
            x_BthwC = recomputed(self.recompute, naf_layer, x_BthwC, ds_conv, ffd, self.residual, history)
        return x_BthwC


def naf_layer(x_BthwC: torch.Tensor, ds_conv: Any, ffd: Any, residual: bool, history: History) -> torch.Tensor:
    """`x + ds(x)`, then `x + ffd(x)`; without the sums if `residual` is false. Between steps ds keeps two rows (appendix E)."""
    mixed = causal_depthwise(x_BthwC, ds_conv.weight, ds_conv.bias, history)
    x_BthwC = x_BthwC + mixed if residual else mixed
    branch = geglu(for_weights(ffd[0](x_BthwC), ffd[1].weight), ffd[1].weight, ffd[4].weight)
    return x_BthwC + branch if residual else branch


def geglu(x: torch.Tensor, widen: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """`(a * gelu(g)) narrow^T` with `a, g = x widen^T`, without biases."""
    widen, narrow = padded_geglu(widen, narrow)
    value, gate = widen.chunk(2)
    return F.linear(F.linear(x, value) * F.gelu(F.linear(x, gate)), narrow)


def padded_geglu(widen: torch.Tensor, narrow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of `geglu` with its hidden width (341, 1365) padded with zeros to whole vectors and tiles, which changes no value.

    Products of odd widths cost a fifth more on a CPU.
    """
    channels, hidden = narrow.shape
    fill = -hidden % 16
    if not fill:
        return widen, narrow
    return F.pad(widen.view(2, hidden, channels), (0, 0, 0, fill)).flatten(0, 1), F.pad(narrow, (0, fill))


class FullPrecisionLinear(nn.Linear):
    """Linear map without autocast, see `linear_without_autocast`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`... C` -> `... C'`."""
        return linear_without_autocast(x, self.weight, self.bias)


def linear_without_autocast(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear map without autocast: 8-bit pixels and latents would lose bits in bfloat16."""
    with no_autocast(x):
        return F.linear(x.to(weight.dtype), weight, bias)


def soft_threshold(x: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """sign(x) * max(|x| - threshold, 0)."""
    return x.sign() * F.relu(x.abs() - threshold)


def patches_of(bands_BCTHW: torch.Tensor, frames: int, side: int) -> torch.Tensor:
    """Coefficients -> patches `B t h w (C frames side side)`."""
    B, C, T, H, W = bands_BCTHW.shape
    x = bands_BCTHW.reshape(B, C, T // frames, frames, H // side, side, W // side, side)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def bands_of(patches_BthwC: torch.Tensor, frames: int, side: int) -> torch.Tensor:
    """Patches -> coefficients `B C T H W`, the inverse of `patches_of`."""
    x = patches_BthwC.unflatten(4, (-1, frames, side, side)).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.flatten(6).flatten(4, 5).flatten(2, 3)


def _projections(config: Config) -> dict[str, tuple[int, int]]:
    """Tokens' channels and a patch's coefficients of each projection; image patches have 4 bands, video patches 8, of which 1 is low."""
    image = COLOURS * config.patch**2
    video = PATCH_FRAMES * image
    return {
        "video_low_proj": (config.l_dim, video),
        "video_high_proj": (config.h_dim, 7 * video),
        "image_low_proj": (config.l_dim, image),
        "image_high_proj": (config.h_dim, 3 * image),
    }
