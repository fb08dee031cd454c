"""Trainable WF-VAE: the published network layer by layer over the whole clip. Section numbers are those of the specification (2 to 5).

Takes clips `B 3 T H W` in [-1, 1], T = 4n+1 (8n+1 for 8x8x8; one frame is an image); returns the reconstruction, its posterior,
and the energy flow's coefficients of encoder and decoder for the WL loss. `state_dict()` has exactly the published keys, so
`model.from_state_dict("wfvae", config, network.state_dict())` is the same network ready to encode.

Haar filters are buffers here, so `parameters()` are the trained ones, as in the published EMA files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from model import inputs
from model.layers import at_least_float32, initialise, per_frame, recomputed, without_autocast
from model.posterior import Posterior
from model.reconstruction import Coefficients, Reconstruction
from model.registry import complete, spec
from model.wfvae.parameters import Analysis, Attention, CausalConv3d, LayerNorm, Network, Residual, is_filter
from model.wfvae.vae import LOGVAR_RANGE
from model.wfvae.wavelets import PLANE_BANDS, VOLUME_BANDS, default_filter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from model.wfvae.parameters import Resample, Synthesis

COLOURS = 3


class TrainableWFVAE(Network):
    """WF-VAE with a forward pass that keeps what the backward pass needs.

    Under `torch.autocast` the convolutions and attention between pixels and latents run in 16 bits; Haar transforms, the first and last
    convolutions, norms, the residual stream, latents and coefficients stay float32.

    Attributes:
        config: complete configuration. spec: LatentSpec. recompute: blocks keep only their input and run again (saves memory).
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int = 0, recompute: bool = False) -> None:
        """Initialised from `seed` like the published code (`model.layers.initialise`).

        Raises:
            ValueError: an impossible configuration.
        """
        full = complete("wfvae", config)
        described = spec("wfvae", full)  # rejects impossible configurations before allocating memory
        with torch.device("meta"):
            super().__init__(full)
        self.to_empty(device="cpu")
        self.config, self.spec, self.recompute = full, described, recompute
        for key, tensor in self.state_dict().items():
            if is_filter(key):
                tensor.copy_(default_filter(key))
        _freeze_filters(self)
        initialise(self, seed)

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A clip -> its `Reconstruction` (video not clamped). The latent is mean + deviation * noise, or the mean if noise is None.

        Raises:
            ValueError: wrong rank, dtype, frame count or size; noise of another shape than the latent.
        """
        posterior, encoded = self._encode(video_BCTHW)
        video, decoded = self._decode(posterior.with_noise(noise_BCthw))
        return Reconstruction(video, posterior, Coefficients(encoded, decoded))

    def encode(self, video_BCTHW: torch.Tensor) -> Posterior:
        """`B 3 T H W` -> mean and clamped log-variance `B d t h w`. Raises ValueError as `forward`."""
        return self._encode(video_BCTHW)[0]

    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """`B d t h w` -> `B 3 T H W`, not clamped. Raises ValueError for anything else."""
        return self._decode(latent_BCthw)[0]

    def last_layer(self) -> nn.Parameter:
        """Kernel of the finest bands, where adaptive weights compare gradients (section 14)."""
        return cast("nn.Parameter", self.decoder.conv_out.weight)

    # ---- encoder and decoder ----------------------------------------------------------------------------------------

    def _encode(self, video_BCTHW: torch.Tensor) -> tuple[Posterior, tuple[torch.Tensor, ...]]:
        """Posterior, and the bands that the energy flow reads at the second and third level (section 4)."""
        inputs.check_video(video_BCTHW, self.spec, first=True)
        coder = self.encoder
        bands1 = without_autocast(analyse, video_BCTHW.to(coder.conv_out.conv.weight.dtype), coder.wavelet_transform_in)
        bands2 = without_autocast(analyse, bands1[:, :COLOURS], coder.wavelet_transform_l1)
        bands3 = without_autocast(analyse, bands2[:, :COLOURS], coder.wavelet_transform_l2)
        h = without_autocast(frame_conv, bands1, coder.down1[0])
        h = self._blocks(h, list(coder.down1)[1:-1])
        h = downsample(h, cast("Resample", coder.down1[-1]))
        h = frame_conv(torch.cat([h, without_autocast(frame_conv, bands2, coder.connect_l1)], dim=1), coder.down2[0])
        h = self._blocks(h, list(coder.down2)[1:-1])
        h = downsample(h, cast("Resample", coder.down2[-1]))
        h = self._blocks(torch.cat([h, without_autocast(frame_conv, bands3, coder.connect_l2)], dim=1), coder.mid)
        mean, logvar = without_autocast(causal_conv, activated(h, coder.norm_out), coder.conv_out).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR_RANGE)), (bands2, bands3)

    def _decode(self, latent_BCthw: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Video, and the bands that the decoder predicts at the second and third level, additions included (section 5)."""
        inputs.check_latent(latent_BCthw, self.spec)
        coder, width = self.decoder, 4 * self.config["base_channels"]
        count = self.config["decoder_num_resblocks"]
        h = without_autocast(causal_conv, latent_BCthw.to(coder.conv_in.conv.weight.dtype), coder.conv_in)
        h = self._blocks(h, coder.mid)
        bands3 = self._flow(h[:, width:], coder.connect_l2)
        h = self._upsampling_blocks(h[:, :width], coder.up2, count)
        bands2 = _add_low(
            self._flow(h[:, width:], coder.connect_l1), synthesise(bands3, coder.inverse_wavelet_transform_l2)
        )
        h = self._upsampling_blocks(h[:, :width], coder.up1, count)
        h = self._blocks(h, coder.layer)
        bands1 = without_autocast(frame_conv, activated(h, coder.norm_out), coder.conv_out)
        bands1 = _add_low(bands1, synthesise(bands2, coder.inverse_wavelet_transform_l1))
        return synthesise(bands1, coder.inverse_wavelet_transform_out), (bands2, bands3)

    def _blocks(self, x: torch.Tensor, blocks: Iterable[nn.Module]) -> torch.Tensor:
        mixes_frames = self.config["attention_type"] == "AttnBlock3D"
        for block in blocks:
            if isinstance(block, Attention):
                x = recomputed(self.recompute, attention, x, block, mixes_frames)
            else:
                x = recomputed(self.recompute, residual, x, cast("Residual", block))
        return x

    def _upsampling_blocks(self, x: torch.Tensor, stage: nn.Sequential, count: int) -> torch.Tensor:
        """`count` blocks, the upsampling, and the blocks after it."""
        x = self._blocks(x, list(stage)[:count])
        x = recomputed(self.recompute, upsample, x, cast("Resample", stage[count]), self.config["t_interpolation"])
        return self._blocks(x, list(stage)[count + 1 :])

    def _flow(self, x: torch.Tensor, connect: nn.Sequential) -> torch.Tensor:
        """Channels of the energy flow -> bands (section 5, `connect`)."""
        return without_autocast(frame_conv, self._blocks(x, list(connect)[:-1]), connect[-1])


