"""Trainable IV-VAE: the published network over the whole clip. Section numbers are those of the specification (sections 2 to 5).

Takes clips `B 3 T H W` in [-1, 1], T = 4n+1 (one frame is an image); returns the reconstruction and its posterior. `state_dict()`
has exactly the published keys, so `model.from_state_dict("ivvae", config, network.state_dict())` is the same network ready to encode;
`model.training.inflation` makes such weights from an image VAE's.

The published code processes groups of frames in turn and caches the last frame of each layer. Here a pair of convolutions is one
convolution per frame that computes the 2-D output and the product of each tap of the 3-D kernel; these are summed over
neighbouring frames, so that the whole clip is processed at once without padding frames. Frames come first, `B T C H W`, so that
using them as the batch is a view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from model import inputs
from model.ivvae.parameters import DILATIONS, Attention, Network, Resample, Residual2d, Residual3d
from model.layers import at_least_float32, initialise, recomputed, with_zero_gradient, without_autocast
from model.posterior import Posterior
from model.reconstruction import Reconstruction
from model.registry import complete, spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from model.ivvae.parameters import BranchAttention, ConvPair, FrameConv2d, NormGain, PyramidHead

GROUP = 4  # frames of a latent


class TrainableIVVAE(Network):
    """IV-VAE with a forward pass that keeps what the backward pass needs.

    Under `torch.autocast` the convolutions and attention between pixels and latents run in 16 bits; the first and last convolutions, norms,
    the residual stream and latents stay float32. Images do not use the layers that halve and double time; these get a gradient of zero, not
    None.

    Attributes:
        config: complete configuration. spec: LatentSpec. recompute: blocks keep only their input and run again (saves memory).
    """

    def __init__(self, config: Mapping[str, Any], *, seed: int = 0, recompute: bool = False) -> None:
        """Initialised from `seed` like the published code (`model.layers.initialise`).

        Raises:
            ValueError: an impossible configuration.
        """
        full = complete("ivvae", config)
        described = spec("ivvae", full)  # rejects impossible configurations before allocating memory
        with torch.device("meta"):
            super().__init__(full)
        self.to_empty(device="cpu")
        self.config, self.spec, self.recompute = full, described, recompute
        initialise(self, seed)

    def forward(self, video_BCTHW: torch.Tensor, noise_BCthw: torch.Tensor | None = None) -> Reconstruction:
        """A clip -> its `Reconstruction` (video not clamped). The latent is mean + deviation * noise, or the mean if noise is None.

        Raises:
            ValueError: wrong rank, dtype, frame count or size; noise of another shape than the latent.
        """
        posterior = self.encode(video_BCTHW)
        return Reconstruction(self.decode(posterior.with_noise(noise_BCthw)), posterior)

    def encode(self, video_BCTHW: torch.Tensor) -> Posterior:
        """`B 3 T H W` -> mean and log-variance (not clamped, as published) `B z t h w`. Raises ValueError as `forward`."""
        inputs.check_video(video_BCTHW, self.spec, first=True)
        coder = self.encoder
        h = without_autocast(pair, _frames_first(video_BCTHW, coder.conv1), coder.conv1, GROUP)
        h = self._encoder_blocks(h, [*coder.downsamples, *coder.middle])
        h = without_autocast(pyramid, activated(h, coder.head[0]), cast("PyramidHead", coder.head[2]))
        # of both branches, means before log-variances
        moments = without_autocast(point_pair, h, self.conv1).unflatten(2, (2, 2, -1))
        mean, logvar = (half.flatten(2, 3).transpose(1, 2) for half in moments.unbind(3))
        return Posterior(mean, logvar)

    def decode(self, latent_BCthw: torch.Tensor) -> torch.Tensor:
        """`B z t h w` (neither scaled nor shifted) -> `B 3 T H W`, not clamped. Raises ValueError for anything else."""
        inputs.check_latent(latent_BCthw, self.spec)
        coder = self.decoder
        h = without_autocast(point_pair, _frames_first(latent_BCthw, self.conv2), self.conv2)
        h = without_autocast(frame_conv, h, coder.conv1.conv)
        h = self._decoder_blocks(h, [*coder.middle, *coder.upsamples])
        both = without_autocast(pair, activated(h, coder.head[0]), cast("ConvPair", coder.head[2]), GROUP)
        return _select_branch(both).transpose(1, 2)

    def last_layer(self) -> nn.Parameter:
        """Kernel of key frames and images, where adaptive weights compare gradients; every clip has a key frame."""
        return cast("nn.Parameter", cast("ConvPair", self.decoder.head[2]).conv_2d.weight)

    def _encoder_blocks(self, x: torch.Tensor, blocks: Iterable[nn.Module]) -> torch.Tensor:
        """Applies blocks of the encoder; the first sees `GROUP` frames per latent."""
        group = GROUP
        for block in blocks:
            if isinstance(block, Resample):
                x = recomputed(self.recompute, downsample, x, block)
                group //= 2 if _over_time(block) else 1
            else:
                x = self._block(x, block, group)
        return x

    def _decoder_blocks(self, x: torch.Tensor, blocks: Iterable[nn.Module]) -> torch.Tensor:
        """Applies blocks of the decoder; the first sees one frame per latent."""
        group = 1
        for block in blocks:
            if isinstance(block, Resample):
                x = recomputed(self.recompute, upsample, x, block)
                group *= 2 if _over_time(block) else 1
            else:
                x = self._block(x, block, group)
        return x

    def _block(self, x: torch.Tensor, block: nn.Module, group: int) -> torch.Tensor:
        if isinstance(block, Residual3d):
            return recomputed(self.recompute, residual_3d, x, block, group)
        if isinstance(block, Residual2d):
            return recomputed(self.recompute, residual_2d, x, block)
        return recomputed(self.recompute, attention, x, cast("Attention", block))


# ---- layers: `B T C H W` to the same ------------------------------------------------------------------------------


def frame_conv(x_BTCHW: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """`P2` (section 2): convolution of every frame with zero padding."""
    return _per_frame(x_BTCHW, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)


def pair(x_BTCHW: torch.Tensor, convs: ConvPair, group: int) -> torch.Tensor:
    """`P3` with 3x3(x3) kernels (section 2) on a whole clip, `group` frames to a group after the first: 2-D outputs, then 3-D ones.

    A frame's 3-D output reads the previous frame (frame 0 reads itself instead), itself, and the next frame of its group.
    """
    flat, taps = convs.conv_2d, convs.conv_3d
    weight = torch.cat([flat.weight, *taps.weight.unbind(2)])
    zeros = taps.weight.new_zeros(taps.out_channels)
    bias = torch.cat([_bias(flat), zeros, _bias(taps), zeros])
    y = _per_frame(x_BTCHW, weight, bias, padding=1)
    key, to_next, present, to_previous = y.split([flat.out_channels, *[taps.out_channels] * 3], dim=2)
    # whether frame 1, 2, ... is the first of its group
    begins = torch.arange(x_BTCHW.shape[1] - 1, device=x_BTCHW.device) % group == 0
    following = to_previous[:, 1:].masked_fill(begins[:, None, None, None], 0.0)
    motion = present + torch.cat([to_next[:, :1], to_next[:, :-1]], dim=1) + F.pad(following, (0, 0, 0, 0, 0, 0, 0, 1))
    return torch.cat([key, motion], dim=2)


def point_pair(x_BTCHW: torch.Tensor, convs: ConvPair) -> torch.Tensor:
    """`P3` with 1x1(x1) kernels (section 2): a product at every position."""
    weight = torch.cat([convs.conv_2d.weight, convs.conv_3d.weight.squeeze(2)])
    return _per_frame(x_BTCHW, weight, torch.cat([_bias(convs.conv_2d), _bias(convs.conv_3d)]))


def activated(x_BTCHW: torch.Tensor, gain: nn.Module) -> torch.Tensor:
    """Norm and SiLU, recomputed in the backward pass: little work, much memory."""
    return recomputed(True, lambda x: F.silu(norm(x, gain)), x_BTCHW)


def norm(x_BTCHW: torch.Tensor, gain: nn.Module) -> torch.Tensor:
    """`Nrm` (section 2) in at least float32: each half's channels at a position scaled to length sqrt(c), times gamma."""
    halves = at_least_float32(x_BTCHW).unflatten(2, (2, -1))
    unit = F.normalize(halves, dim=3) * halves.shape[3] ** 0.5
    return unit.flatten(2, 3) * cast("NormGain", gain).gamma.flatten()[:, None, None]


