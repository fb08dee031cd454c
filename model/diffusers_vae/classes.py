"""Tables about the VAE classes of diffusers: defaults, which take whole clips only and why, which are refused and why. Plain data.

`DEFAULTS` holds the defaults of the keys read in `facts` and `strides`; a test compares them with the library.
"""

from __future__ import annotations

from typing import Any

from model.diffusers_vae.presets import MOCHI_MEAN, MOCHI_STD
from model.wan_statistics import WAN21_MEAN, WAN21_STD

_EIGHTFOLD = [True, True, True, False]

# Class -> keys read, with the defaults of the class. Cosmos' own `latents_mean` is left out: see `facts._PER_FRAME`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "AutoencoderKLWan": {
        "in_channels": 3,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "patch_size": None,
        "latents_mean": list(WAN21_MEAN),
        "latents_std": list(WAN21_STD),
    },
    "AutoencoderKLQwenImage": {
        "input_channels": 3,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "temperal_downsample": [False, True, True],
        "latents_mean": list(WAN21_MEAN),
        "latents_std": list(WAN21_STD),
    },
    "AutoencoderKLLTX2Video": {
        "in_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "patch_size_t": 1,
        "spatio_temporal_scaling": [True] * 4,
        "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
        "encoder_causal": True,
        "scaling_factor": 1.0,
    },
    "AutoencoderKLMagvit": {
        "in_channels": 3,
        "latent_channels": 16,
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
        "scaling_factor": 0.7125,
    },
    "AutoencoderVidTok": {
        "in_channels": 3,
        "z_channels": 4,
        "double_z": True,
        "ch_mult": [1, 2, 4, 4],
        "spatial_ds": None,
        "tempo_ds": None,
        "regularizer": "kl",
        "is_causal": True,
    },
    "AutoencoderKLHunyuanVideo15": {
        "in_channels": 3,
        "latent_channels": 32,
        "temporal_compression_ratio": 4,
        "spatial_compression_ratio": 16,
        "scaling_factor": 1.03682,
    },
    "AutoencoderKLHunyuanVideo": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "spatial_compression_ratio": 8,
        "scaling_factor": 0.476986,
    },
    "AutoencoderKLCogVideoX": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "block_out_channels": [128, 256, 256, 512],
        "scaling_factor": 1.15258426,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
    "AutoencoderKLCosmos": {
        "in_channels": 3,
        "latent_channels": 16,
        "temporal_compression_ratio": 8,
        "spatial_compression_ratio": 8,
        "scaling_factor": 1.0,
    },
    "AutoencoderKLLTXVideo": {
        "in_channels": 3,
        "latent_channels": 128,
        "patch_size": 4,
        "patch_size_t": 1,
        "spatio_temporal_scaling": _EIGHTFOLD,
        "downsample_type": ["conv"] * 4,
        "encoder_causal": True,
        "scaling_factor": 1.0,
    },
    "AutoencoderKLAllegro": {
        "in_channels": 3,
        "latent_channels": 4,
        "temporal_downsample_blocks": [True, True, False, False],
        "block_out_channels": [128, 256, 512, 512],
        "scaling_factor": 0.13,
    },
    "AutoencoderKLMochi": {
        "in_channels": 15,
        "latent_channels": 12,
        "temporal_expansions": [1, 2, 3],
        "spatial_expansions": [2, 2, 2],
        "scaling_factor": 1.0,
        "latents_mean": MOCHI_MEAN,
        "latents_std": MOCHI_STD,
    },
    "AutoencoderKLTemporalDecoder": {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "scaling_factor": 0.18215,
    },
    "AutoencoderKLFlux2": {
        "in_channels": 3,
        "latent_channels": 32,
        "block_out_channels": [128, 256, 512, 512],
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": 32,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "scaling_factor": 1.0,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "latent_channels": 4,
        "encoder_block_out_channels": [64, 64, 64, 64],
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [64],
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
}

# Class -> why it needs whole clips. `tests/model/test_diffusers_chunking.py` proves each.
WHOLE_CLIPS = {
    "AutoencoderKLHunyuanVideo15": "its attention reads every earlier frame of the clip",
    "AutoencoderKLHunyuanVideo": "its group norms take their statistics over all frames",
    "AutoencoderKLCogVideoX": "its group norms take their statistics over batches of frames that depend on the length of the clip",
    "AutoencoderKLCosmos": "its attention reads every earlier frame of the clip",
    "AutoencoderKLLTXVideo": "diffusers keeps no state between the convolutions of one chunk and the next",
    "AutoencoderKLAllegro": "its group norms and convolutions see the frames before and after",
    "AutoencoderKLMochi": "its attention reads every earlier frame of the clip",
}
BOTH_SIDES = "its encoder is configured to see the frames before and after"  # LTX-2 and VidTok can be
DETERMINISTIC = frozenset(
    {"AutoencoderKLCosmos", "AutoencoderDC", "AutoencoderTiny"}
)  # these give one latent, not a Gaussian


# Class -> what `LatentSpec` cannot express of it, or why its output is not such a latent.
REFUSED = {
    "AutoencoderKLMiniMaxH3": "it takes 17n+5 frames to 5n+2 latents, pixels in the normalisation of ImageNet, and its definition "
    "includes blended tiles of 256 pixels",
    "AutoencoderKLKVAEVideo": "its group norms take their statistics over segments of 17, 16, 16, ... frames: it takes 16n+1 frames to "
    "4n+1 latents",
    "AutoencoderKLQwenImage21": "it halves the frame rate three times but steps through groups of four frames, so it encodes single frames "
    "only",
    "VQModel": "it gives entries of a codebook, not continuous latents",
}
