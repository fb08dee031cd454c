"""Out of memory in an encode step, as each library reports it: the step is halved, else one plain error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.encoder import Encoder
from pipeline.errors import ConfigError
from tests.engine.test_encoder import CONFIG, clip
from tests.model.test_out_of_memory import OTHERS, TEXTS

# One of each library; `tests/model/test_out_of_memory.py` has all wordings.
ERRORS = {
    "torch": torch.OutOfMemoryError(TEXTS[0]),
    "cuBLAS": RuntimeError(TEXTS[2]),
    "cuDNN": RuntimeError(TEXTS[4]),
    "module load": RuntimeError(TEXTS[7]),
    "host, torch": RuntimeError(TEXTS[-1]),
    "host, numpy": MemoryError("Unable to allocate 8.00 GiB for an array with shape (8000000000,)"),
}
everywhere = pytest.mark.parametrize("library", ERRORS)


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def undisturbed():
    chunks = [clip(seed, 1)[0] for seed in range(3)]
    return chunks, [result.mean_Cthw for result in Encoder(CONFIG, "cpu", "float32").encode(chunks, [None] * 3)]


def limited(encoder, monkeypatch, frames, error):
    """The encoder on a device that holds so many frames at a time."""
    real, sizes = encoder._vae.encode_planes, []

    def encode_planes(planes_BT3HW, *arguments, **options):
        if planes_BT3HW.shape[0] * planes_BT3HW.shape[1] > frames:
            raise error
        sizes.append(tuple(planes_BT3HW.shape[:2]))
        return real(planes_BT3HW, *arguments, **options)

    monkeypatch.setattr(encoder._vae, "encode_planes", encode_planes)
    return sizes


@everywhere
def test_step_is_halved_for_the_out_of_memory_error_of_any_library(library, undisturbed, monkeypatch):
    chunks, expected = undisturbed
    encoder = Encoder(CONFIG, "cpu", "float32", batch=8)
    frames = chunks[0].planes_T3HW.shape[0]
    sizes = limited(encoder, monkeypatch, frames, ERRORS[library])
    for mine, theirs in zip(encoder.encode(chunks, [None] * 3), expected, strict=True):
        np.testing.assert_array_equal(mine.mean_Cthw, theirs)
    assert sizes == [(1, frames)] * 3


@everywhere
def test_step_of_one_chunk_without_memory_is_one_plain_error(library, undisturbed, monkeypatch):
    encoder = Encoder(CONFIG, "cpu", "float32")
    limited(encoder, monkeypatch, 0, ERRORS[library])
    with pytest.raises(ConfigError, match=r"clips\.size: 32x40 does not fit into the device's memory") as caught:
        encoder.encode(undisturbed[0][:1], [None])
    assert "\n" not in str(caught.value)
    for word in ("GiB", "bytes", "CUBLAS", "CUDNN", "allocate", "capacity"):
        assert word not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("text", OTHERS[:3])
def test_other_failures_of_a_step_pass_unchanged(text, undisturbed, monkeypatch):
    encoder, error = Encoder(CONFIG, "cpu", "float32", batch=8), RuntimeError(text)
    limited(encoder, monkeypatch, 0, error)
    with pytest.raises(RuntimeError) as raised:
        encoder.encode(undisturbed[0], [None] * 3)
    assert raised.value is error
    assert encoder.largest_batch((True, 9, 32, 40)) == 8  # nothing was learned of memory
