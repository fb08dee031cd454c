"""Tiny configurations of every diffusers class."""

from __future__ import annotations

import functools
from typing import Any

import torch

import model

_NEUTRAL = {"latents_mean": [0.0, 0.5, -0.5, 0.25], "latents_std": [1.0, 2.0, 0.5, 1.5]}
_NARROW = {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
_WAN = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **_NEUTRAL}
_WAN_22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "decoder_base_dim": 16}

TINY: dict[str, dict[str, Any]] = {
    "wan-2.1": {"_class_name": "AutoencoderKLWan", **_WAN},
    "wan-2.2": {"_class_name": "AutoencoderKLWan", **_WAN, **_WAN_22, "scale_factor_spatial": 16},
    "qwen-image": {"_class_name": "AutoencoderKLQwenImage", **_WAN},
    "ltx-2": {
        "_class_name": "AutoencoderKLLTX2Video",
        "latent_channels": 8,
        "block_out_channels": [16, 16, 16, 16],
        "decoder_block_out_channels": [8, 16, 32],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1],
        "decoder_causal": False,
    },
    "easyanimate": {
        "_class_name": "AutoencoderKLMagvit",
        **_NARROW,
        "down_block_types": ["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
        "up_block_types": ["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3,
    },
    "vidtok": {"_class_name": "AutoencoderVidTok", "ch": 8, "ch_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    "hunyuan-video-1.5": {
        "_class_name": "AutoencoderKLHunyuanVideo15",
        "latent_channels": 4,
        "block_out_channels": [8, 8, 8, 8, 8],
        "layers_per_block": 1,
    },
    "hunyuan-video": {"_class_name": "AutoencoderKLHunyuanVideo", **_NARROW},
    "cogvideox": {"_class_name": "AutoencoderKLCogVideoX", **_NARROW},
    "cosmos": {
        "_class_name": "AutoencoderKLCosmos",
        "latent_channels": 4,
        "encoder_block_out_channels": [8, 8, 16, 16],
        "decode_block_out_channels": [8, 16, 16, 16],
        "attention_resolutions": [8],
        "resolution": 64,
        "num_layers": 1,
        **_NEUTRAL,
    },
    "ltx-video": {
        "_class_name": "AutoencoderKLLTXVideo",
        "latent_channels": 8,
        "block_out_channels": [8, 8, 8, 8],
        "decoder_block_out_channels": [8, 8, 8, 8],
        "layers_per_block": [1, 1, 1, 1, 1],
        "decoder_layers_per_block": [1, 1, 1, 1, 1],
    },
    "allegro": {"_class_name": "AutoencoderKLAllegro", **_NARROW, "sample_size": 32},
    "mochi": {
        "_class_name": "AutoencoderKLMochi",
        "latent_channels": 4,
        "encoder_block_out_channels": [32, 32, 32, 32],
        "decoder_block_out_channels": [32, 32, 32, 32],
        "layers_per_block": [1, 1, 1, 1, 1],
        **_NEUTRAL,
    },
    "svd": {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": [32, 32],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
    },
    "sd": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "shift_factor": 0.1,
    },
    "flux-2": {
        "_class_name": "AutoencoderKLFlux2",
        "latent_channels": 4,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "dc-ae": {
        "_class_name": "AutoencoderDC",
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
        "encoder_block_out_channels": [8, 16],
        "decoder_block_out_channels": [8, 16],
        "encoder_layers_per_block": [1, 1],
        "decoder_layers_per_block": [1, 1],
        "encoder_qkv_multiscales": [[], [5]],
        "decoder_qkv_multiscales": [[], [5]],
        "scaling_factor": 0.41407,
    },
    "taesd": {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": [8, 8],
        "decoder_block_out_channels": [8, 8],
        "num_encoder_blocks": [1, 1],
        "num_decoder_blocks": [1, 1],
    },
}
IMAGES = ("sd", "flux-2", "dc-ae", "taesd")
BOTH_WAYS = ("wan-2.1", "wan-2.2", "qwen-image", "easyanimate", *IMAGES)  # decode in chunks, too
CHUNKED = (*BOTH_WAYS, "ltx-2", "vidtok", "svd")
WHOLE = tuple(name for name in TINY if name not in CHUNKED)


@functools.cache
def tiny(name: str, **options: Any) -> Any:
    """Tiny network of that name with random weights, loaded once."""
    return model.load("diffusers", config=TINY[name], untrained=0, **options)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Uniform noise in [-1, 1]."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def clip(spec: Any, batch: int = 1, groups: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise of `groups` groups after the lead frame, two latent pixels wide (four for cheap networks)."""
    side = 2 * spec.space_stride if spec.space_stride > 8 else 4 * spec.space_stride
    return noise(batch, 3, spec.lead_frames + groups * spec.time_stride, side, side, seed=seed)