# ---- layers ---------------------------------------------------------------------------------------------------------


def frame_conv(x_BCTHW: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    """`C2` (section 2): convolution of every frame with zero padding."""
    layer = cast("nn.Conv2d", conv)
    padding = layer.kernel_size[0] // 2
    return per_frame(lambda x_NCHW: F.conv2d(x_NCHW, layer.weight, layer.bias, padding=padding), x_BCTHW)


def causal_conv(x_BCTHW: torch.Tensor, clip: CausalConv3d) -> torch.Tensor:
    """`C3` (section 2): convolution over frames, two copies of the first in front, zero padding in space. A 1x1x1 kernel has no past."""
    conv = clip.conv
    if conv.kernel_size[0] == 1:
        return F.conv3d(x_BCTHW, conv.weight, conv.bias)
    return F.conv3d(_repeat_first(x_BCTHW, 2), conv.weight, conv.bias, padding=(0, 1, 1))


def activated(x_BCTHW: torch.Tensor, layer: nn.Module, *, frames: bool = False) -> torch.Tensor:
    """Norm and SiLU, recomputed in the backward pass: little work, much memory."""
    return recomputed(True, lambda x: F.silu(norm(x, layer, frames=frames)), x_BCTHW)


def norm(x_BCTHW: torch.Tensor, layer: nn.Module, *, frames: bool = False) -> torch.Tensor:
    """`N` (section 2), in at least float32; with `frames` group statistics are computed per frame."""
    with torch.autocast(x_BCTHW.device.type, enabled=False):
        x_BCTHW = at_least_float32(x_BCTHW)
        if isinstance(layer, LayerNorm):
            return cast("torch.Tensor", layer.norm(x_BCTHW.permute(0, 2, 3, 4, 1))).permute(0, 4, 1, 2, 3)
        return per_frame(layer, x_BCTHW) if frames else cast("torch.Tensor", layer(x_BCTHW))


def residual(x_BCTHW: torch.Tensor, block: Residual) -> torch.Tensor:
    """`R2` or `R3` (section 2)."""
    frames = isinstance(block.conv1, nn.Conv2d)
    h = _conv(activated(x_BCTHW, block.norm1, frames=frames), block.conv1)
    h = _conv(activated(h, block.norm2, frames=frames), block.conv2)
    shortcut = getattr(block, "nin_shortcut", None)
    return at_least_float32(x_BCTHW if shortcut is None else _conv(x_BCTHW, shortcut)) + h


def attention(x_BCTHW: torch.Tensor, block: Attention, mixes_frames: bool) -> torch.Tensor:
    """`A` (section 2): attention within every frame, one head. `mixes_frames`: the older form, which reads `B C T` as `(B T) C`."""
    parts: Any = block
    shape = x_BCTHW.shape
    normed = norm(x_BCTHW, parts.norm)

    def tokens(clip: CausalConv3d) -> torch.Tensor:
        y = causal_conv(normed, clip)
        return (y if mixes_frames else y.transpose(1, 2)).reshape(-1, shape[1], shape[3] * shape[4]).transpose(1, 2)

    q, k, v = (tokens(clip)[:, None] for clip in (parts.q, parts.k, parts.v))
    mixed = F.scaled_dot_product_attention(q, k, v)
    framed = shape if mixes_frames else (shape[0], shape[2], shape[1], *shape[3:])
    y = mixed[:, 0].transpose(1, 2).reshape(framed)
    return at_least_float32(x_BCTHW) + causal_conv(y if mixes_frames else y.transpose(1, 2), parts.proj_out)


def downsample(x_BCTHW: torch.Tensor, block: Resample) -> torch.Tensor:
    """Downsampling (section 4): zeros at the right and bottom edge, stride 2 in space, or also in time."""
    conv, padded = block.conv, F.pad(x_BCTHW, (0, 1, 0, 1))
    if isinstance(conv, CausalConv3d):
        return F.conv3d(_repeat_first(padded, 2), conv.conv.weight, conv.conv.bias, stride=2)
    return per_frame(lambda x_NCHW: F.conv2d(x_NCHW, conv.weight, conv.bias, stride=2), padded)


def upsample(x_BCTHW: torch.Tensor, block: Resample, interpolation: str) -> torch.Tensor:
    """Upsampling (section 5): frame 0 in space only, the other frames in time and then in space."""
    if not isinstance(block.conv, CausalConv3d):
        return frame_conv(per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0), x_BCTHW), block.conv)
    x_BCTHW = at_least_float32(x_BCTHW)
    if x_BCTHW.shape[2] > 1:
        rest = F.interpolate(x_BCTHW[:, :, 1:], scale_factor=(2.0, 1.0, 1.0), mode=interpolation)
        x_BCTHW = torch.cat([x_BCTHW[:, :, :1], rest], dim=2)
    larger = per_frame(lambda x_NCHW: F.interpolate(x_NCHW, scale_factor=2.0, mode="bilinear"), x_BCTHW)
    return causal_conv(larger, block.conv)


