"""Chunking of diffusers' VAEs: those that claim it lose no bit, the others give a reason, and the reasons are true."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import model
from model.diffusers_vae import causal_stream, wan_stream
from model.diffusers_vae.classes import BOTH_SIDES, WHOLE_CLIPS
from model.losslessness import decode_chunked, encode_chunked, examine
from tests.model.diffusers_networks import BOTH_WAYS, CHUNKED, TINY, WHOLE, clip, noise, tiny


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("allegro", "sd", "svd")])
def test_the_first_latent_is_that_of_the_first_frame_alone_where_the_document_says_so(name):
    """docs/i2v.md: which networks need no condition."""
    vae = tiny(name)
    video = clip(vae.spec)
    first, alone = vae.encode(video)[0].mean[:, :, :1], vae.encode(video[:, :, :1])[0].mean
    difference = float((first - alone).abs().max() / alone.abs().max())
    least, most = (0, 1e-4 if name in ("hunyuan-video-1.5", "ltx-video", "mochi") else 0)
    if name in ("hunyuan-video", "cogvideox"):
        least, most = 0.05, 10
    assert least <= difference <= most


@pytest.mark.parametrize("name", TINY)
def test_every_claimed_property_holds_bit_for_bit(name):
    """All properties (chunks, batches, interleaving, states, prefixes, images) in both directions, or whole clips only."""
    vae = tiny(name)
    assert vae.spec.chunking == ("exact" if name in CHUNKED else "none")
    assert vae.decode_chunking == ("exact" if name in BOTH_WAYS else "none")
    side = 32 if vae.spec.space_stride <= 16 else 64
    findings = list(examine(vae, height=side, width=side, groups=2 if name in WHOLE else 4 - vae.spec.lead_frames))
    assert {finding.direction for finding in findings} == {"encode", "decode"}
    assert [finding for finding in findings if finding.difference != 0.0] == []
    if name in BOTH_WAYS:
        assert sum("interleaved" in finding.name for finding in findings) == 2


@given(st.sets(st.integers(1, 4)), st.booleans())
@settings(max_examples=5, deadline=None)
def test_wan_gives_the_same_bits_for_any_partition(cuts, bf16):
    vae = tiny("wan-2.1", dtype=torch.bfloat16) if bf16 else tiny("wan-2.2")
    ends = sorted({*cuts, 5})
    video = noise(1, 3, 17, 32, 32)
    whole = encode_chunked(vae, video, [5], moments=True)
    assert torch.equal(encode_chunked(vae, video, ends, moments=True), whole)
    latent = whole[:, : vae.spec.latent_channels]
    assert torch.equal(decode_chunked(vae, latent, ends), decode_chunked(vae, latent, [5]))


STREAMS = ("ltx-2", "easyanimate", "vidtok")  # run by `causal_stream`


@given(st.sampled_from(STREAMS), st.sets(st.integers(1, 3)), st.booleans())
@settings(max_examples=6, deadline=None)
def test_causal_streams_give_the_same_bits_for_any_partition(name, cuts, bf16):
    vae = tiny(name, dtype=torch.bfloat16) if bf16 else tiny(name)
    video = clip(vae.spec, groups=3)
    whole = encode_chunked(vae, video, [4], moments=True)
    assert torch.equal(encode_chunked(vae, video, sorted({*cuts, 4}), moments=True), whole)
    if name in BOTH_WAYS:
        latent = whole[:, : vae.spec.latent_channels]
        assert torch.equal(decode_chunked(vae, latent, sorted({*cuts, 4})), decode_chunked(vae, latent, [4]))


@pytest.mark.parametrize("name", ["ltx-2", "vidtok"])
def test_a_chunk_in_one_step_is_equal_up_to_rounding(name, monkeypatch):
    """As on other devices than a CPU: any chunk, and the state after it."""
    vae = tiny(name)
    video = clip(vae.spec, groups=3)
    whole = encode_chunked(vae, video, [4], moments=True)
    monkeypatch.setattr(causal_stream, "_by_groups", lambda frames, group, first: [frames])
    for ends in ([4], [1, 4], [3, 4]):
        assert (encode_chunked(vae, video, ends, moments=True) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", ["wan-2.1", *STREAMS])
def test_states_of_different_steps_share_a_batch(name):
    """diffusers' caches have other shapes after their first step than later; the adapters' have not."""
    vae = tiny(name)
    stride = vae.spec.time_stride
    young, old = clip(vae.spec, groups=1, seed=1), clip(vae.spec, groups=2, seed=2)
    _, after_image = vae.encode(young[:, :, :1])
    _, after_more = vae.encode(old[:, :, : 1 + stride])
    assert after_image.nbytes == after_more.nbytes
    both = torch.cat([young[:, :, 1:], old[:, :, 1 + stride :]])
    mean = vae.encode(both, vae.stack_states([after_image, after_more]))[0].mean
    assert torch.equal(mean[:1], vae.encode(young)[0].mean[:, :, 1:])
    assert torch.equal(mean[1:], vae.encode(old)[0].mean[:, :, 2:])


@pytest.mark.parametrize("name", STREAMS)
def test_causal_streams_keep_nothing_on_their_modules(name):
    """diffusers' own EasyAnimate and VidTok keep frames on their layers."""
    vae = tiny(name)
    latent, _ = vae.encode(clip(vae.spec))
    vae.decode(latent.mean)
    kept = [
        (key, attribute)
        for key, layer in vae._coder.module.named_modules()
        for attribute, value in vars(layer).items()
        if isinstance(value, torch.Tensor)
    ]
    assert kept == []


