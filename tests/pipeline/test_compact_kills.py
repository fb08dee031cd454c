"""`lathe compact` killed at any point, and on S3: nothing is lost, nothing is shown twice, the next one completes."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from pipeline.config import DrillConfig
from pipeline.format.layout import COMPACTED, LEASES
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate import compact as compacting
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests import forked_command
from tests.conftest import S3Server
from tests.pipeline.compacted import make_history, rows_of
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, publish_all, shown_ids

POINT, MARKS = "LATHE_TEST_POINT", "LATHE_TEST_MARKS"
POINTS = ["in_upload", "after_upload", "before_manifest", "before_snapshot", "after_snapshot"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    make_history(folder)
    return folder / "out"


def arm() -> None:
    """In the process of the command: it dies at the point that its environment names."""
    drill = DrillConfig(point=os.environ[POINT], marker_dir=os.environ[MARKS])
    compacting.compact = partial(compacting.compact, failures=drill)


@pytest.mark.parametrize("point", POINTS)
def test_a_compaction_killed_anywhere_loses_and_doubles_nothing(made: Path, tmp_path: Path, point: str) -> None:
    shutil.copytree(made, tmp_path / "out")
    store = local_store(tmp_path / "out")
    expected = rows_of(store, Snapshots(store).latest())
    env = {**os.environ, POINT: point, MARKS: str(tmp_path / "marks")}
    killed = forked_command.run("compact", store.root, env=env, prepare=f"{__name__}:arm")
    assert killed.returncode == -9, killed.stderr
    numbers = Snapshots(store).numbers()
    assert numbers == ([1, 2, 3] if point == "after_snapshot" else [1, 2])
    assert rows_of(store, Snapshots(store).latest()) == expected
    assert verify_output(store).problems == []
    assert publish(store, PublishOptions()).made is False
    left = [key for key in store.keys("data/") if f"-{COMPACTED}" in key]
    assert bool(left) is (point != "in_upload")
    for key in list(store.keys(LEASES)):
        store.delete(key)  # as if its time had passed
    again = compact(store)
    assert (again.snapshot is None) is (point == "after_snapshot")
    assert rows_of(store, Snapshots(store).latest()) == expected
    assert verify_output(store).problems == []


@pytest.mark.s3
def test_on_s3_each_source_file_is_one_stream_and_rows_are_the_same(moto: S3Server, tmp_path: Path) -> None:
    store = open_store(f"{moto.root}/out", moto.config())
    Ledger(store).prepare("films")
    add_shards(store, tmp_path, range(3))
    before = publish_all(store, delta=False)
    asked: list[str] = []
    plain = store.open_stream

    def open_stream(key: str, **options: object) -> object:
        asked.append(key)
        return plain(key, **options)

    store.open_stream = open_stream
    found = compact(store, CompactOptions(delta=False))
    assert (found.files_before, found.files_after) == (3, 1)
    assert sorted(asked) == sorted(Snapshots(store).table(before, "files", ["key"])["key"].to_pylist())
    assert shown_ids(store, found.snapshot) == shown_ids(store, before)
    assert verify_output(store, snapshot=2).problems == []
