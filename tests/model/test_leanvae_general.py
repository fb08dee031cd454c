"""LeanVAE in general: other patches, widths, depths and ranges, and Wan-aligned presets, compared with plain networks."""

from __future__ import annotations

import json

import pytest
import torch

import model
from model import registry, wan_statistics
from model.definition import definition
from model.leanvae.network import Network

WIDE = {
    "latent_dim": 6,
    "embedding_dim": 40,
    "l_dim": 16,
    "h_dim": 24,
    "sep_num_layer": 3,
    "fusion_num_layer": 2,
    "ista_iter_num": 3,
    "ista_layer_num": 1,
    "patch_size": [2, 8, 8],
    "value_range": [-1.0, 1.0],
}


@pytest.fixture(scope="module")
def wide():
    return model.load("leanvae", config=WIDE, untrained=3)


def video_of(vae, *shape):
    low, high = vae.spec.value_range
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(1))


def close(got, want):
    return (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize(
    "change",
    [{}, {"patch_size": [2, 4, 4]}, {"patch_size": [2, 1, 1], "value_range": [-0.5, 0.5]}, {"latent_dim": 40}],
    ids=["4x16x16", "4x8x8", "4x2x2", "as wide as the features"],
)
def test_any_configuration_agrees_with_the_plain_network(change):
    vae = model.load("leanvae", config={**WIDE, **change}, untrained=3)
    network = definition("leanvae", vae.config, vae.network.state_dict())
    side = vae.spec.space_stride
    video = video_of(vae, 2, 3, 9, 3 * side, 2 * side)
    latent = vae.encode(video)[0].mean
    assert latent.shape == (2, vae.spec.latent_channels, 3, 3, 2)
    with torch.no_grad():
        assert close(latent, network.encode(video).mean)
    decoded = vae.decode(latent)[0]
    assert decoded.shape == video.shape
    with torch.no_grad():
        assert close(decoded, network.decode(latent))


def test_larger_patches_are_as_lossless(wide):
    video = video_of(wide, 2, 3, 9, 32, 48)
    whole = wide.encode(video)[0].mean
    first, state = wide.encode(video[1:, :, :5])
    rest, _ = wide.encode(video[1:, :, 5:], state)
    assert torch.equal(torch.cat([first.mean, rest.mean], dim=2), whole[1:])
    one, state = wide.decode(whole[:, :, :1], last=False)
    others, _ = wide.decode(whole[:, :, 1:], state)
    assert torch.equal(torch.cat([one, others], dim=2), wide.decode(whole)[0])


def test_sizes_that_do_not_fit_a_larger_patch_are_refused(wide):
    with pytest.raises(ValueError, match=r"multiples of 16, got height 24 .*16 or 32"):
        wide.encode(torch.zeros(1, 3, 5, 24, 16))
    with pytest.raises(ValueError, match=r"floating-point values in \[-1, 1\]"):
        wide.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8))


def test_black_and_white_are_the_ends_of_the_range(wide):
    planes = torch.tensor([16, 235], dtype=torch.uint8).view(2, 1, 1, 1, 1).repeat(1, 5, 3, 16, 16)
    planes[:, :, 1:] = 128
    ends = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1, 1).expand(2, 3, 5, 16, 16)
    assert close(wide.encode_planes(planes, ["bt709"] * 2)[0].mean, wide.encode(ends)[0].mean)


@pytest.mark.parametrize(
    ("name", "stride", "channels", "mean", "std"),
    [
        ("leanvae-wan21-dim16", (4, 8), 16, wan_statistics.WAN21_MEAN, wan_statistics.WAN21_STD),
        ("leanvae-wan22-dim48", (4, 16), 48, wan_statistics.WAN22_MEAN, wan_statistics.WAN22_STD),
    ],
)
def test_wan_aligned_presets_have_the_published_shapes(name, stride, channels, mean, std):
    spec, preset = model.spec(name), registry.PRESETS[name]
    assert (spec.time_stride, spec.space_stride, spec.latent_channels) == (*stride, channels)
    assert (spec.value_range, spec.mean, spec.std, spec.scale) == ((-1.0, 1.0), mean, std, None)
    assert len(spec.mean) == len(spec.std) == channels
    assert min(spec.std) > 0
    assert preset.published is None
    assert "no weights are published" in preset.note
    assert "(z - mean) / std" in spec.channel_semantics
    network = Network.empty(registry.complete(name))
    assert network.latent_bottleneck.phi.shape == (channels, preset.config["embedding_dim"])
    assert network.encoder.video_high_proj[1].weight.shape[1] == 7 * 3 * 2 * (stride[1] // 2) ** 2


def test_statistics_belong_to_the_preset_and_scales_to_the_published_configuration():
    preset = registry.PRESETS["leanvae-wan21-dim16"]
    assert model.spec("leanvae", preset.config).mean is None
    published = registry.PRESETS["leanvae-dim4"].config
    assert model.spec("leanvae", published).scale == 0.7744
    assert model.spec("leanvae", {**published, "value_range": [-1, 1]}).scale is None
    with pytest.raises(ValueError, match="16 latent channels, got latent_dim 4"):
        model.spec("leanvae-wan21-dim16", {"latent_dim": 4})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 8}, r"patch_size must be \[2, n, n\].*got 8"),
        ({"patch_size": [1, 4, 4]}, "patch_size must be"),
        ({"patch_size": [2, 4, 8]}, r"got \[2, 4, 8\]"),
        ({"patch_size": [2, 0, 0]}, "patch_size must be"),
        ({"patch_size": [2, 4.0, 4.0]}, "patch_size must be"),
        ({"value_range": [0.5, -0.5]}, "value_range must be two numbers"),
        ({"value_range": [0, float("inf")]}, "value_range must be two numbers"),
        ({"value_range": "unit"}, "value_range must be two numbers"),
    ],
)
def test_impossible_patches_and_ranges_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("leanvae", {**WIDE, **change})


def test_a_published_file_needs_neither_patch_nor_range(golden):
    assert {"patch_size", "value_range"}.isdisjoint(golden.config)
    complete = registry.complete("leanvae", golden.config)
    assert (complete["patch_size"], complete["value_range"]) == ([2, 4, 4], [-0.5, 0.5])


def test_whole_numbers_in_the_value_range_give_the_identity_of_floats():
    identity, want = (
        model.identify("leanvae", config=WIDE | {"value_range": bounds}, untrained=3)
        for bounds in ((-1, 1), [-1.0, 1.0])
    )
    assert json.dumps(identity.latent_config) == json.dumps(want.latent_config)  # as fingerprints hash it
    assert json.dumps(identity.config["value_range"]) == "[-1.0, 1.0]"
