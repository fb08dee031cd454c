"""Loading of diffusers folders: the same latents as the library, strict keys, errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
from model.diffusers_vae import module as built
from tests.model.diffusers_networks import IMAGES, TINY, clip, noise, tiny

# Allegro: 24 frames of its sample_size are the one clip diffusers does not blend. Wan: 16 latent pixels, see `wan_stream`.
SIDES = {name: (32, 32) for name in TINY} | {
    "wan-2.2": (64, 64),
    "ltx-video": (64, 64),
    "ltx-2": (64, 64),
    "svd": (16, 16),
    **dict.fromkeys(IMAGES, (16, 16)),
}
# Their streams step through the clip and the library runs the whole: products over more frames may round differently.
STEPPED = ("easyanimate", "ltx-2", "vidtok")


def options(name):
    return {key: value for key, value in TINY[name].items() if not key.startswith("_")}


def saved(name, folder):
    """The library's module with its own seeded initial weights, and the folder that `save_pretrained` writes."""
    import diffusers  # 3 s of CPU: not in every worker of pytest that collects this file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = getattr(diffusers, TINY[name]["_class_name"])(**options(name)).eval()
    module.save_pretrained(folder)
    return module


@torch.no_grad()
def by_the_library(name, module, video):
    """Latents, log-variance and video from diffusers' own `encode` and `decode`."""
    if name in ("dc-ae", "taesd"):
        latents = [module.encode(video[:, :, t], return_dict=False)[0].contiguous() for t in range(video.shape[2])]
        return torch.stack(latents, 2), None, torch.stack([module.decode(latent).sample for latent in latents], 2)
    if name == "vidtok":  # its `forward` pads the first frame to a group
        mean = module(video, sample_posterior=False, encoder_mode=True)
        padded = torch.cat([video[:, :, :1]] * 3 + [video], dim=2)
        return mean, module.encode(padded).latent_dist.logvar, module.decode(mean)
    if name in ("svd", "sd", "flux-2"):
        posteriors = [module.encode(video[:, :, t]).latent_dist for t in range(video.shape[2])]
        mean, logvar = (torch.stack([getattr(p, kind) for p in posteriors], dim=2) for kind in ("mean", "logvar"))
        frames = mean.transpose(1, 2).flatten(0, 1)
        if name == "svd":
            decoded = module.decode(frames, num_frames=mean.shape[2]).sample
        else:
            decoded = torch.cat([module.decode(frame).sample for frame in frames.split(1)])
        return mean, logvar, decoded.unflatten(0, (video.shape[0], -1)).transpose(1, 2)
    if name == "allegro":
        module.enable_tiling()  # it refuses to run without; a clip of one tile is not blended
    posterior = module.encode(video).latent_dist
    decoded = module.decode(posterior.mode()).sample
    return (
        posterior.mode(),
        getattr(posterior, "logvar", None),
        decoded.transpose(1, 2) if name == "allegro" else decoded,
    )


@pytest.mark.parametrize("name", TINY)
def test_a_saved_folder_gives_the_same_latents_as_the_library(name, tmp_path):
    module = saved(name, tmp_path)
    vae = model.load("diffusers", str(tmp_path))
    video = noise(1, 3, 24 if name == "allegro" else vae.spec.lead_frames + 2 * vae.spec.time_stride, *SIDES[name])
    mean, logvar, decoded = by_the_library(name, module, video)
    assert mean.std() > 0.01
    tolerance = {"rtol": 0, "atol": 1e-5 * float(mean.abs().max()) if name in STEPPED else 0}
    torch.testing.assert_close(vae.encode(video)[0].mean, mean, **tolerance)
    if logvar is None:
        with pytest.raises(ValueError, match="is deterministic: it has no log-variance"):
            vae.encode(video, moments=True)
    else:
        torch.testing.assert_close(vae.encode(video, moments=True)[0].logvar, logvar, **tolerance)
    torch.testing.assert_close(vae.decode(mean)[0], decoded, **tolerance)
    assert (vae.checkpoint.layout, vae.untrained) == ("safetensors", False)
    assert vae.weights_sha256 == model.from_state_dict("diffusers", TINY[name], module.state_dict()).weights_sha256
    assert vae.config == model.from_state_dict("diffusers", TINY[name], module.state_dict()).config


@pytest.mark.parametrize("name", TINY)
def test_blending_options_are_off(name):
    module = tiny(name)._coder.module
    for switch in ("use_slicing", *built.BLENDING):
        assert not getattr(module, switch, False), switch
    assert not module.training
    latent, _ = tiny(name).encode(clip(tiny(name).spec))
    assert not latent.mean.requires_grad


