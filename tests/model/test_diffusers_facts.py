"""Facts about diffusers' VAEs, compared with diffusers itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from model.diffusers_vae import classes, facts, strides
from model.diffusers_vae.causal_stream import STREAMS
from model.diffusers_vae.module import empty_module
from model.diffusers_vae.vae import FRAME_CODERS
from tests.model.diffusers_networks import TINY, clip, tiny


@pytest.fixture
def diffusers():
    """Imported by tests that run: it takes 3 s of CPU, in each worker of pytest that collects this file."""
    import diffusers

    return diffusers


def plain(value):
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("kind", classes.DEFAULTS)
def test_defaults_equal_those_of_the_class(kind, diffusers):
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    assert {key: plain(parameters[key].default) for key in classes.DEFAULTS[kind]} == classes.DEFAULTS[kind]


def test_every_class_is_in_each_table_and_runs_one_way():
    """docs/adding-a-network.md names these tables. A class that says of no way how it runs would be taken for Wan's."""
    for entries in (strides._STRIDES, facts._DECODER_KEYS, {config["_class_name"] for config in TINY.values()}):
        assert set(entries) == set(classes.DEFAULTS)
    wan = ("AutoencoderKLWan", "AutoencoderKLQwenImage")
    assert sorted([*FRAME_CODERS, *STREAMS, *classes.WHOLE_CLIPS, *wan]) == sorted(classes.DEFAULTS)


def test_networks_document_names_every_preset_and_class():
    text = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    presets = {preset.name for preset in facts.PRESETS}
    assert {name for name in presets if f"`{name}`" not in text} == set()
    rows = {
        kind for kind in classes.DEFAULTS if f"`{kind}`" in text or f"`{kind.removeprefix('AutoencoderKL')}`" in text
    }
    assert rows == set(classes.DEFAULTS)


def test_cosmos_statistics_are_per_channel_and_frame_unless_the_configuration_has_others(diffusers):
    assert len(inspect.signature(diffusers.AutoencoderKLCosmos.__init__).parameters["latents_mean"].default) == 16 * 16
    assert "per channel and latent frame" in model.spec("cosmos").channel_semantics
    assert model.spec("cosmos").mean is None
    own = model.spec("diffusers", TINY["cosmos"])
    assert (own.mean, own.std, own.channel_semantics) == ((0.0, 0.5, -0.5, 0.25), (1.0, 2.0, 0.5, 1.5), "")
    none = model.spec("diffusers", {**TINY["cosmos"], "latents_mean": None, "latents_std": None})
    assert (none.mean, none.channel_semantics) == (None, "")


PUBLISHED = {
    # channels, time, space, frames rule, causal, chunking, scale
    "wan-2.1": (16, 4, 8, "4n+1", True, "exact", None),
    "wan-2.2": (48, 4, 16, "4n+1", True, "exact", None),
    "qwen-image": (16, 4, 8, "4n+1", True, "exact", None),
    "ltx-2": (128, 8, 32, "8n+1", True, "exact", 1.0),
    "ltx-2.3": (128, 8, 32, "8n+1", True, "exact", 1.0),
    "easyanimate-5.1": (16, 4, 8, "4n+1", True, "exact", 0.7125),
    "hunyuan-video-1.5": (32, 4, 16, "4n+1", True, "none", 1.03682),
    "flux-2": (32, 1, 8, "n", True, "exact", None),
    "dc-ae-f32c32-sana": (32, 1, 32, "n", True, "exact", 0.41407),
    "hunyuan-video": (16, 4, 8, "4n+1", False, "none", 0.476986),
    "cogvideox": (16, 4, 8, "4n+1", False, "none", 1.15258426),
    "cogvideox-5b": (16, 4, 8, "4n+1", False, "none", 0.7),
    "cosmos": (16, 8, 8, "8n+1", True, "none", 1.0),
    "ltx-video": (128, 8, 32, "8n+1", True, "none", 1.0),
    "allegro": (4, 4, 8, "4n", False, "none", 0.13),
    "mochi": (12, 6, 8, "6n+1", True, "none", None),
    "svd": (4, 1, 8, "n", True, "exact", 0.18215),
    "sd-vae-ft-mse": (4, 1, 8, "n", True, "exact", 0.18215),
    "sdxl": (4, 1, 8, "n", True, "exact", 0.13025),
    "taesd": (4, 1, 8, "n", True, "exact", 1.0),
    "taesdxl": (4, 1, 8, "n", True, "exact", 1.0),
}