def residual_3d(x_BTCHW: torch.Tensor, block: Residual3d, group: int) -> torch.Tensor:
    """`R3` (section 2)."""
    layers: Any = block.residual
    h = pair(activated(x_BTCHW, layers[0]), layers[2], group)
    h = pair(activated(h, layers[3]), layers[6], group)
    shortcut = getattr(block, "shortcut", None)
    return at_least_float32(x_BTCHW if shortcut is None else point_pair(x_BTCHW, shortcut)) + h


def residual_2d(x_BTCHW: torch.Tensor, block: Residual2d) -> torch.Tensor:
    """`R2` (section 2)."""
    layers: Any = block.residual
    h = frame_conv(activated(x_BTCHW, layers[0]), layers[2].conv)
    h = frame_conv(activated(h, layers[3]), layers[6].conv)
    return at_least_float32(x_BTCHW) + h


def attention(x_BTCHW: torch.Tensor, block: Attention) -> torch.Tensor:
    """`At` (section 2): each branch attends to itself within every frame, one head."""
    halves = zip(at_least_float32(x_BTCHW).chunk(2, dim=2), (block.Attention_2d, block.Attention_3d), strict=True)
    return torch.cat([half + _attended(half, branch) for half, branch in halves], dim=2)


def _attended(x_BTCHW: torch.Tensor, branch: BranchAttention) -> torch.Tensor:
    normed = F.normalize(x_BTCHW, dim=2) * x_BTCHW.shape[2] ** 0.5 * branch.norm.gamma
    qkv = frame_conv(normed, branch.to_qkv).flatten(0, 1).flatten(2).transpose(1, 2)
    q, k, v = qkv[:, None].chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
    return frame_conv(mixed.reshape(x_BTCHW.shape), branch.proj)


