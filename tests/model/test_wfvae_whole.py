"""Configurations that see all frames at once load and refuse chunks; parameter counts; impossible configurations are refused."""

from __future__ import annotations

import pytest
import torch

import model
from model.registry import FAMILIES, PRESETS, resolve
from model.wfvae.network import Network
from model.wfvae2.network import Network as Network2
from tests.model.conftest import Golden

GROUPNORM = {
    "latent_dim": 4,
    "base_channels": 32,
    "encoder_energy_flow_hidden_size": 32,
    "decoder_energy_flow_hidden_size": 32,
}  # the smallest there is; norm and interpolation are the class defaults


@pytest.fixture(scope="module")
def tiny():
    return Golden("wfvae-tiny").config


@pytest.fixture(scope="module")
def tiny2():
    return Golden("wfvae2-tiny").config


def pixels(*shape: int) -> torch.Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


def check_whole(family, config, words):
    """Whole clips of any batch are accepted, parts of a clip are refused."""
    vae = model.load(family, config=config, untrained=3)
    assert (vae.spec.chunking, vae.spec.causal) == ("none", False)
    video = pixels(2, 3, 5, 16, 24)
    posterior, state = vae.encode(video)
    alone = vae.encode(video[1:])[0].mean
    assert torch.equal(posterior.mean[1:], alone)
    assert vae.decode(alone)[0].shape == (1, 3, 5, 16, 24)
    with pytest.raises(ValueError, match=f"cannot encode in chunks: {words}.*whole clips"):
        vae.encode(video[:, :, :4], state)
    with pytest.raises(ValueError, match=f"cannot decode in chunks: {words}.*last=True"):
        vae.decode(alone, last=False)


def test_groupnorm_needs_whole_clips():
    """As published files without these keys: groupnorm and nearest are the class defaults."""
    check_whole("wfvae", GROUPNORM, "norm_type 'groupnorm' takes its statistics over all")


def test_the_older_attention_needs_whole_clips(tiny):
    check_whole("wfvae", {**tiny, "attention_type": "AttnBlock3D"}, "its attention, 'AttnBlock3D', mixes the frames")


def test_a_network_without_attention_may_be_chunked(tiny):
    config = {**tiny, "use_attention": False, "attention_type": "AttnBlock3D"}
    assert model.spec("wfvae", config).chunking == "exact"


def test_wfvae2_with_groupnorm_needs_whole_clips():
    sizes = {"base_channels": [32, 32, 64], "encoder_energy_flow_size": 32, "decoder_energy_flow_size": 32}
    config = {**sizes, "latent_dim": 4, "norm_type": "groupnorm"}
    check_whole("wfvae2", config, "norm_type 'groupnorm'")


# ---- counts and configurations --------------------------------------------------------------------------------------

COUNTS = {  # total, encoder, decoder
    "wfvae-s-4ch": (146_496_836, 38_157_704, 108_339_132),
    "wfvae-s": (145_576_780, 37_182_352, 108_394_428),
    "wfvae-s-16ch": (146_994_524, 38_489_504, 108_505_020),
    "wfvae-m": (223_459_884, 59_022_288, 164_437_596),
    "wfvae-m-16ch": (223_874_620, 59_298_784, 164_575_836),
    "wfvae-l-4ch": (316_334_852, 84_089_352, 232_245_500),
    "wfvae-l-8ch": (316_583_692, 84_255_248, 232_328_444),
    "wfvae-l": (317_081_372, 84_587_040, 232_494_332),
    "wfvae-l-32ch": (318_076_732, 85_250_624, 232_826_108),
    "wfvae-m-888-32ch": (227_035_816, 60_326_464, 166_709_352),
}


def count(module):
    """As the published code counts: with the filters of transforms over frames, which it holds as frozen convolutions."""
    filters = [tensor for name, tensor in module.named_buffers() if name.endswith("_conv.conv.weight")]
    return sum(tensor.numel() for tensor in (*module.parameters(), *filters))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_are_the_measured_ones(name):
    network = Network.empty(PRESETS[resolve(name)].config)
    assert (count(network), count(network.encoder), count(network.decoder)) == COUNTS[name]


def test_parameter_counts_of_other_configurations_are_the_measured_ones():
    config = {**FAMILIES["wfvae"].defaults, **GROUPNORM}
    assert round(count(Network.empty(config)) / 1e6, 1) == 9.2
    wider = {**PRESETS["wfvae-s-8ch"].config, "connect_res_layer_num": 2}
    assert count(Network.empty(wider)) == 147_347_788
    second = Network2.empty({**FAMILIES["wfvae2"].defaults, "latent_dim": 4})
    assert [round(count(part) / 1e6, 1) for part in (second, second.encoder)] == [131.2, 49.1]


def test_the_state_dict_has_the_published_size():
    assert len(Network.empty(PRESETS["wfvae-l-16ch"].config).state_dict()) == 244


@pytest.mark.parametrize("name", ["wfvae-s", "wfvae-m-888-32ch"])
def test_specs_follow_the_configuration(name):
    spec = model.spec(name)
    assert spec.value_range == (-1.0, 1.0)
    assert (spec.latent_channels, spec.time_stride) == {"wfvae-s": (8, 4)}.get(name, (32, 8))
    assert (spec.chunking, spec.scale, spec.shift) == ("exact", None, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_channels": 0}, "base_channels must be a whole number of at least 1, got 0"),
        ({"latent_dim": "8"}, "latent_dim must be a whole number"),
        ({"norm_type": "batchnorm"}, "norm_type must be 'layernorm' or 'groupnorm', got 'batchnorm'"),
        ({"t_interpolation": "cubic"}, "t_interpolation must be 'trilinear' or 'nearest'"),
        ({"attention_type": "Attention3DFix"}, "attention_type must be 'AttnBlock3DFix' or 'AttnBlock3D'"),
        ({"norm_type": "groupnorm"}, "groupnorm has 32 groups.*base_channels 4"),
        (
            {"l1_upsample_block": "Spatial2xTime2x3DUpsample"},
            "l1_upsample_block.*must be Downsample, .*; got Downsample",
        ),
        ({"l2_dowmsample_block": "Downsample"}, "l2_dowmsample_block.*must be Spatial2xTime2x3DDownsample"),
    ],
)
def test_impossible_configurations_are_refused(tiny, change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("wfvae", {**tiny, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_channels": [4, 8]}, r"base_channels must be 3 whole numbers.*got \[4, 8\]"),
        ({"layer_type": ["hw", "t"]}, r"layer_type must be a list of one or more of hw, thw"),
        ({"layer_res_type": ["ResnetBlock2D"]}, "layer_res_type must be a list of 2 of ResnetBlock2D, ResnetBlock3D"),
        ({"mid_layers_type": ["ResnetBlock3D", "Attention3DFix"]}, "mid_layers_type must be a list.*Attention3DFix"),
        ({"input_type": "image"}, "input_type must be 'video', got 'image'"),
        ({"decoder_num_resblocks": 1}, "decoder_num_resblocks must be at least 2, got 1"),
        ({"norm_type": "groupnorm"}, "groupnorm has 32 groups"),
    ],
)
def test_impossible_configurations_of_wfvae2_are_refused(tiny2, change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("wfvae2", {**tiny2, **change})
