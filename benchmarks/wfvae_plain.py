"""WF-VAE encode and decode written layer by layer in plain PyTorch: the implementation that speed is compared with.

Takes published weights (`config`, `state_dict`) and a float video `BCTHW` in [-1, 1], or latents; returns the posterior mean `BCthw`
(mean and log-variance are computed), or the video. Nothing is folded or reordered: the whole clip at once on contiguous `BCTHW`, Haar
filters as strided convolutions, causal padding by repeating the first frame, LayerNorm by permuting, attention as two matrix products,
convolutions of frames with frames as the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

VOLUME = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
PLANE = ("aa", "ad", "da", "dd")


class Weights(nn.Module):
    """Tensors by published key, moved and cast with the module that holds them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for key, tensor in tensors.items():
            self.register_buffer(key.replace(".", "/"), tensor.detach().clone())

    def __contains__(self, key: str) -> bool:
        return key.replace(".", "/") in self._buffers

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.get_buffer(key.replace(".", "/"))


def over_frames(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """A layer of frames on a clip: frames merged into the batch and back."""
    B, _, T, _, _ = x.shape
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (B, T)).transpose(1, 2)


class PlainWFVAE(nn.Module):
    """Both directions, every configuration the published class knows."""

    def __init__(self, config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config = dict(config)
        self.weights = Weights(state_dict)

    # ---- layers -----------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights or f"{name}.conv.weight" in self.weights

    def frame_conv(self, name: str, x: torch.Tensor, **how: int) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        how = how or {"padding": weight.shape[-1] // 2}
        return over_frames(lambda frames: F.conv2d(frames, weight, bias, **how), x)

    def causal_conv(self, name: str, x: torch.Tensor, *, stride: int = 1, padding: int = 1) -> torch.Tensor:
        weight, bias = self.weights[f"{name}.conv.weight"], self.weights[f"{name}.conv.bias"]
        if weight.shape[2] == 1:
            return F.conv3d(x, weight, bias)
        x = torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], dim=2)
        return F.conv3d(x, weight, bias, stride=stride, padding=(0, padding, padding))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.weight" in self.weights:
            return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)
        weight, bias = self.weights[f"{name}.norm.weight"], self.weights[f"{name}.norm.bias"]
        normed = F.layer_norm(x.permute(0, 2, 3, 4, 1), weight.shape, weight, bias, eps=1e-6)
        return normed.permute(0, 4, 1, 2, 3).contiguous()

    def conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Whichever kind is published under this name."""
        return self.causal_conv(name, x) if f"{name}.conv.weight" in self.weights else self.frame_conv(name, x)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm_of(name, 1, x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm_of(name, 2, h)))
        return h + (self.conv(f"{name}.nin_shortcut", x) if self.has(f"{name}.nin_shortcut") else x)

    def norm_of(self, name: str, number: int, x: torch.Tensor) -> torch.Tensor:
        """The norm of a residual block; GroupNorm in a block of frames sees one frame at a time."""
        if f"{name}.norm{number}.weight" in self.weights and f"{name}.conv1.weight" in self.weights:
            return over_frames(lambda frames: self.norm(f"{name}.norm{number}", frames), x)
        return self.norm(f"{name}.norm{number}", x)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        B, C, T, H, W = x.shape
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.causal_conv(f"{name}.{part}", h) for part in ("q", "k", "v"))
        mixing = (
            self.config["attention_type"] == "AttnBlock3D"
        )  # its published form forgets to bring frames to the front
        q, k, v = ((y if mixing else y.transpose(1, 2)).reshape(B * T, C, H * W) for y in (q, k, v))
        h = v @ torch.softmax(q.transpose(1, 2) @ k * C**-0.5, dim=2).transpose(1, 2)
        h = h.view(B, C, T, H, W) if mixing else h.view(B, T, C, H, W).transpose(1, 2).contiguous()
        return x + self.causal_conv(f"{name}.proj_out", h)

    def middle(self, name: str, x: torch.Tensor) -> torch.Tensor:
        for index in range(3 if self.config["use_attention"] else 2):
            block = self.attention if f"{name}.{index}.q.conv.weight" in self.weights else self.residual
            x = block(f"{name}.{index}", x)
        return x

    def shrink(self, name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        if f"{name}.conv.conv.weight" in self.weights:
            return self.causal_conv(f"{name}.conv", x, stride=2, padding=0)
        return self.frame_conv(f"{name}.conv", x, stride=2)

    def grow(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if f"{name}.conv.conv.weight" not in self.weights:
            x = over_frames(lambda frames: F.interpolate(frames, scale_factor=2, mode="nearest"), x)
            return self.frame_conv(f"{name}.conv", x)
        parts = [F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")]
        if x.shape[2] > 1:
            how = self.config["t_interpolation"]
            rest = F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode=how)
            parts.append(F.interpolate(rest, scale_factor=(1, 2, 2), mode="trilinear"))
        return self.causal_conv(f"{name}.conv", torch.cat(parts, dim=2))

    def analyse(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Haar filters as strided convolutions of each colour; channel = 3 * band + rgb."""
        if f"{name}.aa" in self.weights:
            bank = torch.cat([self.weights[f"{name}.{band}"] for band in PLANE])[:, :, None]
        else:
            bank = torch.cat([self.weights[f"{name}.{band}_conv.conv.weight"] for band in VOLUME])
            x = torch.cat([x[:, :, :1], x], dim=2)
        colours = [F.conv3d(x[:, c : c + 1], bank, stride=bank.shape[2:]) for c in range(3)]
        return torch.stack(colours, dim=2).flatten(1, 2)

    def synthesise(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Transposed Haar filters; over frames, the first frame is dropped."""
        volume = f"{name}.aa" not in self.weights
        bank = torch.cat([self.weights[f"{name}.{band}"] for band in (VOLUME if volume else PLANE)])
        bank = bank if volume else bank[:, :, None]
        colours = [F.conv_transpose3d(x[:, c::3], bank, stride=bank.shape[2:]) for c in range(3)]
        return torch.cat(colours, dim=1)[:, :, int(volume) :]

    # ---- directions -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def forward(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        """`B 3 T H W` in [-1, 1], T = 4n+1 (8n+1) -> mean `B d n+1 H/8 W/8` (of the whole posterior)."""
        return self.posterior(video_BCTHW)[0]

    @torch.inference_mode()
    def posterior(self, video_BCTHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, with the clamped log-variance."""
        n = self.config["encoder_num_resblocks"]
        bands1 = self.analyse("encoder.wavelet_transform_in", video_BCTHW)
        bands2 = self.analyse("encoder.wavelet_transform_l1", bands1[:, :3])
        bands3 = self.analyse("encoder.wavelet_transform_l2", bands2[:, :3])
        h = self.frame_conv("encoder.down1.0", bands1)
        for index in range(1, n + 1):
            h = self.residual(f"encoder.down1.{index}", h)
        h = self.shrink(f"encoder.down1.{n + 1}", h)
        h = torch.cat([h, self.frame_conv("encoder.connect_l1", bands2)], dim=1)
        h = self.frame_conv("encoder.down2.0", h)
        for index in range(1, n + 1):
            h = self.residual(f"encoder.down2.{index}", h)
        h = self.shrink(f"encoder.down2.{n + 1}", h)
        h = self.middle("encoder.mid", torch.cat([h, self.frame_conv("encoder.connect_l2", bands3)], dim=1))
        mean, logvar = self.causal_conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", h))).chunk(2, dim=1)
        return mean.contiguous(), logvar.clamp(-30.0, 20.0)

    @torch.inference_mode()
    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """`B d n+1 h w` -> video `B 3 T H W`, not clamped."""
        n, width = self.config["decoder_num_resblocks"], 4 * self.config["base_channels"]
        h = self.middle("decoder.mid", self.causal_conv("decoder.conv_in", latent_BCthw))
        image = self.synthesise("decoder.inverse_wavelet_transform_l2", self.flow("decoder.connect_l2", h[:, width:]))
        h = h[:, :width]
        for index in range(n):
            h = self.residual(f"decoder.up2.{index}", h)
        h = self.residual(f"decoder.up2.{n + 1}", self.grow(f"decoder.up2.{n}", h))
        bands = self.flow("decoder.connect_l1", h[:, width:])
        bands[:, :3] += image
        image = self.synthesise("decoder.inverse_wavelet_transform_l1", bands)
        h = h[:, :width]
        for index in range(n):
            h = self.residual(f"decoder.up1.{index}", h)
        h = self.residual(f"decoder.up1.{n + 1}", self.grow(f"decoder.up1.{n}", h))
        for index in range(2):
            h = self.residual(f"decoder.layer.{index}", h)
        h = self.frame_conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", h)))
        h[:, :3] += image
        return self.synthesise("decoder.inverse_wavelet_transform_out", h)

    def flow(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Residual blocks and the convolution that makes bands."""
        count = self.config["connect_res_layer_num"]
        for index in range(count):
            x = self.residual(f"{name}.{index}", x)
        return self.frame_conv(f"{name}.{count}", x)
