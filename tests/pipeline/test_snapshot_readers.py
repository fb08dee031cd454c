"""Readers of a snapshot: by its number, after a takedown, compared with another."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import InputError, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.operate.diff import diff
from pipeline.operate.inspect import inspect_path
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.status import status
from pipeline.operate.verify import verify_output
from pipeline.storage import Store
from tests.pipeline.frameless_build import visible
from tests.pipeline.latent_clips import local_store
from tests.pipeline.published import add_shards, listed, publish_all, shown_ids


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def test_readers_take_a_snapshot_by_its_number(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(2))
    publish(store, PublishOptions())
    add_shards(store, tmp_path, range(2, 3))
    publish(store, PublishOptions())
    report = verify_output(store, snapshot=1)
    assert (report.ok, report.rows, report.files, report.shards) == (True, 4, 2, 2)
    found = inspect_path(f"{store.root}@1", None)
    assert (found["kind"], found["counts"]["rows"], found["number"]) == ("snapshot", 4, 1)
    (item,) = found["fingerprints"].values()
    assert item["latent"]["dtype"] == "float16"
    json.dumps(found)
    store.delete(receipts[0].files[0].key)
    assert not verify_output(store, snapshot=1).ok
    with pytest.raises(InputError, match="no snapshot 7; there are 1, 2"):
        verify_output(store, snapshot=7)


def test_a_takedown_hides_rows_of_old_snapshots_and_of_receipts(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(2))
    before = publish(store, PublishOptions()).snapshot
    gone, kept = visible(store)[0].id, len(visible(store)) - 1
    record_takedown(store, "asked", ids=[gone])
    assert gone not in shown_ids(store, before)
    assert [row.id for row in visible(store)].count(gone) == 0
    assert (status(store, 1)["clips"], verify_output(store, snapshot=1).rows) == (4, kept)
    after = publish(store, PublishOptions()).snapshot
    assert (after.counts["rows"], after.takedowns) == (kept, tuple(item.key for item in read_takedowns(store).records))
    assert after.counts["samples"] == before.counts["samples"]
    with pytest.raises(InputError, match="1 of 1 ids are not in"):
        record_takedown(store, "asked", ids=["nothing"])
    for name, data in (
        ("broken.json", b"{"),
        ("text.json", b'{"format_version": 1, "sources": "a.mp4", "samples": [], "rows": []}'),
        ("upper.JSON", b"{}"),
    ):
        store.write(f"_takedowns/{name}", data)
        with pytest.raises(OutputError, match=rf"_takedowns/{name} cannot be read as a takedown"):
            visible(store)
        store.delete(f"_takedowns/{name}")


def test_diff_names_what_was_added_replaced_and_dropped(workspace: SimpleNamespace) -> None:
    Ledger(workspace.store).prepare("films")
    workspace.run("abc").finish()
    publish_all(workspace.store)
    (workspace.folder / "a.mp4").write_bytes(b"another")
    (workspace.folder / "b.mp4").unlink()
    for name in "ef":
        (workspace.folder / f"{name}.mp4").unlink()
    workspace.run("acd").finish()
    publish_all(workspace.store, listing=listed(workspace), removed="drop")
    found = diff((workspace.store, 1), (workspace.store, 2))
    names = {what: [Path(uri).name for uri in uris] for what, uris in found["sources"].items()}
    assert names == {"added": ["d.mp4"], "replaced": ["a.mp4"], "re_encoded": [], "dropped": ["b.mp4"]}
    assert found["rows"] == {"added": 2, "dropped": 2}
    assert (len(found["files"]["added"]), len(found["files"]["changed"])) == (1, 1)


def test_diff_tells_sources_that_are_encoded_again_from_new_ones(workspace: SimpleNamespace) -> None:
    store, other = workspace.store, "e" * 32
    Ledger(store).prepare("films")
    workspace.run("abc").finish({"c": "undecodable"})
    publish_all(store, limits=Limits(reject_budget=1))
    workspace.run("abd", fingerprint=other).finish()
    publish_all(store)  # 2: a and b under a second fingerprint as well, d under that only
    publish_all(store, fingerprint="e")  # 3: only under that
    publish_all(store, fingerprint="f")  # 4: only under the first
    workspace.run("c", retry_rejects="undecodable").finish()
    (workspace.folder / "a.mp4").write_bytes(b"another")
    workspace.run("a").finish()
    publish_all(store, fingerprint="f")  # 5: c is encoded by a retry, a is replaced

    def names(first: int, second: int) -> dict[str, str]:
        found = diff((store, first), (store, second))["sources"]
        return {what: "".join(Path(uri).stem for uri in uris) for what, uris in found.items() if uris}

    assert names(1, 2) == {"added": "d", "re_encoded": "ab"}
    assert names(2, 3) == {"re_encoded": "ab"}
    assert names(3, 4) == {"re_encoded": "ab", "dropped": "d"}
    assert names(4, 5) == {"added": "c", "replaced": "a"}
    assert names(2, 5) == {"added": "c", "replaced": "a", "re_encoded": "b", "dropped": "d"}
    (key,) = [info.key for info in store.list("_index/")][:1]
    store.delete(key)
    with pytest.raises(OutputError, match=r"of snapshot . cannot be read: .*; see `lathe verify`"):
        diff((store, 1), (store, 3))
