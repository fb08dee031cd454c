"""Presets of the VAEs that diffusers runs: locations, licences, and the configuration keys that distinguish each. Plain data.

A `config.json` beside weights must agree with the keys given here; the other keys have the defaults of the class. Other VAEs of these
classes are used as `--model diffusers --checkpoint FOLDER_OR_URI`, with their own `config.json`.
"""

from __future__ import annotations

from model.family import Preset
from model.wan_statistics import WAN22_MEAN, WAN22_STD

# fmt: off
MOCHI_MEAN = [
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
    0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
    -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285,
]
MOCHI_STD = [
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
    0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
    0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041,
]
# fmt: on

_FILE = "diffusion_pytorch_model.safetensors"
_WIDE = {"block_out_channels": [128, 256, 512, 512]}
_COGVIDEOX = {
    "_class_name": "AutoencoderKLCogVideoX",
    "latent_channels": 16,
    "block_out_channels": [128, 256, 256, 512],
}
_FOUR_STAGES = {**_WIDE, "latent_channels": 4, "down_block_types": ["DownEncoderBlock2D"] * 4, "layers_per_block": 2}
_LTX_2 = {"_class_name": "AutoencoderKLLTX2Video", "latent_channels": 128, "decoder_causal": False}
_TINY = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "encoder_block_out_channels": [64] * 4}
_IMAGE = {"_class_name": "AutoencoderKL", **_FOUR_STAGES, "up_block_types": ["UpDecoderBlock2D"] * 4}

