"""Latents joined from pieces, in memory or spooled; bfloat16 bits as torch rounds them."""

import tracemalloc
import warnings

import numpy as np
import pytest
import torch

from pipeline.engine.worker import latent_spool
from pipeline.engine.worker.latent_spool import LatentSpool, to_storage


@pytest.mark.parametrize("memory_bytes", [1 << 30, 3000, 0])
@pytest.mark.parametrize("pieces", [[5], [1, 4, 4, 2], [3] * 20])
def test_pieces_are_joined_to_one_array(tmp_path, monkeypatch, memory_bytes, pieces):
    monkeypatch.setattr(latent_spool, "MEMORY_BYTES", memory_bytes)
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(4, sum(pieces), 6, 5)).astype(np.float16)
    spool = LatentSpool(tmp_path)
    start = 0
    for length in pieces:
        spool.append(whole[:, start : start + length])
        start += length
    latent = spool.finish()
    np.testing.assert_array_equal(latent, whole)
    assert latent.flags.c_contiguous
    assert list(tmp_path.iterdir()) == []  # nothing left under a name


def test_bfloat16_bits_are_rounded_as_torch_rounds():
    rng = np.random.default_rng(1)
    values = np.concatenate(
        [rng.normal(size=10_000) * 10.0 ** rng.integers(-30, 30, 10_000), [0.0, -0.0, 1.00390625, 3e38]]
    )
    values = values.astype(np.float32)
    bits = to_storage(values, "bfloat16")
    assert bits.dtype == np.uint16
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(bits, expected)


def test_nan_and_infinity_stay_so_when_stored():
    """CUDA writes NaN as 0x7FFFFFFF: rounded like a number, it overflows to zero."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800001, 0xFF800001, 0x7F800000, 0xFF800000], np.uint32)
    for dtype in ("bfloat16", "float16", "float32"):
        stored = to_storage(bits.view(np.float32), dtype)
        values = (stored.astype("<u4") << 16).view("<f4") if dtype == "bfloat16" else stored
        assert np.isnan(values).tolist() == [True] * 5 + [False] * 2
        assert np.isinf(values[5:]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(to_storage(np.float32([70_000.0]), "float16")).all()


def test_pieces_are_kept_outside_the_heap(tmp_path):
    # Between the temporaries of encode steps they would keep freed memory from being used again: long videos then cost more.
    spool = LatentSpool(tmp_path)
    piece = np.ones((16, 4, 32, 32), np.float16)
    spool.append(piece)
    tracemalloc.start()
    try:
        for _ in range(64):
            spool.append(piece)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < piece.nbytes
    assert spool.finish().shape == (16, 65 * 4, 32, 32)