def downsample(x_BTCHW: torch.Tensor, block: Resample) -> torch.Tensor:
    """`Down2d` or `Down3d` (section 2): zeros at the right and bottom edge, stride 2; then pairs of frames after the first become one.

    The 2-D branch keeps every second frame, so the others are not computed.
    """
    key, motion = x_BTCHW.chunk(2, dim=2)
    if _over_time(block):
        key = torch.cat([key[:, :1], key[:, 1::2]], dim=1)
    key, motion = _halved(key, block.resample_2d[1]), _halved(motion, block.resample_3d[1])
    if _over_time(block):
        conv: Any = block.time_conv
        first, rest = motion[:, :1], motion[:, 1:]
        if rest.shape[1]:
            pairs = rest.unflatten(1, (-1, 2)).flatten(2, 3)  # channels of the first frame, then of the second
            joined = _per_frame(pairs, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias)
            motion = torch.cat([first, joined], dim=1)
        else:
            motion = with_zero_gradient(first, conv)
    return torch.cat([key, motion], dim=2)


def upsample(x_BTCHW: torch.Tensor, block: Resample) -> torch.Tensor:
    """`Up2d` or `Up3d` (section 2): frames after the first become two each; then every pixel becomes four, and a convolution."""
    key, motion = x_BTCHW.chunk(2, dim=2)
    if _over_time(block):
        conv: Any = block.time_conv
        if x_BTCHW.shape[1] > 1:
            key = torch.cat([key[:, :1], key[:, 1:].repeat_interleave(2, dim=1)], dim=1)
            both = _per_frame(motion[:, 1:], conv.weight.squeeze(2), conv.bias).unflatten(2, (2, -1))
            motion = torch.cat([motion[:, :1], both.flatten(1, 2)], dim=1)
        else:
            motion = with_zero_gradient(motion, conv)
    return torch.cat([_doubled(key, block.resample_2d[1]), _doubled(motion, block.resample_3d[1])], dim=2)


def pyramid(x_BTCHW: torch.Tensor, head: PyramidHead) -> torch.Tensor:
    """`PAC` (section 3): six convolutions of one input, first halves of all outputs before second halves, a 1x1 convolution over them."""
    convs = [head.PAC_0.conv, *(cast("FrameConv2d", getattr(head, f"PAC_{rate}")).conv for rate in DILATIONS)]
    outputs = [
        _per_frame(x_BTCHW, conv.weight, conv.bias, padding=rate, dilation=max(rate, 1)).unflatten(2, (2, -1))
        for conv, rate in zip(convs, (0, *DILATIONS), strict=True)
    ]
    return frame_conv(torch.stack(outputs, dim=3).flatten(2, 4), head.PAC_conv.conv)


def _per_frame(x_BTCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **geometry: int) -> torch.Tensor:
    return F.conv2d(x_BTCHW.flatten(0, 1), weight, bias, **geometry).unflatten(0, x_BTCHW.shape[:2])


def _halved(x_BTCHW: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    layer = cast("nn.Conv2d", conv)
    return _per_frame(F.pad(x_BTCHW, (0, 1, 0, 1)), layer.weight, layer.bias, stride=2)


def _doubled(x_BTCHW: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    larger = F.interpolate(x_BTCHW.flatten(0, 1), scale_factor=2.0).unflatten(0, x_BTCHW.shape[:2])
    return frame_conv(larger, cast("nn.Conv2d", conv))


def _select_branch(both_BTCHW: torch.Tensor) -> torch.Tensor:
    """Six outputs -> three (section 4): the 2-D branch's for frame 0 and every group's first frame, the 3-D branch's for the others."""
    flat, deep = both_BTCHW.chunk(2, dim=2)
    frames = torch.arange(flat.shape[1], device=flat.device)
    key = (frames == 0) | (frames % GROUP == 1)
    return torch.where(key[:, None, None, None], flat, deep)


def _frames_first(x_BCTHW: torch.Tensor, convs: ConvPair) -> torch.Tensor:
    return x_BCTHW.transpose(1, 2).to(convs.conv_2d.weight.dtype)


def _bias(conv: nn.Module) -> torch.Tensor:
    return cast("torch.Tensor", conv.bias)


def _over_time(block: Resample) -> bool:
    return hasattr(block, "time_conv")