def analyse(x_BCTHW: torch.Tensor, bank: Analysis) -> torch.Tensor:
    """Haar transform (section 3): `B 3 T H W` -> bands `B 24 T' H/2 W/2`, or per frame `B 12 T H/2 W/2`. Channel = 3 * band + colour."""
    filters: Any = bank
    if hasattr(bank, PLANE_BANDS[0]):
        kernel = torch.cat([getattr(filters, name) for name in PLANE_BANDS])[:, :, None]
    else:
        kernel = torch.cat([getattr(filters, f"{name}_conv").conv.weight for name in VOLUME_BANDS])
        x_BCTHW = _repeat_first(x_BCTHW, 1)
    bands = F.conv3d(x_BCTHW.flatten(0, 1)[:, None], kernel, stride=kernel.shape[2:])
    return bands.unflatten(0, (-1, COLOURS)).transpose(1, 2).flatten(1, 2)


def synthesise(bands_BCTHW: torch.Tensor, bank: Synthesis) -> torch.Tensor:
    """Inverse Haar transform (section 3), in at least float32; the transform over frames drops its first frame."""
    names = PLANE_BANDS if hasattr(bank, PLANE_BANDS[0]) else VOLUME_BANDS
    kernel = torch.cat([getattr(bank, name) for name in names])
    volume = kernel.ndim == 5
    kernel = kernel if volume else kernel[:, :, None]
    colours = at_least_float32(bands_BCTHW).unflatten(1, (-1, COLOURS)).transpose(1, 2).flatten(0, 1)
    with torch.autocast(bands_BCTHW.device.type, enabled=False):
        image = F.conv_transpose3d(colours, kernel, stride=kernel.shape[2:])
    return image.unflatten(0, (-1, COLOURS)).squeeze(2)[:, :, int(volume) :]


def _conv(x_BCTHW: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return causal_conv(x_BCTHW, layer) if isinstance(layer, CausalConv3d) else frame_conv(x_BCTHW, layer)


def _repeat_first(x_BCTHW: torch.Tensor, copies: int) -> torch.Tensor:
    """Repeats the first frame in front."""
    return torch.cat([x_BCTHW[:, :, :1]] * copies + [x_BCTHW], dim=2)


def _add_low(bands_BCTHW: torch.Tensor, image_BCTHW: torch.Tensor) -> torch.Tensor:
    """Adds the image of the level below to the low band."""
    return torch.cat([bands_BCTHW[:, :COLOURS] + image_BCTHW, bands_BCTHW[:, COLOURS:]], dim=1)


def _freeze_filters(network: Network) -> None:
    """Turns the forward transforms' kernels into buffers of the same names."""
    for module in network.modules():
        if isinstance(module, Analysis):
            for clip in module.children():
                conv = cast("CausalConv3d", clip).conv
                weight = conv.weight.detach()
                del conv.weight
                conv.register_buffer("weight", weight)
