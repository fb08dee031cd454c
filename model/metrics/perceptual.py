"""Perceptual distances of images: LPIPS, whose weights must be given, and a Laplacian pyramid, which needs none and is not LPIPS.

Both take images `N 3 H W`, in [-1, 1] (LPIPS) or of any scaling (pyramid), and return one distance per image.

LPIPS (Zhang et al. 2018, section 3, "lin" version 0.1): features of VGG16 after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, or of
AlexNet after its five ReLUs, normalised along channels; squared differences weighted per channel, averaged over the image, summed over the
five. Recipes train with LPIPS-VGG. Published evaluations use LPIPS-Alex, with the five maps scaled to the image's size before the mean.
No weights ship with this package.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.weights import check_finite, check_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# Output channels of each convolution, with a halving "pool" between, as torchvision numbers `features`; features are taken before
# every pool.
VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
ALEXNET = (
    (64, 11, 4, 2),
    "pool",
    (192, 5, 1, 2),
    "pool",
    (384, 3, 1, 1),
    (256, 3, 1, 1),
    (256, 3, 1, 1),
)  # kernel, stride, padding


class Backbone(NamedTuple):
    """Network whose features LPIPS compares."""

    label: str
    taps: tuple[int, ...]  # layers of `features` whose outputs are compared
    channels: tuple[int, ...]  # of the taps
    smallest: int  # minimum side in pixels: the last pool must leave at least one
    upsampled: bool  # maps are scaled to the image's size before their mean, as published evaluations do

    def layers(self) -> nn.Sequential:
        """Convolutions, ReLUs and pools, numbered as torchvision's `features`."""
        layers: list[nn.Module] = []
        channels, alex = 3, self.label == "LPIPS-Alex"
        for entry in ALEXNET if alex else VGG16:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(3, 2) if alex else nn.MaxPool2d(2))
                continue
            width, kernel, stride, padding = (entry, 3, 1, 1) if isinstance(entry, int) else entry
            layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU()]
            channels = width
        return nn.Sequential(*layers)