@pytest.mark.parametrize(
    ("name", "change"),
    [("ltx-2", {"encoder_causal": False}), ("vidtok", {"is_causal": False, "num_res_blocks": 1})],
)
def test_configurations_that_see_later_frames_take_whole_clips(name, change):
    vae = model.load("diffusers", config={**TINY[name], **change}, untrained=0)
    assert (vae.spec.chunking, vae.decode_chunking, vae.spec.causal) == ("none", "none", False)
    video = clip(vae.spec, groups=3)
    latent, state = vae.encode(video)
    assert latent.mean.shape[2] == vae.spec.latent_frames(video.shape[2])
    assert vae.decode(latent.mean)[0].shape == video.shape
    prefix = vae.encode(video[:, :, : -vae.spec.time_stride])[0].mean
    assert (latent.mean[:, :, : prefix.shape[2]] - prefix).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"encodes whole clips, because {BOTH_SIDES}"):
        vae.encode(video[:, :, : vae.spec.time_stride], state)


@pytest.mark.parametrize("name", [*WHOLE, "svd", "ltx-2", "vidtok"])
def test_networks_for_whole_clips_refuse_chunks_with_the_reason(name):
    vae = tiny(name)
    video = clip(vae.spec)
    posterior, encoded = vae.encode(video)
    decoded_from = posterior.mean
    _, decoded = vae.decode(decoded_from)
    if name in WHOLE:
        because = WHOLE_CLIPS[TINY[name]["_class_name"]]
        with pytest.raises(ValueError, match=f"encodes whole clips, because {because}; pass every frame of a clip"):
            vae.encode(video[:, :, : vae.spec.time_stride], encoded)
    with pytest.raises(ValueError, match="decodes whole clips, because"):
        vae.decode(decoded_from, decoded)
    with pytest.raises(ValueError, match="decodes whole clips, because"):
        vae.decode(decoded_from, last=False)


@pytest.mark.parametrize("name", WHOLE)
def test_a_prefix_gives_the_prefix_exactly_for_causal_networks(name):
    """The latent of a prefix is a prefix of the latent exactly if the spec calls the network causal."""
    vae = tiny(name)
    video = clip(vae.spec, groups=3)
    whole = vae.encode(video)[0].mean
    prefix = vae.encode(video[:, :, : vae.spec.lead_frames + vae.spec.time_stride])[0].mean
    difference = (prefix - whole[:, :, : prefix.shape[2]]).abs().max()
    assert bool(difference < 1e-5) == vae.spec.causal
    assert vae.spec.causal or difference > 1e-3


