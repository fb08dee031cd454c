"""PatchGAN discriminators: frames `N 3 H W` or clips `B 3 T H W` -> logits, one per patch.

Sources: pix2pix (Isola et al. 2017, section 3.2.2 and appendix 6.1.2) for single frames, as LeanVAE uses it (spec section 13); the
same with 3-D kernels of three for WF-VAE (section 3.4, spec section 14).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

LEAK = 0.2
WIDEST = 8  # largest width, relative to the first layer's


class PatchDiscriminator2d(nn.Module):
    """PatchGAN of single frames: 4x4 kernels, `layers` downsamplings, batch norm; with three layers a logit sees 70x70 pixels."""

    takes = "frames"

    def __init__(self, channels: int = 64, layers: int = 3, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        strides = [2] * layers + [1]
        self.layers = _patch_gan(nn.Conv2d, nn.BatchNorm2d, 4, strides, channels, dropout)
        initialise(self, seed)

    def forward(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Frames `N 3 H W` -> logits `N 1 h w`. Raises ValueError for anything else."""
        if frames_NCHW.ndim != 4:
            raise ValueError(f"expected frames (N, 3, H, W), got {tuple(frames_NCHW.shape)}")
        return self.layers(frames_NCHW)


class PatchDiscriminator3d(nn.Module):
    """PatchGAN of clips: 3x3x3 kernels, time halved by the first two layers, space by `layers` of them; batch norm."""

    takes = "clips"

    def __init__(self, channels: int = 64, layers: int = 3, *, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        strides = [(2 if index < 2 else 1, 2, 2) for index in range(layers)] + [(1, 1, 1)]
        self.layers = _patch_gan(nn.Conv3d, nn.BatchNorm3d, 3, strides, channels, dropout)
        initialise(self, seed)

    def forward(self, clips_BCTHW: torch.Tensor) -> torch.Tensor:
        """Clips `B 3 T H W` -> logits `B 1 t h w`. Raises ValueError for anything else."""
        if clips_BCTHW.ndim != 5:
            raise ValueError(f"expected clips (B, 3, T, H, W), got {tuple(clips_BCTHW.shape)}")
        return self.layers(clips_BCTHW)


DISCRIMINATORS: dict[str, type[PatchDiscriminator2d] | type[PatchDiscriminator3d]] = {
    "patch2d": PatchDiscriminator2d,
    "patch3d": PatchDiscriminator3d,
}


def _patch_gan(
    convolution: Callable[..., nn.Module],
    norm: Callable[[int], nn.Module],
    size: int,
    strides: list,
    channels: int,
    dropout: float,
) -> nn.Sequential:
    """Convolutions with leaky ReLU, norms on all but the first, and one output channel of logits.

    Convolutions before a norm have no bias, because the norm would cancel it. `dropout` follows every layer with a norm (WF-VAE's code).
    It draws from torch's global generator: the caller seeds it, so that a resumed run draws the same.
    """
    modules: list[nn.Module] = [convolution(3, channels, size, stride=strides[0], padding=1), nn.LeakyReLU(LEAK)]
    width = channels
    for index, stride in enumerate(strides[1:], 1):
        wider = channels * min(2**index, WIDEST)
        modules += [
            convolution(width, wider, size, stride=stride, padding=1, bias=False),
            norm(wider),
            nn.LeakyReLU(LEAK),
        ]
        if dropout:
            modules.append(nn.Dropout(dropout))
        width = wider
    return nn.Sequential(*modules, convolution(width, 1, size, stride=1, padding=1))


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Normal convolutions (deviation 0.02), norm gains normal around 1 with the same deviation, zero biases (pix2pix, appendix 6.2)."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.normal_(0.0, 0.02, generator=generator)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.weight.normal_(1.0, 0.02, generator=generator)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.zero_()  # type: ignore[operator]
