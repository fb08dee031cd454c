"""A preview whose clip does not fit into memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import model
from pipeline.encoder.network import network_of
from pipeline.errors import ConfigError
from pipeline.format.index import IndexRow
from pipeline.look.showing import LatentDecoder
from pipeline.look.stored import StoredClip
from tests.model.test_out_of_memory import OTHERS, TEXTS
from tests.tiny_corpus import TINY_NETWORK

ROW = IndexRow("x", 0, 0, 0, "", None, None, None, (4, 2, 4, 4), "float32", "5x32x32", 5, "u", "k", "", None)


@pytest.fixture(scope="module")
def screen():
    found = network_of(model.load("leanvae", config=TINY_NETWORK, untrained=0).identity(), moments=False)
    return LatentDecoder({**found.identity, "checkpoint": found.provenance}, None, "cpu")


def show(screen, error, monkeypatch):
    def decode(*arguments, **options):
        raise error

    monkeypatch.setattr(screen.vae, "decode", decode)
    return screen.show(StoredClip(None, None, ROW), np.zeros((4, 2, 4, 4), "<f4").tobytes(), None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(TEXTS[0]), RuntimeError(TEXTS[2]), MemoryError()], ids=str)
def test_a_clip_that_does_not_fit_names_the_clip_and_the_device(screen, error, monkeypatch):
    with pytest.raises(ConfigError, match=r"clip x \(5x32x32\) does not fit into the memory of cpu") as said:
        show(screen, error, monkeypatch)
    assert "GiB" not in str(said.value)


def test_other_failures_pass_unchanged(screen, monkeypatch):
    error = RuntimeError(OTHERS[0])
    with pytest.raises(RuntimeError) as raised:
        show(screen, error, monkeypatch)
    assert raised.value is error