def test_specs_of_the_published_networks():
    assert set(PUBLISHED) == {preset.name for preset in facts.PRESETS}
    for name, known in PUBLISHED.items():
        spec = model.spec(name)
        got = (spec.latent_channels, spec.time_stride, spec.space_stride, spec.frames_rule)
        assert (*got, spec.causal, spec.chunking, spec.scale) == known, name
        assert spec.value_range == (-1.0, 1.0)
        for constants in (spec.mean, spec.std):
            assert (constants is not None) == (name in ("wan-2.1", "wan-2.2", "qwen-image", "mochi"))
            assert constants is None or len(constants) == spec.latent_channels
    assert model.spec("wan-2.1").mean[:2] == (-0.7571, -0.7089)
    assert model.spec("wan-2.2").std[-2:] == (0.7468, 0.7744)
    # LeanVAE's variants for the same diffusion models carry the same statistics
    for ours, theirs in (("leanvae-wan21-dim16", "wan-2.1"), ("leanvae-wan22-dim48", "wan-2.2")):
        assert (model.spec(ours).mean, model.spec(ours).std) == (model.spec(theirs).mean, model.spec(theirs).std)


@pytest.mark.filterwarnings("error")  # a key the class does not know
@pytest.mark.parametrize("preset", facts.PRESETS, ids=lambda preset: preset.name)
def test_published_configurations_build_with_the_declared_shapes(preset):
    """At full size on the meta device, so nothing is computed."""
    spec = model.spec(preset.name)
    module = empty_module(preset.name, preset.config).to("meta")
    video = torch.empty((1, 3, spec.lead_frames + 2 * spec.time_stride, 64, 64), device="meta")
    frames = video.transpose(1, 2).flatten(0, 1) if spec.time_stride == 1 else video
    # without tiles, which Allegro's own `encode` insists on
    encoded = module.encoder(frames).chunk(2, dim=1)[0] if preset.name == "allegro" else None
    if spec.time_stride == 1 and not spec.moments:
        encoded = module.encode(frames, return_dict=False)[0]
    parameters = module.encode(frames).latent_dist.mode() if encoded is None else encoded
    if spec.time_stride == 1:
        parameters = parameters.unflatten(0, (1, -1)).transpose(1, 2)
    side = 64 // spec.space_stride
    assert parameters.shape == (1, spec.latent_channels, spec.latent_frames(video.shape[2]), side, side)


@pytest.mark.parametrize("name", TINY)
def test_specs_of_tiny_configurations_match_the_class(name):
    vae = tiny(name)
    assert vae.spec.latent_frames(vae.spec.lead_frames + 2 * vae.spec.time_stride) == vae.spec.lead_frames + 2
    video = clip(vae.spec, batch=2)
    mean = vae.encode(video)[0].mean
    side = video.shape[3] // vae.spec.space_stride
    assert mean.shape == (2, vae.spec.latent_channels, vae.spec.lead_frames + 2, side, side)
    assert vae.decode(mean)[0].shape == video.shape
    declared = model.spec("diffusers", TINY[name]).to_dict()
    loaded = vae.spec.to_dict()
    if name in ("ltx-video", "ltx-2"):  # their statistics come with their weights
        assert declared["mean"] is None
        assert len(loaded["mean"]) == len(loaded["std"]) == vae.spec.latent_channels
        for key in ("mean", "std", "scale"):
            declared.pop(key), loaded.pop(key)
    assert loaded == declared