def test_cogvideox_is_exact_only_between_batches_that_depend_on_the_length():
    module = tiny("cogvideox")._coder.module
    video = noise(1, 3, 17, 32, 32)
    with torch.no_grad():
        whole = module.encode(video).latent_dist.mode()
        head, cache = module.encoder(video[:, :, :9])
        tail, _ = module.encoder(video[:, :, 9:], conv_cache=cache)
        assert torch.equal(torch.cat([head, tail], dim=2)[:, :4], whole)
        # four frames less, and the first batch is of thirteen
        shorter = module.encode(video[:, :, :13]).latent_dist.mode()
    assert (shorter[:, :, :3] - whole[:, :, :3]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_a_batch_in_one_pass_is_equal_up_to_rounding(name):
    """On a CPU videos are processed one by one; on other devices together, which is equal up to rounding, states included."""
    vae, coder = tiny(name), tiny(name)._coder
    video = clip(vae.spec, batch=2)
    with torch.no_grad():
        first = vae.spec.lead_frames + vae.spec.time_stride if name in CHUNKED else video.shape[2]
        (mean, _), memory = coder.encode(video[:, :, :first], None)
        if first < video.shape[2]:
            (rest, _), _ = coder.encode(video[:, :, first:], memory or None)
            mean = torch.cat([mean, rest], dim=2)
        together, _ = coder.decode(mean, None)
    alone = vae.encode(video)[0].mean
    assert (mean - alone).abs().max() < 1e-5 * max(1, alone.abs().max())
    assert (together - vae.decode(mean)[0]).abs().max() < 1e-4 * max(1, together.abs().max())


def test_frames_of_image_networks_are_independent():
    vae = tiny("sd")
    video = clip(vae.spec, groups=4)
    assert torch.equal(vae.encode(video.flip(2))[0].mean.flip(2), vae.encode(video)[0].mean)


# ---- another diffusers than the one this was written with -------------------------------------------------------------


@pytest.fixture
def untested():
    """No stream was tested before, and none of those tested here is used after."""
    for tested in (wan_stream._tested_stream, causal_stream._difference):
        tested.cache_clear()
    yield
    for tested in (wan_stream._tested_stream, causal_stream._difference):
        tested.cache_clear()


def refused(reason, name="wan-2.1"):
    with pytest.warns(
        UserWarning, match=rf"encodes and decodes whole clips only: this adapter does not know how .*{reason}"
    ):
        vae = tiny.__wrapped__(name)
    assert (vae.spec.chunking, vae.decode_chunking) == ("none", "none")
    video = clip(vae.spec)
    latent, state = vae.encode(video)
    assert vae.decode(latent.mean)[0].shape == video.shape
    with pytest.raises(ValueError, match="encodes whole clips, because this adapter"):
        vae.encode(video[:, :, 1:], state)
    return latent.mean


def test_a_missing_cache_falls_back_to_whole_clips(untested, monkeypatch):
    monkeypatch.delattr("diffusers.models.autoencoders.autoencoder_kl_wan.patchify")
    vae = tiny("wan-2.1")
    assert torch.equal(refused("patchify"), vae.encode(clip(vae.spec))[0].mean)


def test_a_cache_with_another_meaning_falls_back_to_whole_clips(untested, monkeypatch):
    real = wan_stream.WanStream._encode_step
    monkeypatch.setattr(
        wan_stream.WanStream, "_encode_step", lambda self, frames, places: real(self, frames, [*places])
    )
    refused("latents differ|cache")


def test_a_growing_cache_falls_back_to_whole_clips(untested, monkeypatch):
    real, steps = wan_stream.WanStream._encode_step, itertools.count(1)

    def growing(self, frames, places):
        out = real(self, frames, places)
        places[0] = places[0][:, :, :1].expand(-1, -1, next(steps), -1, -1)
        return out

    monkeypatch.setattr(wan_stream.WanStream, "_encode_step", growing)
    refused("the cache still changes its shapes in step 3")


@pytest.mark.parametrize("name", STREAMS)
def test_layers_of_other_names_fall_back_to_whole_clips(name, untested, monkeypatch):
    mean = tiny(name).encode(clip(tiny(name).spec))[0].mean
    monkeypatch.setattr(causal_stream, "LAYERS", {})
    again = refused("look back in time", name)
    assert (again - mean).abs().max() < 1e-5 * mean.abs().max()


def test_layers_with_another_meaning_fall_back_to_whole_clips(untested, monkeypatch):
    def shifted(layer, frames, causal=True):
        return causal_stream._ltx2_convolution(layer, frames.roll(1, dims=2))

    monkeypatch.setitem(causal_stream.LAYERS, "LTX2VideoCausalConv3d", shifted)
    refused("latents differ by", "ltx-2")


def test_residual_wan_in_chunks_equals_the_class():
    """`first_chunk` matters only for the residual decoder of Wan 2.2."""
    vae = tiny("wan-2.2")
    module = vae._coder.module
    latent = noise(1, 4, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(vae.decode(latent)[0], module.decode(latent).sample)


def test_loading_by_a_preset_name_keeps_the_name():
    with pytest.raises(
        ValueError, match=r"needs weights: its published weights \(Apache-2.0\) are hf://Wan-AI/Wan2.1-T2V"
    ):
        model.load("wan-2.1")
