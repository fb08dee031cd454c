"""LeanVAE encode written layer by layer in plain PyTorch: the implementation that speed is compared with.

Takes published weights (`config`, `state_dict`) and a float video `BCTHW` in the network's range; returns the posterior mean `BCthw`.
Nothing is folded or reordered: Haar filters as strided convolutions, patches by rearranging, `nn.Conv3d` on `BCTHW` with zero
padding, `nn.LayerNorm`, `nn.Linear`, GELU; the residual stream goes back and forth between the two layouts where a layer needs it.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class HaarConv(nn.Module):
    """Stride-2 Haar filters (+1/-1), the same for every colour; bands come out band-major (channel = 3 * band + rgb)."""

    def __init__(self, signs: list[torch.Tensor], stride: tuple[int, int, int]) -> None:
        super().__init__()
        # one group per colour: output of the grouped convolution is colour-major
        self.register_buffer("filters", torch.stack(signs).unsqueeze(1).repeat(3, 1, 1, 1, 1))
        self.bands, self.stride = len(signs), stride

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        coefficients = F.conv3d(video_BCTHW, self.filters.to(video_BCTHW.dtype), stride=self.stride, groups=3)
        B, _, T, H, W = coefficients.shape
        return coefficients.view(B, 3, self.bands, T, H, W).transpose(1, 2).reshape(B, 3 * self.bands, T, H, W)


def haar_image() -> HaarConv:
    """2-D filters of frame 0; band bits are (width, height)."""
    signs = [
        torch.tensor([[[(-1.0) ** (bw * c + bh * b) for c in (0, 1)] for b in (0, 1)]])
        for bw, bh in product((0, 1), repeat=2)
    ]
    return HaarConv(signs, (1, 2, 2))


def haar_video() -> HaarConv:
    """3-D filters of the frames after the first; band bits are (time, height, width)."""
    signs = [
        torch.tensor(
            [[[(-1.0) ** (bt * a + bh * b + bw * c) for c in (0, 1)] for b in (0, 1)] for a in (0, 1)],
        )
        for bt, bh, bw in product((0, 1), repeat=3)
    ]
    return HaarConv(signs, (2, 2, 2))


class Patchify(nn.Module):
    """`B C T H W` coefficients -> channel-last tokens `B t h w (C pt p p)`."""

    def __init__(self, frames: int, side: int) -> None:
        super().__init__()
        self.frames, self.side = frames, side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, C, T, H, W = x.shape
        t, h, w = T // self.frames, H // self.side, W // self.side
        x = x.view(B, C, t, self.frames, h, self.side, w, self.side)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(B, t, h, w, C * self.frames * self.side**2)


class DepthwiseConv(nn.Module):
    """Causal 3x3x3 depthwise convolution on channel-last tokens: zero frames in front, none behind."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ds_conv = nn.Conv3d(channels, channels, 3, groups=channels)

    def forward(self, x_BtHWC: torch.Tensor) -> torch.Tensor:
        x_BCtHW = x_BtHWC.permute(0, 4, 1, 2, 3)
        x_BCtHW = F.pad(x_BCtHW, (1, 1, 1, 1, 2, 0))
        return self.ds_conv(x_BCtHW).permute(0, 2, 3, 4, 1)


class GEGLU(nn.Module):
    """First half value, second half gate."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


def feed_forward(channels: int, inner: int) -> nn.Sequential:
    """LayerNorm, widening, GEGLU, dropout of 0, narrowing."""
    return nn.Sequential(
        nn.LayerNorm(channels),
        nn.Linear(channels, 2 * inner, bias=False),
        GEGLU(),
        nn.Dropout(0.0),
        nn.Linear(inner, channels, bias=False),
    )


class ResNAF(nn.Module):
    """Residual layers: x + ds(x), then x + ffd(x)."""

    def __init__(self, channels: int, inner: int, layers: int) -> None:
        super().__init__()
        self.dconv_layer = nn.ModuleList(DepthwiseConv(channels) for _ in range(layers))
        self.ffd_layer = nn.ModuleList(feed_forward(channels, inner) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for ds, ffd in zip(self.dconv_layer, self.ffd_layer, strict=True):
            x = x + ds(x)
            x = x + ffd(x)
        return x


class Encoder(nn.Module):
    """Pixels -> features, channel-last."""

    def __init__(self, low: int, high: int, sep: int, fusion: int, patch: int) -> None:
        super().__init__()
        width, image = low + high, 3 * patch**2
        self.haar_image, self.haar_video = haar_image(), haar_video()
        self.video_low_proj = nn.Sequential(Patchify(2, patch), nn.Linear(2 * image, low))
        self.video_high_proj = nn.Sequential(Patchify(2, patch), nn.Linear(14 * image, high))
        self.image_low_proj = nn.Sequential(Patchify(1, patch), nn.Linear(image, low))
        self.image_high_proj = nn.Sequential(Patchify(1, patch), nn.Linear(3 * image, high))
        self.low_layer = ResNAF(low, int(8 / 3 * low), sep)
        self.high_layer = ResNAF(high, int(8 / 3 * high), sep)
        self.fusion_layer = ResNAF(width, int(8 / 3 * width), fusion)

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        image = self.haar_image(video_BCTHW[:, :, :1])
        low, high = self.image_low_proj(image[:, :3]), self.image_high_proj(image[:, 3:])
        if video_BCTHW.shape[2] > 1:
            video = self.haar_video(video_BCTHW[:, :, 1:])
            low = torch.cat([low, self.video_low_proj(video[:, :3])], dim=1)
            high = torch.cat([high, self.video_high_proj(video[:, 3:])], dim=1)
        return self.fusion_layer(torch.cat([self.low_layer(low), self.high_layer(high)], dim=-1))


class PlainLeanVAE(nn.Module):
    """The encode half: encoder and `phi`."""

    def __init__(self, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        depths = config["sep_num_layer"], config["fusion_num_layer"]
        patch = config.get("patch_size", (2, 4, 4))[1]
        self.encoder = Encoder(config["l_dim"], config["h_dim"], *depths, patch)
        self.phi = nn.Parameter(state_dict["latent_bottleneck.phi"].clone(), requires_grad=False)
        weights = {
            key.removeprefix("encoder."): value for key, value in state_dict.items() if key.startswith("encoder.")
        }
        filters = {key: value for key, value in self.encoder.state_dict().items() if key.endswith(".filters")}
        self.encoder.load_state_dict({**weights, **filters})
        self.eval()

    @torch.inference_mode()
    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W`, T = 4n+1 -> posterior mean `B d n+1 h w`."""
        features = self.encoder(video_BCTHW)
        return F.linear(features, self.phi).permute(0, 4, 1, 2, 3).contiguous()