BACKBONES = {
    "vgg": Backbone("LPIPS-VGG", (3, 8, 15, 22, 29), (64, 128, 256, 512, 512), 16, upsampled=False),
    "alex": Backbone("LPIPS-Alex", (1, 4, 7, 9, 11), (64, 192, 384, 256, 256), 31, upsampled=True),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's statistics for values in [-1, 1]
NORM_EPSILON = 1e-10
# Other contents of the packages' full files: the classifier, and copies of the heads and of the input scaling.
IGNORED = ("classifier.", "lins.", "scaling_layer.")
SLICED = re.compile(r"net\.slice\d\.(\d+\.(?:weight|bias))")  # the lpips package's name of `features.*`, same numbers


class LPIPS(nn.Module):
    """LPIPS. Its parameters are not trained; distances have gradients for both images."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, backbone: str = "vgg") -> None:
        """`backbone`: one of `BACKBONES`."""
        super().__init__()
        self.backbone = BACKBONES[backbone]
        self.features = self.backbone.layers()
        self.heads = nn.ParameterList(nn.Parameter(torch.ones(1, width, 1, 1)) for width in self.backbone.channels)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, original_NCHW: torch.Tensor, other_NCHW: torch.Tensor) -> torch.Tensor:
        """Two sets of images `N 3 H W` in [-1, 1] -> distances `(N,)`.

        Raises:
            ValueError: shapes that differ, not three colours, or sides below 16 pixels (AlexNet: 31).
        """
        _check_pictures(original_NCHW, other_NCHW, self.backbone.smallest)
        N = original_NCHW.shape[0]
        x = (torch.cat([original_NCHW, other_NCHW]) - self.shift) / self.scale
        distance = x.new_zeros(N)
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.backbone.taps:
                # vector_norm, not the root of a sum, whose gradient is NaN where every channel is zero
                normed = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + NORM_EPSILON)
                squares = (normed[:N] - normed[N:]).square()
                weighted = (squares * self.heads[self.backbone.taps.index(index)]).sum(1, keepdim=True)
                if self.backbone.upsampled:
                    weighted = F.interpolate(weighted, original_NCHW.shape[2:], mode="bilinear", align_corners=False)
                distance = distance + weighted.mean((1, 2, 3))
        return distance


def load_lpips(features: str, heads: str | None = None, *, backbones: Collection[str] = ("vgg",)) -> LPIPS:
    """Loads LPIPS from files (paths, `hf://...`, or any scheme `model.checkpoint.read` takes).

    Args:
        features: VGG16 or AlexNet in torchvision's names (`features.0.weight`, ...; the classifier is not read), or in the lpips
            package's (`net.slice1.0.weight`, ...).
        heads: the five linear layers in that package's names (`lin0.model.1.weight`, ...); None: they are in the first file.
        backbones: which of `BACKBONES` are accepted; the file decides between them.

    Raises:
        OSError: as `model.checkpoint.read`.
        ValueError: a damaged file, keys or shapes of another network, non-finite values.
    """
    from model import checkpoint

    weights = dict(checkpoint.read(features, want_config=False).weights)
    if heads is not None:
        weights |= checkpoint.read(heads, want_config=False).weights
    return lpips_from_state_dict(weights, backbones=backbones)


def lpips_from_state_dict(weights: Mapping[str, torch.Tensor], *, backbones: Collection[str] = ("vgg",)) -> LPIPS:
    """LPIPS from tensors under `features.*` (torchvision) and `lin0..4.model.1.weight` (lpips package). `backbones`: as `load_lpips`.

    Raises:
        ValueError: keys or shapes of another network, non-finite values.
    """
    loaded = {SLICED.sub(r"features.\1", key): value for key, value in weights.items() if not key.startswith(IGNORED)}
    alex = "alex" in backbones and "features.3.weight" in loaded  # VGG16 has a ReLU there
    network = LPIPS("alex" if alex else "vgg")
    wanted = {_published(key): value for key, value in network.state_dict().items()}
    check_keys(network.backbone.label, wanted, loaded)
    check_finite(network.backbone.label, loaded)
    network.load_state_dict({key: loaded[_published(key)].float() for key in network.state_dict()})
    return network.eval()


def _published(key: str) -> str:
    return f"lin{key.removeprefix('heads.')}.model.1.weight" if key.startswith("heads.") else key


def pyramid_distance(original_NCHW: torch.Tensor, other_NCHW: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """Laplacian pyramid L1: difference of details at every scale. Needs no weights; it is *not* LPIPS and does not model perception.

    Lap1 of Bojanowski et al. 2018 (section 3.1), whose weights 2^(2j) give every level's mean the same weight. A band is an image
    minus its 2x2 means; the next level uses those means; the last means are compared whole.

    Takes two sets of images `N 3 H W` of one scaling, with sides divisible by 2^levels; returns `(N,)`: the mean absolute
    difference of each of the `levels` bands, summed over bands and the last means.

    Raises:
        ValueError: shapes that differ or are not divisible.
    """
    if levels < 1:
        raise ValueError(f"a pyramid needs at least one level, got {levels}")
    _check_pictures(original_NCHW, other_NCHW, 2**levels)
    if original_NCHW.shape[2] % 2**levels or original_NCHW.shape[3] % 2**levels:
        raise ValueError(
            f"a pyramid of {levels} levels takes sides that are multiples of {2**levels}, got {tuple(original_NCHW.shape[2:])}"
        )
    rest = original_NCHW - other_NCHW  # every step is linear
    distance = rest.new_zeros(rest.shape[0])
    for _ in range(levels):
        means = F.avg_pool2d(rest, 2)
        distance = distance + (rest - F.interpolate(means, scale_factor=2)).abs().mean((1, 2, 3))
        rest = means
    return distance + rest.abs().mean((1, 2, 3))


def _check_pictures(original: torch.Tensor, other: torch.Tensor, smallest: int) -> None:
    if original.shape != other.shape or original.ndim != 4 or original.shape[1] != 3:
        raise ValueError(
            f"expected two sets of images (N, 3, H, W) of the same shape, got {tuple(original.shape)}, {tuple(other.shape)}"
        )
    if min(original.shape[2:]) < smallest:
        raise ValueError(f"images must have sides of at least {smallest}, got {tuple(original.shape[2:])}")
