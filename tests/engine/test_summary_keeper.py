"""Cache of receipt summaries that a build keeps up to date: the next run reads no receipt again."""

from __future__ import annotations

import tempfile
import time

import pytest

import pipeline
from pipeline.engine.driver import build as build_module
from pipeline.engine.driver import summary_keeper
from pipeline.engine.driver.progress import Silent
from pipeline.engine.driver.summary_keeper import SummaryKeeper
from pipeline.errors import StorageUnavailable
from pipeline.format.layout import CURRENT
from pipeline.storage.local import LocalStore
from tests.pipeline.frameless_build import make_workspace
from tests.tiny_corpus import make_corpus, tiny_job

LIMIT_S = 120.0


class Watched(LocalStore):
    """Counts receipts that are read; its listings fail while it is `down`."""

    def __init__(self, root):
        super().__init__(root)
        self.read_receipts = 0
        self.down = False

    def read(self, key):
        self.read_receipts += key.startswith(CURRENT.receipts)
        return super().read(key)

    def list(self, prefix="", **options):
        if self.down:
            raise StorageUnavailable("host:9000 did not answer", uri=self.root)
        return super().list(prefix, **options)


def wait_for(condition):
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def cached(root):
    """Whether the output has a cache."""
    return next(iter(LocalStore(root).list(CURRENT.summaries)), None) is not None


@pytest.fixture(autouse=True)
def every_receipt_is_worth_a_cache(monkeypatch):
    monkeypatch.setattr("pipeline.ledger.summaries.MIN_UNCACHED_RECEIPTS", 1)


def test_a_refresh_that_fails_is_tried_again_and_leaves_no_folder(tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path)
    workspace.run("abcdef", "storage.files_per_shard=1").finish()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    store = Watched(workspace.store.root)
    store.down = True
    with SummaryKeeper(store, CURRENT, every_s=0.01) as keeper:
        wait_for(lambda: keeper.failure is not None)
        assert "did not answer" in keeper.failure
        assert not cached(store.root)
        store.down = False
        wait_for(lambda: cached(store.root) and keeper.failure is None)
    assert store.read_receipts == 6  # each once, however often it was refreshed
    assert list((tmp_path / "tmp").iterdir()) == []
    workspace.store = again = Watched(store.root)
    assert workspace.run("abcdef").todo == []
    assert again.read_receipts == 0


def test_receipts_of_a_build_are_cached_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_keeper, "EVERY_S", 0.02)
    monkeypatch.setattr(build_module, "SHOW_S", 0.0)
    corpus, output = make_corpus(tmp_path / "in", shards=2, samples=2), tmp_path / "out"
    seen = []

    class WaitsForTheCache(Silent):
        def update(self, progress):
            if progress.shards_done == 1 and not seen:
                wait_for(lambda: cached(str(output)))
                seen.append(progress)

    pipeline.encode(tiny_job(corpus, output, "engine.credit=1"), WaitsForTheCache())
    assert seen
