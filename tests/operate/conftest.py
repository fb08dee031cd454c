"""Fixtures of tests of `lathe gc`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.ledger.receipts import Ledger
from pipeline.storage import Store
from tests.operate.outputs import aged, write_version
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import publish_all


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars a (2 clips), b (2), and three snapshots: b is replaced in the second, c (1) comes in the third. All is three days old."""
    folder = tmp_path_factory.mktemp("gc")
    store = local_store(folder / "out")
    Ledger(store).prepare("films")
    write_version(store, folder, "a", "e1", (0, 1))
    write_version(store, folder, "b", "e1", (10, 11))
    publish_all(store)
    write_version(store, folder, "b", "e2", (12, 13))
    publish_all(store)
    write_version(store, folder, "c", "e1", (20,))
    publish_all(store)
    aged(store)
    return folder / "out"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    shutil.copytree(made, tmp_path / "out")
    return local_store(tmp_path / "out")
