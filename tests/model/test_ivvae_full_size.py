"""IV-VAE at the published sizes: parameter counts, files, refusals; at full width sane activations in steps of any dtype."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from safetensors.torch import save_file

import model
from model import registry
from model.ivvae.network import Network
from model.registry import PRESETS, complete
from tests.model.conftest import Golden

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("ivvae-tiny")


@pytest.mark.parametrize(
    ("name", "total", "encoder", "decoder", "scale", "shift"),
    [
        ("ivvae-z4", 107_170_842, 44_894_648, 62_276_102, 1.3196, 0.1250),
        ("ivvae-z8", 107_379_150, 45_084_272, 62_294_534, 1.0940, -0.0322),
        ("ivvae-z16", 107_798_550, 45_465_824, 62_331_398, 0.9697, -0.1553),
        ("ivvae-z16-dim96", 241_854_742, 101_698_784, 140_154_630, 0.7619, -0.0483),
    ],
)
def test_parameter_counts_and_constants_are_the_published_ones(name, total, encoder, decoder, scale, shift):
    network, spec = Network.empty(complete(name)), model.spec(name)
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in network.named_children()}
    assert (sum(count.values()), count["encoder"], count["decoder"]) == (total, encoder, decoder)
    assert len(network.state_dict()) == 362
    assert (spec.scale, spec.shift, spec.value_range, spec.chunking) == (scale, shift, (-1.0, 1.0), "exact")
    assert "key-frame" in spec.channel_semantics


def test_aliases_resolve_and_notes_locate_the_files():
    assert {registry.resolve(f"ivvae-z{z}-dim64") for z in (4, 8, 16)} == {"ivvae-z4", "ivvae-z8", "ivvae-z16"}
    assert all(PRESETS[name].published is None for name in PRESETS if name.startswith("ivvae"))
    with pytest.raises(ValueError, match=r"ModelScope wpy1999/iv-vae, weights/ivvae_z8_dim64.pth.*checkpoint=PATH"):
        model.load("ivvae-z8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z_dim": 0}, "z_dim must be a whole number of at least 1, got 0"),
        ({"z_dim": 5}, "z_dim must be even, half of it per branch, got 5"),
        ({"dim": True}, "dim must be a whole number"),
        ({"dim": 3, "dim_mult": [1, 1, 2, 2]}, "must be even, since upsampling halves it; got 3"),
        ({"dim_mult": [1, 2, 4]}, r"dim_mult must be four whole numbers .*got \[1, 2, 4\]"),
        ({"dim_mult": [1, 2, 4, 8]}, "of which the last two are equal"),
        ({"num_res_blocks": 3}, "num_res_blocks must be 2, as in every published network; got 3"),
        ({"attn_scales": [0.25]}, r"attn_scales must be \[\]"),
        ({"temperal_downsample": [True, True, False]}, r"temperal_downsample must be \[False, True, True\]"),
        ({"scale_factor": "1.3"}, "scale_factor must be a number or None, got '1.3'"),
    ],
)
def test_impossible_configurations_are_refused(golden, change, words):
    with pytest.raises(ValueError, match=words):
        model.spec("ivvae", {**golden.config, **change})


def test_configurations_may_omit_keys_with_defaults(golden):
    spec = model.spec("ivvae", {"z_dim": 6, "dim": 4})
    assert (spec.latent_channels, spec.scale, spec.shift) == (6, None, None)
    with pytest.raises(ValueError, match="missing: dim"):
        model.spec("ivvae", {"z_dim": 6})
    assert model.spec("ivvae", {**golden.config, "dropout": 0.1}).latent_channels == 4  # only training reads it


def test_published_and_safetensors_checkpoints_load(golden, tmp_path):
    pth, copy = tmp_path / "ivvae_z4_dim4.pth", tmp_path / "copy.safetensors"
    torch.save(golden.weights, pth)
    save_file(golden.weights, copy)
    loaded = [model.load("ivvae", str(path), config=golden.config) for path in (pth, copy)]
    assert [vae.checkpoint.layout for vae in loaded] == ["tensors", "safetensors"]
    assert loaded[0].weights_sha256 == loaded[1].weights_sha256
    for vae in loaded:
        golden.check("out/B_mu", vae.encode(golden["in/B"])[0].mean)


def test_weights_of_another_size_are_refused(golden, tmp_path):
    assert len(golden.weights) == 362
    path = tmp_path / "ivvae_z4_dim4.pth"
    torch.save(golden.weights, path)
    with pytest.raises(ValueError, match=r"do not fit ivvae-z4: \d+ misshapen: encoder.conv1.conv_2d.weight is \(4, 3"):
        model.load("ivvae-z4", str(path))
    few = {key: value for key, value in golden.weights.items() if not key.startswith("encoder.head")}
    with pytest.raises(ValueError, match=r"missing: encoder.head.0.gamma, .* and 5 more"):
        model.from_state_dict("ivvae", golden.config, few)
    with pytest.raises(ValueError, match=r"1 extra: encoder.more"):
        model.from_state_dict("ivvae", golden.config, {**golden.weights, "encoder.more": torch.zeros(1)})


def test_untrained_weights_are_reproducible(golden):
    one, again, other = (model.load("ivvae", config=golden.config, untrained=seed) for seed in (3, 3, 4))
    assert one.weights_sha256 == again.weights_sha256 != other.weights_sha256
    # the same on every machine and version: these weights are named in fingerprints
    assert one.weights_sha256.startswith("a0987ee34cfa2a64")


@pytest.fixture(scope="module")
def full():
    """The network of 107 million parameters, a video of 2x4 latent pixels, its posterior, and the mean decoded."""
    vae = model.load("ivvae-z4", untrained=0)
    video = torch.rand((1, 3, 5, 16, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior, _ = vae.encode(video, moments=True)
    return vae, video, posterior, vae.decode(posterior.mean)[0]


def test_full_width_in_steps_is_the_whole_video_and_sane(full):
    vae, video, posterior, decoded = full
    with torch.no_grad():
        mean, logvar = astuple(vae.network.encode(video))
        reference = vae.network.decode(posterior.mean)
    assert (posterior.mean - mean).abs().max() <= 1e-5 * mean.abs().max()
    assert (posterior.logvar - logvar).abs().max() <= 1e-5 * logvar.abs().max()
    assert (decoded - reference).abs().max() <= 1e-5 * max(1, reference.abs().max())
    assert 0.2 < mean.std() < 2
    assert 0.05 < decoded.std() < 0.5


def test_full_width_in_chunks_has_the_same_bits(full):
    vae, video, posterior, _ = full
    first, state = vae.encode(video[:, :, :1])
    rest, _ = vae.encode(video[:, :, 1:], state)
    assert torch.equal(torch.cat([first.mean, rest.mean], dim=2), posterior.mean)


def test_full_width_in_bfloat16_stays_close(full):
    vae, video, posterior, decoded = full
    low = model.from_state_dict("ivvae-z4", None, vae.network.state_dict(), dtype="bfloat16")
    for got, want in ((low.encode(video)[0].mean, posterior.mean), (low.decode(posterior.mean)[0], decoded)):
        assert got.dtype == torch.float32
        assert bool(got.isfinite().all())
        assert 1e-4 < ((got - want).norm() / want.norm()).item() < 1.5e-2