def test_the_library_blends_longer_hunyuan_clips_by_default(tmp_path):
    module = saved("hunyuan-video", tmp_path)
    vae = model.load("diffusers", str(tmp_path))
    video = noise(1, 3, 21, 16, 16)
    whole = vae.encode(video)[0].mean
    with torch.no_grad():
        assert (module.encode(video).latent_dist.mode() - whole).abs().max() > 1e-3
        module.use_framewise_encoding = False
        assert torch.equal(module.encode(video).latent_dist.mode(), whole)


def test_untrained_weights_are_reproducible_and_leave_the_global_generator():
    before = torch.random.get_rng_state()
    one, again = tiny("wan-2.1"), model.load("diffusers", config=TINY["wan-2.1"], untrained=0)
    other = model.load("diffusers", config=TINY["wan-2.1"], untrained=1)
    assert one.weights_sha256 == again.weights_sha256 != other.weights_sha256
    # the same on every machine and version: these weights are named in fingerprints
    assert one.weights_sha256.startswith("b7cd23251199b45e")
    noisy = {**TINY["ltx-video"], "timestep_conditioning": True, "decoder_inject_noise": [True] * 5}
    ltx = model.load("diffusers", config=noisy, untrained=0)
    latent = noise(1, 8, 2, 2, 2)
    assert torch.equal(ltx.decode(latent)[0], ltx.decode(latent)[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (one.untrained, one.seed, one.checkpoint) == (True, 0, None)


def test_the_configuration_in_force_is_recorded_with_the_version():
    config = tiny("sd").config
    assert config["_class_name"] == "AutoencoderKL"
    assert config["_diffusers_version"] == importlib.metadata.version("diffusers")
    assert (config["act_fn"], config["norm_num_groups"]) == ("silu", 4)  # a default and a given one
    assert json.loads(json.dumps(config)) == config


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("wan-2.1", torch.bfloat16), ("sd", torch.bfloat16), ("wan-2.1", torch.float64), ("cosmos", torch.float64)],
)
def test_other_dtypes_stay_close(name, dtype):
    plain, other = tiny(name), tiny(name, dtype=dtype)
    video = clip(plain.spec)
    want, got = plain.encode(video)[0].mean, other.encode(video)[0].mean
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - want).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4) * want.abs().max()
    assert other.decode(got)[0].dtype == got.dtype


def test_half_precision_weights_load(tmp_path):
    saved("sd", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    vae = model.load("diffusers", str(tmp_path))
    assert vae.encode(clip(vae.spec))[0].mean.dtype == torch.float32
    assert next(vae._coder.module.parameters()).dtype == torch.float32


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_preset_refuses_another_network_of_its_class(tmp_path):
    saved("wan-2.1", tmp_path)
    with pytest.raises(
        ValueError, match=r"is not wan-2.1: its own configuration says base_dim is 8, not 96, z_dim is 4"
    ):
        model.load("wan-2.1", str(tmp_path))
    with pytest.raises(ValueError, match="is not sdxl: its own configuration says _class_name is 'AutoencoderKLWan'"):
        model.load("sdxl", str(tmp_path))


def test_missing_and_extra_keys_are_refused(tmp_path):
    module = saved("sd", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = dict(module.state_dict())
    weights["stray"] = weights.pop("encoder.conv_in.bias")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"1 missing: encoder.conv_in.bias; 1 extra: stray"):
        model.load("diffusers", str(tmp_path))


def test_sharded_weights_are_refused(tmp_path):
    saved("sd", tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors")
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"sharded weights \(2 .safetensors files and an index\).*max_shard_size"):
        model.load("diffusers", str(tmp_path))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'lathe\[diffusers\]'"):
        model.load("diffusers", config=TINY["sd"], untrained=0)


def test_a_library_without_the_class_is_named(monkeypatch):
    monkeypatch.setattr(built, "library", lambda: types.SimpleNamespace(__version__="0.20.0"))
    with pytest.raises(ValueError, match=r"the installed diffusers 0.20.0 has no AutoencoderKLWan"):
        model.load("wan-2.1", untrained=0)


def test_unknown_options_are_named_in_a_warning():
    weights = tiny("sd")._coder.module.state_dict()
    with pytest.warns(
        UserWarning, match=r"AutoencoderKL of diffusers .* ignores unknown configuration keys: clip_output"
    ):
        model.from_state_dict("diffusers", {**TINY["sd"], "clip_output": False}, weights)


@pytest.mark.parametrize(
    "change", [{"down_block_types": ["NoSuchBlock"] * 2}, {"norm_num_groups": 3}, {"block_out_channels": ["a", "b"]}]
)
def test_unbuildable_configurations_are_refused(change):
    with pytest.raises(ValueError, match="AutoencoderKL cannot be built from this configuration"):
        model.load("diffusers", config={**TINY["sd"], **change}, untrained=0)
