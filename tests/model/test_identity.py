"""Identity of a network: it covers exactly the tensors and configuration keys that reach the latent."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import model
from model import registry
from model.vae import Pixels
from model.weights import hash_weights
from tests.model.conftest import FIXTURES
from tests.model.diffusers_networks import TINY, noise

OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "leanvae": ("leanvae", "leanvae-tiny", {}),
    "leanvae of other patches": ("leanvae", "leanvae-tiny", {"patch_size": [2, 8, 8], "value_range": [-1.0, 1.0]}),
    "wfvae": ("wfvae", "wfvae-tiny", {}),
    "wfvae 8x8x8": ("wfvae", "wfvae888-tiny", {}),
    "wfvae mixing": ("wfvae", "wfvae-tiny", {"attention_type": "AttnBlock3D"}),
    "wfvae2": ("wfvae2", "wfvae2-tiny", {}),
    "ivvae": ("ivvae", "ivvae-tiny", {}),
}
DIFFUSERS: dict[str, dict[str, Any]] = {
    **TINY,
    "sd without quant_conv": {**TINY["sd"], "use_quant_conv": False, "use_post_quant_conv": False},
}
pytestmark = pytest.mark.filterwarnings("error")
NETWORKS = (*OWN, *DIFFUSERS)
everywhere = pytest.mark.parametrize("name", NETWORKS)


def config_of(name: str) -> tuple[str, dict[str, Any]]:
    if name in DIFFUSERS:
        return "diffusers", DIFFUSERS[name]
    family, fixture, changes = OWN[name]
    return family, json.loads((FIXTURES / f"{fixture}.json").read_text())["config"] | changes


@cache
def network(name: str) -> Any:
    family, config = config_of(name)
    return model.load(family, config=config, untrained=0)


def module_of(vae: Any) -> Any:
    """Parameters by published key."""
    return vae.network if hasattr(vae, "network") else vae._coder.module


def video(spec: Any) -> torch.Tensor:
    low, high = spec.value_range
    frames = spec.lead_frames + (2 if spec.time_stride < 4 else 1) * spec.time_stride
    unit = noise(1, 3, frames, spec.space_stride, 2 * spec.space_stride) / 2 + 0.5  # two pixels to attend to each other
    return low + (high - low) * unit


def encoded(vae: Any, clip: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    posterior, _ = vae.encode(video(vae.spec) if clip is None else clip, moments=vae.spec.moments)
    return posterior.mean, posterior.logvar


class Changed:
    """Latents of the network of that name with changed tensors. Changes it in place, which is faster than building it."""

    def __init__(self, name: str) -> None:
        self.vae, self.family = network(name), config_of(name)[0]
        self.module = module_of(self.vae)
        self.state = self.module.state_dict()  # the network's own memory
        self.weights = {key: tensor.clone() for key, tensor in self.state.items()}

    def encoded(
        self, changes: dict[str, torch.Tensor], clip: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self.vae
        try:
            for key, tensor in changes.items():
                self.state[key].copy_(tensor)
            if self.family != "diffusers":  # these prepare their parameters once, when they first run
                vae = type(vae)(vae.network, vae.spec, vae.config, vae.sha256, vae.device, vae.dtype)
            return encoded(vae, clip)
        finally:
            for key in changes:
                self.state[key].copy_(self.weights[key])

    def sha256(self, changes: dict[str, torch.Tensor]) -> Any:
        return self.hash({**self.weights, **changes})

    def hash(self, weights: dict[str, torch.Tensor]) -> Any:
        return hash_weights(weights, registry.family_of(self.family).latent_part(self.vae.config))

    def felt_by_the_mean(self) -> set[str]:
        """Tensors on which the mean has a derivative: one pass for all."""
        state = self.module.state_dict(keep_vars=True)
        tensors = {key: tensor.requires_grad_() for key, tensor in state.items() if tensor.is_floating_point()}
        shown = video(self.vae.spec)
        with torch.enable_grad():
            if self.family == "diffusers":
                pixels = Pixels(1, shown.shape[2], (shown.shape[3], shown.shape[4]), lambda *_: shown)
                mean, _, _ = self.vae._run_encoder(pixels, None, moments=False)
            else:
                mean = self.module.encode(shown).mean
        derivatives = torch.autograd.grad(mean, list(tensors.values()), noise(*mean.shape, seed=2), allow_unused=True)
        for key in dict(self.module.named_buffers()).keys() & tensors.keys():
            tensors[key].requires_grad_(False)
        return {key for key, found in zip(tensors, derivatives, strict=True) if found is not None and bool(found.any())}


def noisy(tensor: torch.Tensor, rows: Any = ...) -> torch.Tensor:
    """Changes the values in `rows`."""
    if not tensor.is_floating_point():  # counters of batch norms
        return tensor + 1
    changed = tensor.clone()
    seed = torch.Generator().manual_seed(1)
    changed[rows] += 0.5 * torch.rand(tensor[rows].shape, generator=seed) + 0.1
    return changed


def single_changes(name: str, weights: dict[str, torch.Tensor]) -> list[tuple[str, str, torch.Tensor]]:
    """(role, key, changed tensor), one tensor at a time, by the declaration; rows of mean and log-variance separately."""
    vae, (family, _) = network(name), config_of(name)
    part = registry.family_of(family).latent_part(vae.config)
    found = []
    for key, tensor in weights.items():
        rows = next((count for beginning, count in part.shared.items() if key.startswith(beginning)), None)
        if rows is not None:
            found += [("mean", key, noisy(tensor, slice(rows))), ("logvar", key, noisy(tensor, slice(rows, None)))]
        elif key.startswith(part.logvar):
            found.append(("logvar", key, noisy(tensor)))
        else:
            found.append(("mean" if key.startswith(part.mean) else "other", key, noisy(tensor)))
    return found


@everywhere
def test_encoder_tensors_change_latent_and_identity(name):
    one = Changed(name)
    mean, logvar = one.encoded({})
    image = video(one.vae.spec)[:, :, :1] if one.family != "diffusers" else None
    image_mean = one.encoded({}, image)[0]
    felt, shared = one.felt_by_the_mean(), registry.family_of(one.family).latent_part(one.vae.config).shared
    roles = []
    for role, key, changed in single_changes(name, one.weights):
        if role == "other":
            continue
        roles.append(role)
        # the hash goes from key to key, so one tensor shows how it counts
        before, after = one.hash({key: one.weights[key]}), one.hash({key: changed})
        assert after.all != before.all, key
        assert after.moments != before.moments, key
        if role == "mean":
            assert after.mean != before.mean, key
            if key in felt and not key.startswith(tuple(shared)):
                continue
            if torch.equal(one.encoded({key: changed}, image)[0], image_mean):  # then only more frames can show it
                assert not torch.equal(one.encoded({key: changed})[0], mean), f"{key} counts and changes nothing"
        else:
            assert after.mean == before.mean, key
            other_mean, other_logvar = one.encoded({key: changed})
            assert torch.equal(other_mean, mean), key
            assert logvar is not None
            assert not torch.equal(other_logvar, logvar), f"{key} counts for the log-variance and does not change it"
    assert ("logvar" in roles) == network(name).spec.moments
    assert "mean" in roles
    whole = one.sha256({})
    for _, key, changed in single_changes(name, one.weights)[:: max(1, len(one.weights) // 4)]:
        assert one.sha256({key: changed}).all != whole.all


@everywhere
def test_other_tensors_change_neither_latent_nor_identity(name):
    one = Changed(name)
    mean, logvar = one.encoded({})
    before = one.sha256({})
    others = {key: changed for role, key, changed in single_changes(name, one.weights) if role == "other"}
    assert others
    assert any(key.startswith("decoder.") for key in others)
    for key, changed in others.items():
        alone, after = one.hash({key: one.weights[key]}), one.hash({key: changed})
        assert (after.mean, after.moments) == (alone.mean, alone.moments), key
        assert after.all != alone.all, key
    after = one.sha256(others)
    assert (after.mean, after.moments) == (before.mean, before.moments)
    other_mean, other_logvar = one.encoded(others)
    assert torch.equal(other_mean, mean)
    assert logvar is None or torch.equal(other_logvar, logvar)


# Another value of each configuration key that is declared not to count.
OTHER_VALUES: dict[str, Any] = {
    **{"ista_iter_num": 3, "ista_layer_num": 3},
    **{"decoder_num_resblocks": 4, "connect_res_layer_num": 2, "scale": 0.5, "shift": 0.25},
    **{"decoder_energy_flow_hidden_size": 24, "decoder_energy_flow_size": 24, "decoder_base_channels": [16, 24, 40]},
    **{"t_interpolation": "nearest", "scale_factor": 0.5, "shift_factor": 0.25},
    **{"scaling_factor": 0.5, "force_upcast": False, "invert_scale_latents": True},
    **{"sample_size": 64, "sample_height": 96, "sample_width": 96},
    **{"decoder_base_dim": 24, "scale_factor_temporal": 8, "scale_factor_spatial": 32},
    **{"use_post_quant_conv": None, "decode_block_out_channels": [16, 16, 16, 16]},
    **{"decoder_layers_per_block": [2, 1, 1, 1, 1], "decoder_spatio_temporal_scaling": [True, True, False, False]},
    **{"decoder_inject_noise": [True] * 5, "decoder_causal": True, "upsample_residual": [True] * 4},
    **{"upsample_factor": [2] * 4, "timestep_conditioning": True, "spatial_compression_ratio": 64},
    **{"temporal_compression_ratio": 16, "temporal_upsample_blocks": [False, False, True, False]},
    **{"out_channels": None, "decoder_block_out_channels": None, "up_block_types": None},
    **{"batch_norm_eps": 1e-3, "batch_norm_momentum": 0.2, "patch_size": [1, 1], "upsample_match_channel": False},
    **{"spatial_us": [1, 2], "tempo_us": [1], "codebook_size": 4096, "decoder_spatial_padding_mode": "zeros"},
    **{"upsample_type": ["spatial", "spatiotemporal", "spatiotemporal"], "upsample_block_type": "interpolate"},
    **{
        "decoder_block_types": ["ResBlock"] * 2,
        "decoder_qkv_multiscales": [[], []],
        "decoder_norm_types": "batch_norm",
    },
    **{"num_decoder_blocks": [2, 1], "upsampling_scaling_factor": 4, "upsample_fn": "bilinear"},
    **{"latent_magnitude": 2, "latent_shift": 0.25},
    **{"decoder_act_fns": "relu", "decoder_in_shortcut": False, "decoder_conv_act_fn": "silu"},
}
# Values that fit another number of layers.
OTHER_VALUES_OF: dict[str, dict[str, Any]] = {
    "ltx-2": {
        "decoder_layers_per_block": [2, 1, 1, 1],
        "decoder_spatio_temporal_scaling": [True, True, False],
        "decoder_inject_noise": [True] * 4,
        "upsample_residual": [False] * 3,
        "upsample_factor": [1] * 3,
    },
    "easyanimate": {"up_block_types": ["SpatialUpBlock3D"] * 4},
    "flux-2": {"decoder_block_out_channels": [16, 16]},
    "dc-ae": {"decoder_layers_per_block": [2, 1]},
}
PAIRED = ("latents_mean", "latents_std")
# One legal value: names of the decoder's blocks, which the encoder's decide in WF-VAE and of which these classes know one kind.
FIXED = {
    *(key for key in registry.FAMILIES["wfvae"].keys or () if "_upsample_" in key),
    *(f"{name} up_block_types" for name in ("hunyuan-video", "cogvideox", "allegro")),
    *("taesd block_out_channels", "taesd force_upcast"),  # the class sets them, whatever the configuration says
    *(f"{name} use_post_quant_conv" for name in ("cogvideox",)),  # diffusers builds it for the wrong number of channels
}


def other_configs(name: str) -> dict[str, dict[str, Any]]:
    """Changes of the configuration, one key at a time."""
    vae, found = network(name), dict[str, dict[str, Any]]()
    others = registry.family_of(config_of(name)[0]).latent_part(vae.config).other_keys
    for key in sorted(others & vae.config.keys() - FIXED - set(PAIRED)):
        if f"{name} {key}" in FIXED:
            continue
        if key in OTHER_VALUES_OF.get(name, {}):
            found[key] = {key: OTHER_VALUES_OF[name][key]}
            continue
        value = OTHER_VALUES[key]
        if key == "decoder_block_out_channels":
            value = [2 * width for width in vae.config[key]]
        if key == "out_channels":
            value = 2 * vae.config[key]
        if key == "use_post_quant_conv":
            value = not vae.config[key]
        if key == "up_block_types":
            value = ["AttnUpDecoderBlock2D", *vae.config[key][1:]]
        found[key] = {key: value}
    if others & vae.config.keys() & set(PAIRED):
        channels = vae.spec.latent_channels
        found["latents_mean, latents_std"] = {"latents_mean": [0.75] * channels, "latents_std": [3.0] * channels}
    return found


@everywhere
def test_configuration_of_the_decoder_and_constants_change_no_latent_and_no_identity(name):
    vae, (family, config) = network(name), config_of(name)
    mean, logvar = encoded(vae)
    changes = other_configs(name)
    assert changes
    for key, change in changes.items():
        if all(vae.config[changed] == value for changed, value in change.items()):
            raise AssertionError(f"{key}: give another value to try")
        other = model.load(family, config={**config, **change}, untrained=0)
        assert other.config != vae.config, key
        assert other.identity().latent_config == vae.identity().latent_config, key
        for moments in (False, True):
            same = other.identity().latent_sha256(moments=moments) == vae.identity().latent_sha256(moments=moments)
            assert same, key
        other_mean, other_logvar = encoded(other)
        assert torch.equal(other_mean, mean), key
        assert logvar is None or torch.equal(other_logvar, logvar), key


def test_other_configuration_keys_change_the_identity():
    for name in NETWORKS:
        identity = network(name).identity()
        others = registry.family_of(config_of(name)[0]).latent_part(identity.config).other_keys
        assert set(identity.latent_config) == set(identity.config) - others
    assert {"patch_size", "value_range", "fusion_num_layer"} <= set(network("leanvae").identity().latent_config)
    assert {"norm_type", "attention_type"} <= set(network("wfvae").identity().latent_config)
    assert {"_class_name", "_diffusers_version", "base_dim"} <= set(network("wan-2.1").identity().latent_config)


# ---- without a network ----------------------------------------------------------------------------------------------


def saved(name: str, folder: Any, weights: dict[str, torch.Tensor]) -> str:
    config = {key: value for key, value in network(name).config.items() if key != "_diffusers_version"}
    path = folder / "w.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, path, {"config": json.dumps(config)})
    return str(path)


@everywhere
def test_identify_and_load_give_the_same_identity(name, tmp_path):
    family, config = config_of(name)
    path = saved(name, tmp_path, {key: tensor.clone() for key, tensor in module_of(network(name)).state_dict().items()})
    loaded = model.load(family, path)
    assert model.identify(family, path) == loaded.identity()
    assert loaded.identity().checkpoint.uri == path
    assert loaded.sha256 == network(name).sha256
    assert model.identify(family, config=config, untrained=0) == network(name).identity()


def test_a_preset_is_identified_by_name_alone():
    assert model.identify("leanvae-mini-dim16") == model.load("leanvae-mini-dim16").identity()


@pytest.mark.parametrize("name", ["leanvae", "wfvae", "ivvae", "sd"])
def test_identify_refuses_what_load_refuses(name, tmp_path):
    family = config_of(name)[0]
    weights = {key: tensor.clone() for key, tensor in module_of(network(name)).state_dict().items()}
    key = next(key for key in weights if key.startswith("decoder."))
    for broken, words in (
        ({k: v for k, v in weights.items() if k != key}, f"1 missing: {key}"),
        ({**weights, "stray": torch.zeros(1)}, "1 extra: stray"),
        ({**weights, key: torch.zeros(9, 9, 9)}, f"1 misshapen: {key}"),
        ({**weights, key: torch.full_like(weights[key], torch.nan)}, "NaN or infinity"),
    ):
        path = saved(name, tmp_path, broken)
        with pytest.raises(ValueError, match=words) as loading:
            model.load(family, path)
        with pytest.raises(ValueError, match=words) as identifying:
            model.identify(family, path)
        assert str(identifying.value) == str(loading.value)
    with pytest.raises(ValueError, match="give checkpoint=PATH_OR_URI"):
        model.identify("wfvae-s")
    with pytest.raises(FileNotFoundError):
        model.identify("wfvae-s", str(tmp_path / "nothing.safetensors"))


def test_the_dtype_of_the_file_changes_the_identity(tmp_path):
    weights = {key: tensor.clone() for key, tensor in network("leanvae").network.state_dict().items()}
    half = {key: tensor.half() if key.startswith("encoder.") else tensor for key, tensor in weights.items()}
    decoder = {key: tensor.half() if key.startswith("decoder.") else tensor for key, tensor in weights.items()}
    whole = network("leanvae").identity()
    assert model.identify("leanvae", saved("leanvae", tmp_path, half)).sha256.mean != whole.sha256.mean
    halved = model.identify("leanvae", saved("leanvae", tmp_path, decoder)).sha256
    assert (halved.mean, halved.moments) == (whole.sha256.mean, whole.sha256.moments)
    assert halved.all != whole.sha256.all


def test_haar_filters_missing_from_a_file_do_not_change_the_identity(tmp_path):
    weights = {key: tensor.clone() for key, tensor in network("wfvae").network.state_dict().items()}
    trained = {key: tensor for key, tensor in weights.items() if "wavelet_transform" not in key}
    assert len(trained) < len(weights)
    assert model.identify("wfvae", saved("wfvae", tmp_path, trained)).sha256 == network("wfvae").sha256


def test_identify_builds_no_network(tmp_path, monkeypatch):
    from model.leanvae import vae

    path = saved("leanvae", tmp_path, dict(network("leanvae").network.state_dict()))
    monkeypatch.delattr(vae, "build")
    assert model.identify("leanvae", path).sha256 == network("leanvae").sha256


def test_hashes_equal_their_recorded_values():
    """They are in the fingerprints of every output: other values would encode everything again."""
    identity = network("leanvae").identity()
    assert identity.sha256.all.startswith("032bc21491bd2317")
    assert identity.latent_sha256(moments=False).startswith("096e51c36e6f3298")
    assert identity.latent_sha256(moments=True).startswith("1defddb1bac4dede")


@everywhere
def test_without_its_decoder_a_network_gives_the_same_latents_from_less_memory(name):
    family, config = config_of(name)
    vae = model.load(family, config=config, untrained=0)
    vae.drop_decoder()
    mean, logvar = encoded(vae)
    want_mean, want_logvar = encoded(network(name))
    assert torch.equal(mean, want_mean)
    assert logvar is want_logvar is None or torch.equal(logvar, want_logvar)
    assert vae.identity() == network(name).identity()
    held = {key for key, tensor in module_of(vae).named_parameters() if not tensor.is_meta}
    assert not any(key.startswith("decoder.") for key in held)
    with pytest.raises(RuntimeError, match="its decoder was dropped"):
        vae.decode(mean)