PRESETS = (
    Preset(
        name="wan-2.1",
        family="diffusers",
        config={"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
        published=f"hf://Wan-AI/Wan2.1-T2V-14B-Diffusers/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/Wan-Video/Wan2.1",
    ),
    Preset(
        name="wan-2.2",
        family="diffusers",
        config={
            "_class_name": "AutoencoderKLWan",
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": list(WAN22_MEAN),
            "latents_std": list(WAN22_STD),
        },
        published=f"hf://Wan-AI/Wan2.2-TI2V-5B-Diffusers/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/Wan-Video/Wan2.2",
        note="of the 5B model; the 14B models of Wan 2.2 use wan-2.1",
    ),
    Preset(
        name="qwen-image",
        family="diffusers",
        config={"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4]},
        published=f"hf://Qwen/Qwen-Image/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/QwenLM/Qwen-Image",
        note="Wan 2.1's layers and constants with other weights: its latents are not Wan's",
    ),
    Preset(
        name="ltx-2",
        family="diffusers",
        config={**_LTX_2, "block_out_channels": [256, 512, 1024, 2048], "layers_per_block": [4, 6, 6, 2, 2]},
        published=f"hf://Lightricks/LTX-2/vae/{_FILE}",
        licence="LTX-2 Community License Agreement",
        source="https://github.com/Lightricks/LTX-2",
        note="2.0; mean and std are stored with its weights and known once it is loaded",
    ),
    Preset(
        name="ltx-2.3",
        family="diffusers",
        config={
            **_LTX_2,
            "block_out_channels": [256, 512, 1024, 1024],
            "layers_per_block": [4, 6, 4, 2, 2],
            "decoder_block_out_channels": [256, 512, 512, 1024],
            "decoder_layers_per_block": [4, 6, 4, 2, 2],
            "decoder_spatio_temporal_scaling": [True] * 4,
            "decoder_inject_noise": [False] * 5,
            "decoder_spatial_padding_mode": "zeros",
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
            "upsample_residual": [False] * 4,
            "upsample_factor": [2, 2, 1, 2],
        },
        published=f"hf://diffusers/LTX-2.3-Diffusers/vae/{_FILE}",
        licence="LTX-2 Community License Agreement",
        source="https://github.com/Lightricks/LTX-2",
        note="LTX-2.5 (hf://Lightricks/LTX-2.5-Diffusers) has the same encoder and another decoder: the same latents",
    ),
    Preset(
        name="easyanimate-5.1",
        family="diffusers",
        config={"_class_name": "AutoencoderKLMagvit", "latent_channels": 16, **_WIDE, "scaling_factor": 0.7125},
        published=f"hf://alibaba-pai/EasyAnimateV5.1-7b-zh-diffusers/vae/{_FILE}",
        licence="see its model card",
        source="https://github.com/aigc-apps/EasyAnimate",
        aliases=("easyanimate",),
    ),
    Preset(
        name="hunyuan-video-1.5",
        family="diffusers",
        config={
            "_class_name": "AutoencoderKLHunyuanVideo15",
            "latent_channels": 32,
            "block_out_channels": [128, 256, 512, 1024, 1024],
            "scaling_factor": 1.03682,
        },
        published=f"hf://hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v/vae/{_FILE}",
        licence="Tencent Hunyuan Community License",
        source="https://github.com/Tencent-Hunyuan/HunyuanVideo-1.5",
        note="whole clips only; the mask of its attention grows with the square of frames and pixels",
    ),
    Preset(
        name="hunyuan-video",
        family="diffusers",
        config={"_class_name": "AutoencoderKLHunyuanVideo", "latent_channels": 16, **_WIDE, "scaling_factor": 0.476986},
        published=f"hf://hunyuanvideo-community/HunyuanVideo/vae/{_FILE}",
        licence="Tencent Hunyuan Community License",
        source="https://github.com/Tencent-Hunyuan/HunyuanVideo",
        note="whole clips only; diffusers' default blends overlapping pieces of more than 16 frames, which gives other latents",
    ),
    Preset(
        name="cogvideox",
        family="diffusers",
        config={**_COGVIDEOX, "scaling_factor": 1.15258426},
        published=f"hf://zai-org/CogVideoX-2b/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/zai-org/CogVideo",
        aliases=("cogvideox-2b",),
        note="of the 2B model; the 5B models scale by 0.7",
    ),
    Preset(
        name="cogvideox-5b",
        family="diffusers",
        config={**_COGVIDEOX, "scaling_factor": 0.7},
        published=f"hf://zai-org/CogVideoX-5b/vae/{_FILE}",
        licence="CogVideoX License",
        source="https://github.com/zai-org/CogVideo",
    ),
    Preset(
        name="cosmos",
        family="diffusers",
        config={
            "_class_name": "AutoencoderKLCosmos",
            "latent_channels": 16,
            "temporal_compression_ratio": 8,
            "spatial_compression_ratio": 8,
        },
        published=f"hf://nvidia/Cosmos-1.0-Tokenizer-CV8x8x8/vae/{_FILE}",
        licence="NVIDIA Open Model License",
        source="https://github.com/NVIDIA/Cosmos",
        aliases=("cosmos-cv8x8x8",),
        note="deterministic, has no log-variance: moments cannot be stored",
    ),
    Preset(
        name="ltx-video",
        family="diffusers",
        config={
            "_class_name": "AutoencoderKLLTXVideo",
            "latent_channels": 128,
            "decoder_block_out_channels": [128, 256, 512, 512],
            "timestep_conditioning": False,
        },
        published=f"hf://Lightricks/LTX-Video/vae/{_FILE}",
        licence="LTX-Video Open Weights License",
        source="https://github.com/Lightricks/LTX-Video",
        note="0.9.0; mean and std are stored with its weights and known once it is loaded",
    ),
    Preset(
        name="allegro",
        family="diffusers",
        config={"_class_name": "AutoencoderKLAllegro", "latent_channels": 4, **_WIDE},
        published=f"hf://rhymes-ai/Allegro/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/rhymes-ai/Allegro",
        note="whole clips only; diffusers always blends tiles of 24x320x320, which gives other latents for any other size",
    ),
    Preset(
        name="mochi",
        family="diffusers",
        config={"_class_name": "AutoencoderKLMochi", "latent_channels": 12, "temporal_expansions": [1, 2, 3]},
        published=f"hf://genmo/mochi-1-preview/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/genmoai/mochi",
    ),
    Preset(
        name="svd",
        family="diffusers",
        config={"_class_name": "AutoencoderKLTemporalDecoder", **_FOUR_STAGES},
        published=f"hf://stabilityai/stable-video-diffusion-img2vid-xt/vae/{_FILE}",
        licence="Stability AI Community License",
        source="https://github.com/Stability-AI/generative-models",
        note="encodes frame by frame, decodes clips whole",
    ),
    Preset(
        name="sd-vae-ft-mse",
        family="diffusers",
        config={**_IMAGE, "scaling_factor": 0.18215},
        published=f"hf://stabilityai/sd-vae-ft-mse/{_FILE}",
        licence="MIT",
        source="https://huggingface.co/stabilityai/sd-vae-ft-mse",
        aliases=("sd",),
        note="an image VAE, frame by frame",
    ),
    Preset(
        name="sdxl",
        family="diffusers",
        config={**_IMAGE, "scaling_factor": 0.13025},
        published=f"hf://stabilityai/sdxl-vae/{_FILE}",
        licence="MIT",
        source="https://huggingface.co/stabilityai/sdxl-vae",
        note="an image VAE, frame by frame; float16 overflows in it",
    ),
    Preset(
        name="flux-2",
        family="diffusers",
        config={"_class_name": "AutoencoderKLFlux2", "latent_channels": 32, **_WIDE},
        published=f"hf://black-forest-labs/FLUX.2-klein-4B/vae/{_FILE}",
        licence="Apache-2.0",
        source="https://github.com/black-forest-labs/flux2",
        note="an image VAE, frame by frame; its latents are normalised as 2x2 patches, with statistics stored in its weights",
    ),
    Preset(
        name="dc-ae-f32c32-sana",
        family="diffusers",
        config={
            "_class_name": "AutoencoderDC",
            "latent_channels": 32,
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
        published=f"hf://mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers/{_FILE}",
        licence="see its model card",
        source="https://github.com/mit-han-lab/efficientvit",
        aliases=("dc-ae",),
        note="an image VAE, frame by frame; deterministic, has no log-variance",
    ),
    Preset(
        name="taesd",
        family="diffusers",
        config=_TINY,
        published=f"hf://madebyollin/taesd/{_FILE}",
        licence="MIT",
        source="https://github.com/madebyollin/taesd",
        note="an image VAE, frame by frame; deterministic, has no log-variance; its latents approximate those of Stable Diffusion "
        "times 0.18215; taesdxl has the same configuration: no check tells their weights apart",
    ),
    Preset(
        name="taesdxl",
        family="diffusers",
        config=_TINY,
        published=f"hf://madebyollin/taesdxl/{_FILE}",
        licence="MIT",
        source="https://github.com/madebyollin/taesd",
        note="an image VAE, frame by frame; deterministic, has no log-variance; its latents approximate those of SDXL times 0.13025; "
        "taesd has the same configuration: no check tells their weights apart",
    ),
)
