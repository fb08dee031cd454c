"""Inputs that LeanVAE refuses, with messages that say what was got, what was expected and what fits."""

from __future__ import annotations

import warnings

import pytest
import torch

import model


def video(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (video(1, 3, 16, 16), ["(B, 3, T, H, W)", "(1, 3, 16, 16)", "video[:, :, None]"]),
        (video(1, 4, 5, 16, 16), ["(B, 3, T, H, W)", "(1, 4, 5, 16, 16)"]),
        (video(0, 3, 5, 16, 16), ["(B, 3, T, H, W)", "(0, 3, 5, 16, 16)"]),
        (video(1, 3, 16, 16, 16), ["4n+1 frames", "got 16", "13 or 17"]),
        (video(1, 3, 0, 16, 16), ["4n+1 frames", "got 0", "fit: 1"]),
        (video(1, 3, 5, 20, 16), ["multiples of 8", "height 20", "16 or 24"]),
        (video(1, 3, 5, 16, 31), ["multiples of 8", "width 31", "24 or 32"]),
        (video(1, 3, 5, 16, 4), ["multiples of 8", "width 4", "fit: 8"]),
        (video(1, 3, 5, 16, 16).to(torch.uint8), ["floating-point", "[-0.5, 0.5]", "torch.uint8", "encode_planes"]),
    ],
)
def test_encode_refuses_invalid_videos(vae, bad, words):
    with pytest.raises(ValueError, match="got") as caught:
        vae.encode(bad)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("frames", "fits"), [(5, "4 or 8"), (1, "fit: 4"), (0, "fit: 4")])
def test_later_chunks_have_4n_frames(vae, frames, fits):
    _, state = vae.encode(video(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="4n frames in every chunk after the first") as caught:
        vae.encode(video(1, 3, frames, 16, 16), state)
    assert f"got {frames}" in str(caught.value)
    assert fits in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (video(1, 4, 2, 2), ["(B, 4, t, h, w)", "(1, 4, 2, 2)"]),
        (video(1, 16, 1, 2, 2), ["(B, 4, t, h, w)", "(1, 16, 1, 2, 2)"]),
        (video(1, 4, 0, 2, 2), ["(B, 4, t, h, w)", "(1, 4, 0, 2, 2)"]),
        (video(1, 4, 1, 2, 2).to(torch.int32), ["floating-point latents", "torch.int32"]),
    ],
)
def test_decode_refuses_invalid_latents(vae, bad, words):
    with pytest.raises(ValueError, match="got") as caught:
        vae.decode(bad)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_state_must_fit_the_chunk(vae, golden):
    other = model.load("leanvae", config=golden.config, untrained=1)
    double = model.from_state_dict("leanvae", golden.config, golden.weights, dtype="float64")
    chunk = video(2, 3, 4, 16, 24)
    states = {
        "batch 1": vae.encode(video(1, 3, 1, 16, 24))[1],
        "grid 2x2": vae.encode(video(2, 3, 1, 16, 16))[1],
        other.weights_sha256[:12]: other.encode(video(2, 3, 1, 16, 24))[1],
        "float64": double.encode(video(2, 3, 1, 16, 24))[1],
        "decode state": vae.decode(video(2, 4, 1, 2, 3))[1],
        "got str": "nonsense",
    }
    for got, state in states.items():
        with pytest.raises(ValueError, match=r"[Ss]tate") as caught:
            vae.encode(chunk, state)
        assert got in str(caught.value), str(caught.value)
        if got != "got str":
            assert "expected encode state" in str(caught.value)
            assert "batch 2, latent grid 2x3" in str(caught.value)
    with pytest.raises(ValueError, match="expected decode state"):
        vae.decode(video(2, 4, 1, 2, 3), vae.encode(video(2, 3, 1, 16, 24))[1])


def test_only_states_of_the_same_kind_stack(vae):
    small, wide = vae.encode(video(1, 3, 1, 16, 16))[1], vae.encode(video(1, 3, 1, 16, 24))[1]
    with pytest.raises(ValueError, match=r"cannot be stacked.*grid 2x3.*grid 2x2"):
        vae.stack_states([small, wide])
    with pytest.raises(ValueError, match="no states"):
        vae.stack_states([])


@pytest.mark.parametrize(
    ("low", "high", "cause"),
    [(0, 255, "0..255"), (0, 1, r"\[0, 1\]"), (-1, 1, r"\[-1, 1\]"), (-9, 1.5, "another scaling")],
)
def test_values_far_outside_warn_once_with_the_likely_cause(golden, low, high, cause):
    fresh = model.from_state_dict("leanvae", golden.config, golden.weights)
    wrong = torch.linspace(low, high, 3 * 5 * 16 * 16).reshape(16, 16, 3, 5).permute(2, 3, 0, 1)[None]
    with pytest.warns(UserWarning, match=cause):
        fresh.encode(wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.encode(wrong)


def test_values_a_little_outside_do_not_warn(golden):
    fresh = model.from_state_dict("leanvae", golden.config, golden.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.encode(torch.linspace(-0.7, 0.7, 3 * 16 * 16).reshape(1, 3, 1, 16, 16))


def test_latents_can_be_used_in_autograd(vae):
    """Latents are ordinary tensors, not inference tensors: a trainer may use them in a loss."""
    mean = vae.encode(video(1, 3, 1, 16, 16))[0].mean
    weight = torch.ones((), requires_grad=True)
    (mean * weight).sum().backward()
    assert weight.grad is not None


def test_sampling_needs_moments_and_a_generator(vae):
    posterior = vae.encode(torch.rand(1, 3, 1, 16, 16) - 0.5)[0]
    with pytest.raises(ValueError, match="moments=True"):
        posterior.sample(torch.Generator())
    posterior = vae.encode(torch.rand(1, 3, 1, 16, 16) - 0.5, moments=True)[0]
    first = posterior.sample(torch.Generator().manual_seed(7))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(7)))
    assert not torch.equal(first, posterior.mode())
