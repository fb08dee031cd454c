"""Inflation for IV-VAE: weights of an image VAE -> weights of a video VAE that treats every frame as the image VAE did.

Source: supplement 2.2, equations 3 and 4; spec sections 2, 7 and 10.

The image VAE is the same network without time (`image_keys` lists its keys): features of twice the width, one convolution `conv` where the
video VAE has a pair, no `time_conv`. The pair splits its outputs: the first half becomes the 2-D branch, the second the 3-D branch with its
kernel in the present frame. Both branches get the whole last convolution, because either may produce a frame.

No such image VAE is published. To get one, train an IV-VAE on images: what it does to one frame is an image VAE (`image_part`),
and `inflate` accepts its weights directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from model.ivvae.network import Network
from model.registry import complete, spec
from model.weights import check_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

FLAT, DEEP = ".conv_2d.", ".conv_3d."
LAST = "decoder.head.2"  # convolution to pixels, whole in both branches
# Frame that a temporal halving keeps: the first of two, which is the group's key frame after two halvings.
KEY_FRAME = 0


def inflate_centre(kernel_OIhw: torch.Tensor, frames: int = 3) -> torch.Tensor:
    """Centre initialisation: 2-D kernel `(O, I, kh, kw)` -> `(O, I, frames, kh, kw)` with the kernel in the middle and zeros around it.

    Raises:
        ValueError: a kernel of another rank, or an even number of frames.
    """
    if kernel_OIhw.ndim != 4 or frames < 1 or frames % 2 == 0:
        raise ValueError(
            f"expected a kernel (O, I, kh, kw) and an odd number of frames, got {tuple(kernel_OIhw.shape)} and {frames}"
        )
    inflated = kernel_OIhw.new_zeros((*kernel_OIhw.shape[:2], frames, *kernel_OIhw.shape[2:]))
    inflated[:, :, frames // 2] = kernel_OIhw
    return inflated


def halving_kernel(channels: int, size: tuple[int, int, int] = (2, 1, 1), frame: int = KEY_FRAME) -> torch.Tensor:
    """Equation 3: kernel `(c, c, *size)` that copies frame `frame` (-1: the last, for causal kernels) and drops the others."""
    return _identity(channels, size, frame)


def doubling_kernel(channels: int, size: tuple[int, int, int] = (1, 1, 1), frame: int = 0) -> torch.Tensor:
    """Equation 4: kernel `(2c, c, *size)` whose two halves, stacked as two frames, both repeat frame `frame`."""
    return torch.cat([_identity(channels, size, frame)] * 2)


def image_keys(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The image VAE's parameters by key, on the meta device: names and shapes without memory."""
    expected: dict[str, torch.Tensor] = {}
    for key, meta in _video_keys(config).items():
        if FLAT in key:
            outputs = meta.shape[0] if key.startswith(LAST) else 2 * meta.shape[0]
            expected[key.replace(FLAT, ".conv.")] = meta.new_empty((outputs, *meta.shape[1:]))
        elif DEEP not in key and ".time_conv." not in key:
            expected[key] = meta
    return expected


def inflate(config: Mapping[str, Any], image_weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of an image VAE -> weights of the IV-VAE of `config`, by published key.

    `image_weights` have the keys of `image_keys(config)`, or are an IV-VAE's own, whose image part is taken. The video VAE encodes
    a frame as the image VAE does; a static video has the same latent in every row; a video decodes to the frames the image VAE
    decodes from its latents, each repeated over its group.

    Raises:
        ValueError: other weights; lists what is missing, extra or misshapen.
    """
    if any(DEEP in key for key in image_weights):
        image_weights = image_part(config, image_weights)
    check_keys("the image VAE to inflate", image_keys(config), image_weights)
    weights: dict[str, torch.Tensor] = {}
    for key, meta in _video_keys(config).items():
        if FLAT in key:
            weights[key] = _half(image_weights[key.replace(FLAT, ".conv.")], key, 0)
        elif DEEP in key:
            flat = _half(image_weights[key.replace(DEEP, ".conv.")], key, 1)
            weights[key] = flat if flat.ndim == 1 else inflate_centre(flat, meta.shape[2])
        elif ".time_conv." in key:
            weights[key] = _time(key, tuple(meta.shape))
        else:
            weights[key] = image_weights[key].clone()
    return weights


def image_part(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Image VAE contained in an IV-VAE (its effect on a clip of one frame): published weights -> those of `image_keys(config)`.

    A 3-D kernel that sees one frame twice and no following frame (spec section 2) is the sum of its first two taps.

    Raises:
        ValueError: weights of another network than the IV-VAE of `config`; lists what is missing, extra or misshapen.
    """
    check_keys("the IV-VAE to take the image part of", _video_keys(config), weights)
    image: dict[str, torch.Tensor] = {}
    for key in image_keys(config):
        if key in weights:
            image[key] = weights[key].clone()
            continue
        flat, deep = (weights[key.replace(".conv.", branch)] for branch in (FLAT, DEEP))
        if key.startswith(LAST):
            image[key] = flat.clone()  # the 2-D branch produces images
        else:
            image[key] = torch.cat([flat, deep[:, :, :2].sum(2) if deep.ndim == 5 else deep])
    return image


def _video_keys(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The video VAE's parameters by key, on the meta device. Raises ValueError for an impossible configuration."""
    full = complete("ivvae", config)
    spec("ivvae", full)
    return Network.empty(full).state_dict()


def _half(tensor: torch.Tensor, key: str, half: int) -> torch.Tensor:
    """Rows of one branch."""
    return tensor.clone() if key.startswith(LAST) else tensor.chunk(2)[half].clone()


def _time(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Kernel or bias that halves or doubles time."""
    if len(shape) == 1:
        return torch.zeros(shape)
    outputs, channels, *size = shape
    kernel = halving_kernel if outputs == channels else doubling_kernel
    return kernel(channels, (size[0], size[1], size[2]))


def _identity(channels: int, size: tuple[int, int, int], frame: int) -> torch.Tensor:
    frames, height, width = size
    if not -frames <= frame < frames:
        raise ValueError(f"a kernel over {frames} frames has no frame {frame}")
    kernel = torch.zeros((channels, channels, *size))
    kernel[:, :, frame, (height - 1) // 2, (width - 1) // 2] = torch.eye(channels)
    return kernel
