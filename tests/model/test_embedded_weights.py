"""The weights that ship with Lathe: loaded by name, consistent with their card, better than principal components on unseen clips."""

from __future__ import annotations

import json

import pytest
import torch

import model
from model import registry
from model.checkpoint import EMBEDDED
from model.losslessness import examine
from model.training.linear import fit_linear
from model.training.recipe import load_recipe, training_recipe
from pipeline.synthetic_videos.source import SyntheticSource

NAME = "leanvae-mini-dim16"
FOLDER = EMBEDDED / NAME
UNSEEN = 10**6  # the run saw clips from 0 on


@pytest.fixture(scope="module")
def vae():
    return model.load(NAME)


def clips(numbers, seed=0):
    for number in numbers:
        yield SyntheticSource(seed).clip(number, 17, 96, 96).video_CTHW[None].float() / 255 - 0.5


def psnr(ours, original):
    return float(-10 * (ours.clamp(-0.5, 0.5) - original).square().mean().log10())


def test_unseen_clips_are_reconstructed_better_than_by_principal_components(vae):
    """The bar for real clips is 1.5 dB; `benchmarks/quality.py` measures them."""
    linear = fit_linear(clips(range(24)), 16)
    gains = []
    for video in clips(range(UNSEEN, UNSEEN + 6)):
        decoded, _ = vae.decode(vae.encode(video)[0].mean)
        gains.append(psnr(decoded, video) - psnr(linear.decode(linear.encode(video)), video))
    assert sum(gains) / len(gains) > 1.5
    assert min(gains) > 0


def test_provenance_is_recorded(vae):
    assert vae.checkpoint.uri == f"embedded://{NAME}"
    assert not vae.untrained
    assert model.load(NAME, registry.PRESETS[NAME].published).weights_sha256 == vae.weights_sha256
    assert "not for production" in registry.card(NAME)["note"]


def test_latents_have_the_stated_statistics(vae):
    spec = vae.spec
    latents = torch.cat([vae.encode(video)[0].mean for video in clips(range(UNSEEN, UNSEEN + 12))])
    normal = (latents - torch.tensor(spec.mean).view(1, -1, 1, 1, 1)) / torch.tensor(spec.std).view(1, -1, 1, 1, 1)
    assert normal.mean().abs() < 0.15
    assert 0.7 < normal.std() < 1.3


def test_chunks_are_lossless(vae):
    assert all(finding.difference == 0 for finding in examine(vae, height=32, width=32))


def test_card_and_recipe_ship_with_the_weights():
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert json.loads((FOLDER / "config.json").read_text()) == registry.complete(NAME)
    run = json.loads((FOLDER / "run.json").read_text())
    assert training_recipe(run["recipe"]) == load_recipe("leanvae-mini")
    assert run["loss"][-1]["step"] == load_recipe("leanvae-mini").steps
    card = (FOLDER / "README.md").read_text()
    for text in ("never seen a real video", "not for production", "seed 0"):
        assert text in card
