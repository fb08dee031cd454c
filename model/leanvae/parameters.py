"""LeanVAE's parameters under their published names, and random ones for trials. No forward pass here."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping


class Stack(nn.Module):
    """Parameters of a stack of NAF layers."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        hidden = int(8 / 3 * channels)
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


class Coder(nn.Module):
    """Parameters of the encoder or the decoder: patch projections and the three stacks."""

    def __init__(self, config: Mapping[str, Any], *, decoder: bool) -> None:
        super().__init__()
        low, high = config["l_dim"], config["h_dim"]
        frames, rows, columns = config["patch_size"]
        image = 3 * rows * columns  # coefficients of one band in a patch of frame 0
        video = frames * image
        for name, width, coefficients in (
            ("video_low_proj", low, video),
            ("video_high_proj", high, 7 * video),
            ("image_low_proj", low, image),
            ("image_high_proj", high, 3 * image),
        ):
            # the published modules have a rearrangement without parameters before the encoder's projections and after the decoder's
            parts = (nn.Linear(width, coefficients),) if decoder else (nn.Identity(), nn.Linear(coefficients, width))
            self.add_module(name, nn.Sequential(*parts))
        self.low_layer = Stack(low, config["sep_num_layer"])
        self.high_layer = Stack(high, config["sep_num_layer"])
        self.fusion_layer = Stack(low + high, config["fusion_num_layer"])


class Bottleneck(nn.Module):
    """Parameters of the sensing matrix and the unrolled iterations."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, latent, steps = config["embedding_dim"], config["latent_dim"], config["ista_iter_num"]
        self.phi = nn.Parameter(torch.empty(latent, width))
        self.Q = nn.Parameter(torch.empty(width, latent))
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(())) for _ in range(steps))
        self.threshold = nn.ParameterList(nn.Parameter(torch.empty(1)) for _ in range(steps))
        self.forward_l = nn.ModuleList(Stack(width, config["ista_layer_num"]) for _ in range(steps))
        self.backward_l = nn.ModuleList(Stack(width, config["ista_layer_num"]) for _ in range(steps))


class Network(nn.Module):
    """All parameters; `state_dict()` has exactly the published keys."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.latent_bottleneck = Bottleneck(config)
        self.encoder = Coder(config, decoder=False)
        self.decoder = Coder(config, decoder=True)
        self.std_layer = nn.Linear(config["embedding_dim"], config["latent_dim"])


def empty_network(config: Mapping[str, Any]) -> Network:
    """Network on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Network(config)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Reproducible random float32 weights by published key; each tensor depends only on the seed and its key.

    Scaled so that activations stay of order one. Their latents mean nothing.
    """
    return {
        key: _random_tensor(key, tuple(meta.shape), seed) for key, meta in empty_network(config).state_dict().items()
    }


def _random_tensor(key: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    draw = np.random.Generator(np.random.PCG64([seed, zlib.crc32(key.encode())]))
    noise = torch.from_numpy(draw.standard_normal(shape, dtype=np.float32).reshape(shape).copy())
    if key.endswith("bottleneck.Q"):
        return noise * shape[0] ** -0.5
    if ".weights." in key:
        return torch.full(shape, 0.5)
    if ".threshold." in key:
        return torch.full(shape, 0.05)
    if key.endswith("bias"):
        return 0.02 * noise
    if len(shape) == 1:  # LayerNorm
        return 1 + 0.02 * noise
    fan_in = int(np.prod(shape[1:]))
    if "ds_conv" in key:
        noise = 0.3 * noise
    elif key.startswith("decoder.") and "_proj." in key:
        noise = 0.25 * noise  # keeps most of a decoded video within the value range
    return noise * fan_in**-0.5