def test_constants_come_from_the_configuration():
    wan, sd = (model.spec("diffusers", TINY[name]) for name in ("wan-2.1", "sd"))
    assert (wan.mean, wan.std, wan.scale) == ((0.0, 0.5, -0.5, 0.25), (1.0, 2.0, 0.5, 1.5), None)
    assert (sd.scale, sd.shift, sd.mean) == (0.18215, 0.1, None)
    scaled = {**TINY["wan-2.1"], "latents_mean": None, "latents_std": None}
    assert model.spec("diffusers", scaled).mean is None


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sd", {"_class_name": None}, r"names the class None.*expected one of AutoencoderKLWan, .*AutoencoderKL\. "),
        ("sd", {"_class_name": ["AutoencoderKL"]}, r"names the class \['AutoencoderKL'\]"),
        ("sd", {"_class_name": "AutoencoderOobleck"}, "names the class 'AutoencoderOobleck'"),
        (
            "sd",
            {"_class_name": "AutoencoderKLMiniMaxH3"},
            "AutoencoderKLMiniMaxH3 is not supported: it takes 17n.5 frames",
        ),
        ("sd", {"_class_name": "AutoencoderKLKVAEVideo"}, "its group norms take their statistics over segments"),
        ("sd", {"_class_name": "AutoencoderKLQwenImage21"}, "encodes single frames only"),
        ("sd", {"_class_name": "VQModel"}, "entries of a codebook"),
        (
            "vidtok",
            {"regularizer": "fsq", "double_z": False},
            "regularizer 'kl' and double_z true; got 'fsq' and False",
        ),
        ("vidtok", {"tempo_ds": [3]}, r"tempo_ds must name levels of spatial_ds \(\[0, 1, 2\]\), got \[3\]"),
        (
            "easyanimate",
            {"down_block_types": ["SpatialDownBlock3D"] * 4},
            "two of down_block_types before the last must be",
        ),
        ("qwen-image", {"input_channels": 4}, "input_channels must be 3, for videos in RGB; got 4"),
        ("qwen-image", {"temperal_downsample": [True] * 3}, "AutoencoderKLQwenImage steps through groups of 4 frames"),
        ("sd", {"in_channels": 4}, "in_channels must be 3, for videos in RGB; got 4"),
        ("sd", {"block_out_channels": 8}, "block_out_channels must be a list, got 8"),
        ("sd", {"scaling_factor": "0.5"}, "scaling_factor must be a number, got '0.5'"),
        ("sd", {"latent_channels": 0}, "latent_channels must be a whole number of at least 1, got 0"),
        ("sd", {"latents_mean": [0.0] * 4}, "latents_mean and latents_std belong together"),
        ("wan-2.1", {"latents_std": [1.0] * 5}, "latents_std must have one value for each of the 4 channels, got 5"),
        ("wan-2.1", {"temperal_downsample": [True, True, True]}, "must be true for 2 of its first 3 stages"),
        ("wan-2.2", {"in_channels": 3}, "in_channels must be 12; got 3"),
        ("mochi", {"in_channels": 3}, "in_channels must be 15; got 3"),
        ("mochi", {"spatial_expansions": [None]}, "spatial_expansions must be a whole number of at least 1, got None"),
        ("vidtok", {"tempo_ds": 1}, "tempo_ds must be a list, got 1"),
        ("cosmos", {"latents_mean": 3}, "latents_mean must be a list, got 3"),
        ("cosmos", {"temporal_compression_ratio": 8.0}, "temporal_compression_ratio must be a whole number"),
    ],
)
def test_impossible_configurations_are_refused(name, change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("diffusers", {**TINY[name], **change})


def test_strides_of_later_ltx_networks_follow_their_downsampling():
    later = {"spatio_temporal_scaling": [True] * 4, "downsample_type": ["spatial", "temporal", *["spatiotemporal"] * 2]}
    spec = model.spec("diffusers", {**TINY["ltx-video"], **later})
    assert (spec.time_stride, spec.space_stride) == (8, 32)


def test_statistics_of_flux_2_are_named_as_those_of_patches():
    assert "bn.running_mean and bn.running_var" in model.spec("flux-2").channel_semantics
    assert model.spec("flux-2").mean is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("AutoencoderKLMiniMaxH3", "clip_length"),
        ("AutoencoderKLKVAEVideo", "z_channels"),
        ("VQModel", "num_vq_embeddings"),
    ],
)
def test_refused_classes_exist_under_these_names(kind, words, diffusers):
    assert words in inspect.signature(getattr(diffusers, kind).__init__).parameters


def test_facts_import_neither_torch_nor_diffusers():
    code = (
        "import sys; from model.diffusers_vae import facts; import model; [model.spec(p.name) for p in facts.PRESETS]; "
        "heavy = {'torch', 'numpy', 'diffusers', 'safetensors'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
