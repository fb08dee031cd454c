"""I3D, the network whose logits FVD compares: Inception-v1 inflated to three dimensions (Carreira and Zisserman 2017, figure 3).

Takes weights under the names of the published PyTorch port (`i3d_pretrained_400.pt`: `Conv3d_1a_7x7.conv3d.weight`,
`Mixed_3b.b1a.bn.running_mean`, `logits.conv3d.bias`, ...) and videos `N 3 T 224 224` in [-1, 1]; returns 400 Kinetics logits per video.

Convolutions and pools pad as TensorFlow's "same": as little as possible, an odd pixel at the end. No weights ship with this package.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.weights import check_finite, check_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

FEATURES = 400  # classes of Kinetics-400
SIDE = 224
FEWEST_FRAMES = 9  # the last pool has two steps
# Widths of the branches: 1x1x1; 1x1x1 then 3x3x3; 1x1x1 then 3x3x3; pool then 1x1x1.
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}
POOL_BEFORE = {  # kernel and stride
    "Conv3d_2b_1x1": ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}
NORM_EPSILON = 1e-3  # of the network the weights were trained in

Triple = tuple[int, int, int]


class Protocol(NamedTuple):
    """How published code turns a clip into features; each gives other numbers."""

    whole_frames: bool  # resize frames whole, or scale the short side and crop the centre
    window_frames: int | None  # frames of a video; None: the whole clip
    norm_epsilon: float


PROTOCOLS = {
    # Unterthiner et al. 2018, TensorFlow code: 16 frames, resized whole
    "tf": Protocol(whole_frames=True, window_frames=16, norm_epsilon=NORM_EPSILON),
    # StyleGAN-V's code, the default of LeanVAE's and WF-VAE's scripts
    "styleganv": Protocol(whole_frames=False, window_frames=None, norm_epsilon=NORM_EPSILON),
    # VideoGPT's code, the other choice of these scripts; its port of I3D has another epsilon than the weights
    "videogpt": Protocol(whole_frames=False, window_frames=None, norm_epsilon=1e-5),
}


def pad_same(x_NCTHW: torch.Tensor, kernel: Triple, stride: Triple) -> torch.Tensor:
    """Pads T, H and W with zeros so that windows start at every `stride`-th position."""
    padding: list[int] = []
    for size, k, s in zip(x_NCTHW.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last axis
    return F.pad(x_NCTHW, padding)


def pool_same(x_NCTHW: torch.Tensor, kernel: Triple, stride: Triple) -> torch.Tensor:
    """Max pooling; padding counts as zero, which never exceeds a value after a ReLU."""
    return F.max_pool3d(pad_same(x_NCTHW, kernel, stride), kernel, stride)


class ConvUnit(nn.Module):
    """Convolution, batch norm, ReLU; the last layer (`last`) has a bias instead of norm and ReLU."""

    def __init__(self, width: int, out: int, side: int, stride: int = 1, *, last: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (side,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(width, out, side, stride, bias=last)
        self.bn = None if last else nn.BatchNorm3d(out, eps=NORM_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`N C T H W` -> `N C' T' H' W'`, with T, H and W divided by the stride (rounded up)."""
        x = self.conv3d(pad_same(x, self.kernel, self.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class InceptionBlock(nn.Module):
    """Inception block: four parallel branches."""

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = ConvUnit(width, widths[0], 1)
        self.b1a, self.b1b = ConvUnit(width, widths[1], 1), ConvUnit(widths[1], widths[2], 3)
        self.b2a, self.b2b = ConvUnit(width, widths[3], 1), ConvUnit(widths[3], widths[4], 3)
        self.b3b = ConvUnit(width, widths[5], 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`N C T H W` -> `N C' T H W`."""
        pooled = pool_same(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Feature extractor; it is not trained, and dropout is left out."""

    def __init__(self, norm_epsilon: float = NORM_EPSILON) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = ConvUnit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = ConvUnit(64, 64, 1)
        self.Conv3d_2c_3x3 = ConvUnit(64, 192, 3)
        for name, (width, widths) in MIXED.items():
            self.add_module(name, InceptionBlock(width, widths))
        self.logits = ConvUnit(1024, FEATURES, 1, last=True)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eps = norm_epsilon
        self.requires_grad_(False)

    def forward(self, video_NCTHW: torch.Tensor) -> torch.Tensor:
        """`N 3 T 224 224` in [-1, 1], T >= 9 -> logits `(N, 400)`, averaged over time."""
        x = video_NCTHW
        for name, part in self.named_children():
            if name == "logits":
                x = F.avg_pool3d(x, (2, SIDE // 32, SIDE // 32), stride=1)
            elif name in POOL_BEFORE:
                x = pool_same(x, *POOL_BEFORE[name])
            x = part(x)
        return x.mean((2, 3, 4))


def to_i3d_input(video_NCTHW: torch.Tensor, *, whole_frames: bool = True) -> torch.Tensor:
    """uint8 `N 3 T H W` -> float in [-1, 1] at 224 x 224, bilinear: whole frames, or the centre after the short side became 224."""
    N, C, T, H, W = video_NCTHW.shape
    frames = video_NCTHW.transpose(1, 2).reshape(N * T, C, H, W).float()
    height = width = SIDE
    if not whole_frames:
        height, width = (math.ceil(side * SIDE / min(H, W)) if side > min(H, W) else SIDE for side in (H, W))
    frames = F.interpolate(frames, size=(height, width), mode="bilinear", align_corners=False)
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    frames = frames[:, :, top : top + SIDE, left : left + SIDE]
    return (frames / 127.5 - 1).reshape(N, T, C, SIDE, SIDE).transpose(1, 2)


def load_i3d(uri: str, norm_epsilon: float = NORM_EPSILON) -> I3D:
    """Loads I3D from safetensors or a `.pt` of tensors only (path, `hf://...`, or any scheme of checkpoints).

    Raises:
        OSError: as `model.checkpoint.read`.
        ValueError: a damaged file, a TorchScript archive (a program, which is not run), or keys or shapes of another network.
    """
    from model import checkpoint

    return i3d_from_state_dict(checkpoint.read(uri, want_config=False).weights, norm_epsilon)


def i3d_from_state_dict(weights: Mapping[str, torch.Tensor], norm_epsilon: float = NORM_EPSILON) -> I3D:
    """I3D from tensors under their published names. Raises ValueError for other keys or shapes, or non-finite values."""
    network = I3D(norm_epsilon)
    # batch counters do not affect features, and older files lack them
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    loaded = {key: value for key, value in weights.items() if not key.endswith("num_batches_tracked")}
    check_keys("I3D (Kinetics-400)", wanted, loaded)
    check_finite("I3D (Kinetics-400)", loaded)
    network.load_state_dict({key: value.float() for key, value in loaded.items()}, strict=False)
    return network.eval()
