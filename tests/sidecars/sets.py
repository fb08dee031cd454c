"""Sidecar sets of small tensors, written without an encoder, for tests of what reads them."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path

import numpy as np

from pipeline.sidecars.description import SidecarSet, TensorKind, create_set
from pipeline.sidecars.names import BY_CAPTION, BY_ID, key_of, unit_of
from pipeline.sidecars.receipts import SidecarReceipt, SidecarReceipts
from pipeline.sidecars.storing import store_unit
from pipeline.sidecars.versions import Coverage, SetVersion, SetVersions
from pipeline.storage import Store
from tests.loader.outputs import Output
from tests.pipeline.latent_clips import local_store

WIDTH = 6
TEXT = SidecarSet(
    "t5",
    BY_CAPTION,
    {"embedding": TensorKind("bfloat16", (None, WIDTH)), "pooled": TensorKind("float32", (WIDTH,))},
    {"encoder": "made up"},
)
BYTES = SidecarSet("pixels", BY_ID, {"embedding": TensorKind("float16", (2, WIDTH))}, {"encoder": "by id"})


def values_of(text: str, *, tokens: int | None = None) -> dict[str, np.ndarray]:
    """Tensors of a text for `TEXT`, functions of it: one token a word and one more; float32 values that bfloat16 holds exactly."""
    digest = hashlib.blake2b(text.encode()).digest()
    count = len(text.split()) + 1 if tokens is None else tokens
    rng = np.random.default_rng(list(digest[:8]))
    return {
        "embedding": rng.integers(-100, 100, (count, WIDTH)).astype(np.float32),
        "pooled": rng.integers(-100, 100, WIDTH).astype(np.float32),
    }


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    return (values.view("<u4") >> 16).astype("<u2") if dtype == "bfloat16" else values.astype(np.dtype(dtype))


def write_unit(store: Store, texts: list[str], described: SidecarSet = TEXT, *, folder: Path) -> SidecarReceipt:
    """Writes one unit and commits it."""
    create_set(store, described)
    keys = [key_of(text) for text in texts]
    rows = []
    for key, text in zip(keys, texts, strict=True):
        values = values_of(text, tokens=None if described.key == BY_CAPTION else 2)
        tensors = {name: bits_of(values[name], kind.dtype) for name, kind in described.tensors.items()}
        rows.append((key, key.hex() if described.key == BY_CAPTION else text, tensors))
    return store_unit(store, described, unit_of(described.fingerprint, keys), uuid.uuid4().hex[:16], rows, folder)


def write_set(
    store: Store,
    units: list[list[str]],
    described: SidecarSet = TEXT,
    *,
    folder: Path,
    coverage: Coverage | None = None,
) -> SetVersion:
    """Writes units and makes a version of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for texts in units:
        write_unit(store, texts, described, folder=folder)
    return SetVersions(store, described.name).publish(coverage)


def receipts(store: Store, described: SidecarSet = TEXT) -> list[SidecarReceipt]:
    return SidecarReceipts(store, described.name).all()


def copied(output: Output, folder: Path) -> Output:
    """A copy of an output that was made once, for a test that changes it."""
    return Output(local_store(shutil.copytree(output.uri, folder / "out")), output.clips)
