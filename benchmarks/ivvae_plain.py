"""IV-VAE written layer by layer in plain PyTorch, chunked as its authors do: the implementation that speed is compared with.

Takes published weights (`config`, `state_dict`) and a float video `BCTHW` in [-1, 1], or raw latents; returns posterior mean and
log-variance `BCthw`, or a video. Nothing is folded: contiguous `BCTHW` everywhere, `F.conv2d` and `F.conv3d` of a pair run one after
the other, zero frames are padded and multiplied, branches are concatenated, the head's six outputs too.

The official way in time: the encoder takes frame 0 and then 4 frames per call, the decoder one latent per call; every 3x3x3 convolution
keeps the last frame of its input in a cache, numbered in the order of running.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Weights(nn.Module):
    """Tensors by published key, which move with the module."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for key, value in state_dict.items():
            self.register_buffer(key.replace(".", "/"), value.clone())

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key.replace(".", "/")]

    def __contains__(self, key: str) -> bool:
        return key.replace(".", "/") in self._buffers


class Cache:
    """Last input frames by running number; `first` until one call has gone through."""

    def __init__(self) -> None:
        self.frames: list[torch.Tensor] = []
        self.first = True
        self.index = 0

    def next_call(self) -> None:
        self.first, self.index = False, 0

    def swap(self, x: torch.Tensor) -> torch.Tensor | None:
        """Keeps the last frame of `x`, returns the one kept before."""
        last = x[:, :, -1:].clone()
        if self.first:
            self.frames.append(last)
            return None
        before, self.frames[self.index] = self.frames[self.index], last
        self.index += 1
        return before


def per_frame(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, **how: Any) -> torch.Tensor:
    """A 2-D convolution of every frame of `BCTHW`."""
    B, _, T, _, _ = x.shape
    y = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight, bias, **how)
    return y.unflatten(0, (B, T)).transpose(1, 2).contiguous()


def norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Each half over its own channels."""
    c = x.shape[1] // 2
    halves = [F.normalize(half, dim=1) * c**0.5 for half in x.chunk(2, dim=1)]
    return torch.cat(halves, dim=1) * gamma


def conv_pair(w: Weights, key: str, x: torch.Tensor, group: int, cache: Cache) -> torch.Tensor:
    """3x3 and group-causal 3x3x3 over all channels, outputs one after the other."""
    T = x.shape[2]
    y_2d = per_frame(x, w[f"{key}.conv_2d.weight"], w[f"{key}.conv_2d.bias"], padding=1)
    before = cache.swap(x)
    if before is None:
        padded = torch.cat([x, x, torch.zeros_like(x)], dim=2)
        y_3d = F.conv3d(padded, w[f"{key}.conv_3d.weight"], w[f"{key}.conv_3d.bias"], padding=(0, 1, 1))
        return torch.cat([y_2d, y_3d], dim=1)
    groups = []
    for start in range(0, T, group):
        part = x[:, :, start : start + group]
        padded = torch.cat([before, part, torch.zeros_like(before)], dim=2)
        groups.append(F.conv3d(padded, w[f"{key}.conv_3d.weight"], w[f"{key}.conv_3d.bias"], padding=(0, 1, 1)))
        before = part[:, :, -1:]
    return torch.cat([y_2d, torch.cat(groups, dim=2)], dim=1)


def conv_pair_1x1(w: Weights, key: str, x: torch.Tensor) -> torch.Tensor:
    y_2d = per_frame(x, w[f"{key}.conv_2d.weight"], w[f"{key}.conv_2d.bias"])
    y_3d = F.conv3d(x, w[f"{key}.conv_3d.weight"], w[f"{key}.conv_3d.bias"])
    return torch.cat([y_2d, y_3d], dim=1)


def residual_3d(w: Weights, key: str, x: torch.Tensor, group: int, cache: Cache) -> torch.Tensor:
    y = F.silu(norm(x, w[f"{key}.residual.0.gamma"]))
    y = conv_pair(w, f"{key}.residual.2", y, group, cache)
    y = F.silu(norm(y, w[f"{key}.residual.3.gamma"]))
    y = conv_pair(w, f"{key}.residual.6", y, group, cache)
    return y + (conv_pair_1x1(w, f"{key}.shortcut", x) if f"{key}.shortcut.conv_2d.weight" in w else x)


def residual_2d(w: Weights, key: str, x: torch.Tensor) -> torch.Tensor:
    y = x
    for gain, conv in ((0, 2), (3, 6)):
        y = F.silu(norm(y, w[f"{key}.residual.{gain}.gamma"]))
        y = per_frame(y, w[f"{key}.residual.{conv}.conv.weight"], w[f"{key}.residual.{conv}.conv.bias"], padding=1)
    return y + x


def attention(w: Weights, key: str, x: torch.Tensor) -> torch.Tensor:
    halves = []
    for half, branch in zip(x.chunk(2, dim=1), ("Attention_2d", "Attention_3d"), strict=True):
        at = f"{key}.{branch}"
        B, c, T, H, W = half.shape
        frames = half.transpose(1, 2).flatten(0, 1)
        y = F.normalize(frames, dim=1) * c**0.5 * w[f"{at}.norm.gamma"]
        qkv = F.conv2d(y, w[f"{at}.to_qkv.weight"], w[f"{at}.to_qkv.bias"]).flatten(2).transpose(1, 2)
        q, k, v = (part.unsqueeze(1).contiguous() for part in qkv.chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).unflatten(2, (H, W))
        y = F.conv2d(y, w[f"{at}.proj.weight"], w[f"{at}.proj.bias"]) + frames
        halves.append(y.unflatten(0, (B, T)).transpose(1, 2))
    return torch.cat(halves, dim=1)


def down(w: Weights, key: str, x: torch.Tensor, cache: Cache) -> torch.Tensor:
    x_2d, x_3d = (
        per_frame(F.pad(half, (0, 1, 0, 1)), w[f"{key}.{name}.1.weight"], w[f"{key}.{name}.1.bias"], stride=2)
        for half, name in zip(x.chunk(2, dim=1), ("resample_2d", "resample_3d"), strict=True)
    )
    if f"{key}.time_conv.weight" in w and not cache.first:
        x_2d = x_2d[:, :, ::2]
        x_3d = F.conv3d(x_3d, w[f"{key}.time_conv.weight"], w[f"{key}.time_conv.bias"], stride=(2, 1, 1))
    return torch.cat([x_2d, x_3d], dim=1)


def up(w: Weights, key: str, x: torch.Tensor, cache: Cache) -> torch.Tensor:
    x_2d, x_3d = x.chunk(2, dim=1)
    if f"{key}.time_conv.weight" in w and not cache.first:
        x_2d = x_2d.repeat_interleave(2, dim=2)
        both = F.conv3d(x_3d, w[f"{key}.time_conv.weight"], w[f"{key}.time_conv.bias"])
        x_3d = torch.stack(both.chunk(2, dim=1), dim=3).flatten(2, 3)
    halves = []
    for half, name in ((x_2d, "resample_2d"), (x_3d, "resample_3d")):
        doubled = F.interpolate(half, scale_factor=(1.0, 2.0, 2.0), mode="nearest-exact")
        halves.append(per_frame(doubled, w[f"{key}.{name}.1.weight"], w[f"{key}.{name}.1.bias"], padding=1))
    return torch.cat(halves, dim=1)


def pyramid(w: Weights, key: str, x: torch.Tensor) -> torch.Tensor:
    outputs = [per_frame(x, w[f"{key}.PAC_0.conv.weight"], w[f"{key}.PAC_0.conv.bias"])]
    for d in (1, 3, 6, 9, 12):
        outputs.append(
            per_frame(x, w[f"{key}.PAC_{d}.conv.weight"], w[f"{key}.PAC_{d}.conv.bias"], padding=d, dilation=d)
        )
    firsts, seconds = zip(*(y.chunk(2, dim=1) for y in outputs), strict=True)
    stacked = torch.cat([*firsts, *seconds], dim=1)
    return per_frame(stacked, w[f"{key}.PAC_conv.conv.weight"], w[f"{key}.PAC_conv.conv.bias"])


class PlainIVVAE(nn.Module):
    """Both halves; the call is the encoder's mean."""

    def __init__(self, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        del config  # every width can be read from the weights
        self.weights = Weights(state_dict)

    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W` in [-1, 1], T = 4n+1 -> posterior mean `B z n+1 H/8 W/8`."""
        return self.encode(video_BCTHW)[0]

    def encode_call(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        w, key = self.weights, "encoder.downsamples"
        x = conv_pair(w, "encoder.conv1", x, 4, cache)
        group = 4
        for index in range(9):
            if index in (2, 5, 8):
                x = down(w, f"{key}.{index}", x, cache)
                group = 2 if index == 5 else group
            else:
                x = residual_3d(w, f"{key}.{index}", x, group, cache)
        for name in [f"{key}.{index}" for index in range(9, 14)] + [f"encoder.middle.{index}" for index in range(3)]:
            x = residual_2d(w, name, x) if f"{name}.residual.0.gamma" in w else attention(w, name, x)
        x = F.silu(norm(x, w["encoder.head.0.gamma"]))
        return pyramid(w, "encoder.head.2", x)

    @torch.inference_mode()
    def encode(self, video_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, with the log-variance behind the mean."""
        cache, latents = Cache(), []
        for start in (0, *range(1, video_BCTHW.shape[2], 4)):
            latents.append(self.encode_call(video_BCTHW[:, :, start : start + (4 if start else 1)], cache))
            cache.next_call()
        moments = conv_pair_1x1(self.weights, "conv1", torch.cat(latents, dim=2))
        m2, v2, m3, v3 = moments.chunk(4, dim=1)
        return torch.cat([m2, m3], dim=1), torch.cat([v2, v3], dim=1)

    def decode_call(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:
        w, key = self.weights, "decoder.upsamples"
        x = per_frame(x, w["decoder.conv1.conv.weight"], w["decoder.conv1.conv.bias"], padding=1)
        for name in [f"decoder.middle.{index}" for index in range(3)] + [f"{key}.{index}" for index in range(6)]:
            x = residual_2d(w, name, x) if f"{name}.residual.0.gamma" in w else attention(w, name, x)
        for index in range(6, 18):
            if index in (6, 10, 14):
                x = up(w, f"{key}.{index}", x, cache)
            else:
                x = residual_3d(w, f"{key}.{index}", x, 2 if index < 10 else 4, cache)
        x = F.silu(norm(x, w["decoder.head.0.gamma"]))
        x = conv_pair(w, "decoder.head.2", x, 4, cache)
        return torch.cat([x[:, :3, :1], x[:, 3:, 1:]], dim=2)

    @torch.inference_mode()
    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """Raw latents `B z t h w` -> video `B 3 4(t-1)+1 8h 8w`, not clamped."""
        x = conv_pair_1x1(self.weights, "conv2", latent_BCthw)
        cache, videos = Cache(), []
        for t in range(x.shape[2]):
            videos.append(self.decode_call(x[:, :, t : t + 1], cache))
            cache.next_call()
        return torch.cat(videos, dim=2)
