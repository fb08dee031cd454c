"""Publishing: what a snapshot records, what stops it, two publishers at once, a publisher killed at any point."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import WriteConfig
from pipeline.errors import InputError, OutputError, PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Check, Snapshot, Snapshots
from pipeline.operate.publish import Published, PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.status import status
from pipeline.operate.verify import verify_output
from pipeline.records import ChannelStats, Receipt
from pipeline.storage import Store
from tests.pipeline.frameless_build import NoConditions, visible
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard
from tests.pipeline.published import add_shards, listed, shown_ids


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def rewrite(store: Store, receipt: Receipt, **changes: object) -> None:
    store.write(Ledger(store).layout.receipt_key(receipt.shard_id), replace(receipt, **changes).to_json())


def test_a_snapshot_records_counts_statistics_and_lineage(store: Store, tmp_path: Path) -> None:
    receipts = add_shards(store, tmp_path, range(3))
    job = {"inputs": ["s3://corpus/"]}
    snapshot = publish(store, PublishOptions(job=job)).snapshot
    assert (snapshot.number, snapshot.parent, snapshot.counts["rows"], snapshot.counts["shards"]) == (1, None, 6, 3)
    assert snapshot.counts["bytes"] == sum(item.num_bytes for receipt in receipts for item in receipt.files)
    assert snapshot.buckets["v17x64x48"]["frames"] == 6 * 17
    (made,) = snapshot.fingerprints.values()
    merged = receipts[0].stats.merge(receipts[1].stats).merge(receipts[2].stats)
    assert made.stats.n == merged.n
    for name in ("mean", "m2", "min", "max"):
        assert getattr(made.stats, name) == pytest.approx(getattr(merged, name), rel=1e-9)
    assert made.constants["scale"] == 0.5
    assert snapshot.lineage["job"] == job
    assert {check.name for check in snapshot.checks} == {
        "conservation",
        "files",
        "rejects",
        "finite",
        "drift",
        "constants",
    }
    assert all(check.ok for check in snapshot.checks)
    assert Snapshots(store).read(1) == snapshot == Snapshot.from_json(snapshot.to_json())


def test_a_second_publish_adds_new_receipts_and_reads_no_others(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_shards(store, tmp_path, range(3))
    first = publish(store, PublishOptions())
    monkeypatch.setattr("pipeline.ledger.summaries.MIN_UNCACHED_RECEIPTS", 1)
    again = publish(store, PublishOptions())
    assert (again.made, again.snapshot) == (False, first.snapshot)
    (new,) = add_shards(store, tmp_path, range(3, 4))
    read = []
    plain = Ledger.load
    monkeypatch.setattr(Ledger, "load", lambda self, key: (read.append(key), plain(self, key))[1])
    second = publish(store, PublishOptions()).snapshot
    assert {key for key in read if new.shard_id not in key} == set()
    assert (second.number, second.parent, second.counts["rows"]) == (2, 1, 8)
    assert second.changes["inputs_added"] == 1
    assert shown_ids(store, Snapshots(store).read(1)) == shown_ids(store, first.snapshot)


def test_status_of_a_published_output_reads_only_pending_receipts(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_shards(store, tmp_path, range(3))
    publish(store, PublishOptions())
    (new,) = add_shards(store, tmp_path, range(3, 4))
    read = []
    plain = Ledger.load
    monkeypatch.setattr(Ledger, "load", lambda self, key: (read.append(key), plain(self, key))[1])
    listed = []
    plain_list = type(store).list
    monkeypatch.setattr(
        type(store),
        "list",
        lambda self, prefix="", **options: (listed.append(prefix), plain_list(self, prefix, **options))[1],
    )
    found = status(store)
    assert [key for key in read if new.shard_id not in key] == []
    assert [prefix for prefix in listed if prefix.startswith("_receipts")] == [], (
        "names are enough: no size is asked for"
    )
    assert (found["shards"], found["clips"], found["snapshot"]["number"]) == (3, 6, 1)
    assert (found["pending"]["shards"], found["pending"]["clips"]) == (1, 2)
    publish(store, PublishOptions())
    assert (status(store)["clips"], status(store)["pending"]) == (8, None)
    assert (status(store, 1)["clips"], status(store, 1)["snapshot"]["number"]) == (6, 1)


# --- what stops it -----------------------------------------------------------------------------------------------------


def lose_file(store: Store, receipts: list[Receipt]) -> None:
    store.delete(receipts[1].files[0].key)


def lose_index(store: Store, receipts: list[Receipt]) -> None:
    store.delete(receipts[1].files[0].index_key)


def cut_file(store: Store, receipts: list[Receipt]) -> None:
    store.write(receipts[1].files[0].key, store.read(receipts[1].files[0].key)[:-9])


def unbalance(store: Store, receipts: list[Receipt]) -> None:
    rewrite(store, receipts[1], counts=replace(receipts[1].counts, samples=99))


def not_finite(store: Store, receipts: list[Receipt]) -> None:
    stats = receipts[1].stats
    rewrite(store, receipts[1], stats=replace(stats, max=(float("inf"), *stats.max[1:])))


def too_many_damaged(store: Store, receipts: list[Receipt]) -> None:
    from pipeline.records import Reject

    rejects = tuple(Reject(f"x{n}", "decode", "undecodable", "broken", policy=False) for n in range(3))
    counts = replace(receipts[1].counts, samples=5, rejected=3, damaged=3)
    rewrite(store, receipts[1], counts=counts, rejects=rejects)


def absurd_scale(store: Store, receipts: list[Receipt]) -> None:
    for receipt in receipts:
        stats = receipt.stats
        rewrite(store, receipt, stats=replace(stats, m2=tuple(1e4 * value for value in stats.m2)))


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (lose_file, "files", "1 file is missing, such as data/"),
        (lose_index, "files", "1 file is missing, such as _index/"),
        (cut_file, "files", "1 file has another size"),
        (unbalance, "conservation", "samples=99"),
        (not_finite, "finite", "1 receipt has statistics that are not finite"),
        (too_many_damaged, "rejects", "3 of 9 inputs are damaged (33.3%), the limit is 5.0%"),
        (absurd_scale, "constants", "expected about 0 and 1, within a factor of 4"),
    ],
)
def test_each_check_fails_on_an_output_damaged_in_its_way(store: Store, tmp_path: Path, damage, check, words) -> None:
    damage(store, add_shards(store, tmp_path, range(3)))
    with pytest.raises(PublishFailed) as caught:
        publish(store, PublishOptions())
    assert f"{check}: " in str(caught.value)
    assert words in str(caught.value)
    assert {item.name for item in caught.value.checks if not item.ok} >= {check}
    assert caught.value.exit_code == 1
    assert list(store.list("_snapshots/")) == []


def moved(receipt: Receipt, *, by: float = 0.0, times: float = 1.0) -> dict[str, object]:
    stats = receipt.stats
    return {"stats": replace(stats, mean=tuple(m + by for m in stats.mean), m2=tuple(v * times for v in stats.m2))}


@pytest.mark.parametrize(
    ("change", "words"),
    [({"by": 2.0}, "mean of channel 0 moved by +"), ({"times": 9.0}, "std of channel 0 moved by +")],
)
def test_statistics_that_moved_against_the_parent_fail(store: Store, tmp_path: Path, change, words) -> None:
    add_shards(store, tmp_path, range(8))
    publish(store, PublishOptions())
    for receipt in add_shards(store, tmp_path, range(8, 16)):
        rewrite(store, receipt, **moved(receipt, **change))
    with pytest.raises(PublishFailed, match="1 of 6 checks failed: drift: ") as caught:
        publish(store, PublishOptions())
    assert words in str(caught.value)
    assert "standard errors" in str(caught.value)
    assert publish(store, PublishOptions(limits=Limits(drift=10.0))).snapshot.number == 2


def test_few_new_receipts_are_measured_and_not_judged(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(8))
    publish(store, PublishOptions())
    for receipt in add_shards(store, tmp_path, range(8, 10)):
        rewrite(store, receipt, **moved(receipt, by=3.0))
    snapshot = publish(store, PublishOptions()).snapshot
    (drift,) = [check for check in snapshot.checks if check.name == "drift"]
    assert (drift.ok, drift.judged) == (True, False)
    (numbers,) = [value for value in drift.numbers.values() if isinstance(value, dict)]
    assert numbers["mean"]["difference"][0] > 1


def test_a_failing_canary_publishes_nothing(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(1))
    asked = []

    def canary(_: Store, parts: list) -> Check:
        asked.extend(parts)
        return Check("canary", ok=False, message="clip a differs by 0.3", numbers={})

    with pytest.raises(PublishFailed, match=r"canary: clip a differs by 0\.3"):
        publish(store, PublishOptions(), canary=canary)
    assert len(asked) == 1
    assert Snapshots(store).numbers() == []


def test_open_inputs_stop_it_unless_partial(workspace: SimpleNamespace) -> None:
    Ledger(workspace.store).prepare("films")
    workspace.run("ab").finish()
    with pytest.raises(PublishFailed, match=r"4 shards or inputs are not done: .*c\.mp4.*--partial"):
        publish(workspace.store, PublishOptions(), listing=listed(workspace))
    found = publish(workspace.store, PublishOptions(partial=True), listing=listed(workspace))
    assert [Path(name).name for name in found.snapshot.open_shards] == ["c.mp4", "d.mp4", "e.mp4", "f.mp4"]
    assert any("4 shards or inputs are not done" in notice for notice in found.notices)


def test_a_running_build_and_a_cut_off_receipt_are_open_shards(store: Store, tmp_path: Path) -> None:
    import time

    receipts = add_shards(store, tmp_path, range(2))
    layout = Ledger(store).layout
    alive = {
        "build": "b1",
        "running": True,
        "shards_total": 7,
        "shards_done": 2,
        "updated": time.time(),
        "every_s": 3e3,
        "started": 1,
    }
    store.write(layout.progress_key("b1"), json.dumps(alive).encode())
    with pytest.raises(PublishFailed, match="5 shards of the running build b1"):
        publish(store, PublishOptions())
    store.delete(layout.progress_key("b1"))
    store.write(layout.receipt_key(receipts[1].shard_id), b"")
    with pytest.raises(PublishFailed, match=f"receipt of shard {receipts[1].shard_id} \\(cut off\\)"):
        publish(store, PublishOptions())


def test_bad_input_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no receipt: nothing is encoded yet"):
        publish(store, PublishOptions())
    with pytest.raises(OutputError, match="not a latent set"):
        publish(local_store(tmp_path / "nowhere"), PublishOptions())
    add_shards(store, tmp_path, range(1))
    with pytest.raises(InputError, match="no receipt of fingerprint 0000"):
        publish(store, PublishOptions(fingerprint="0000"))
    with pytest.raises(InputError, match="--removed drop needs the inputs"):
        publish(store, PublishOptions(removed="drop"))
    with pytest.raises(InputError, match="has no snapshot 3; nothing is published yet"):
        Snapshots(store).read(3)
    publish(store, PublishOptions())
    with pytest.raises(InputError, match=r"has no snapshot 3; there are 1$"):
        Snapshots(store).read(3)
    store.write("_snapshots/2.json", b"null")
    with pytest.raises(OutputError, match="expected a JSON object, got NoneType"):
        Snapshots(store).latest()
    store.write("_snapshots/2.json", b'{"format": "latentset-snapshot", "format_version": 9}')
    with pytest.raises(OutputError, match="format version 9, this Lathe reads 1"):
        Snapshots(store).latest()


def test_a_lost_receipt_does_not_drop_rows_without_a_word(store: Store, tmp_path: Path) -> None:
    first, _ = add_shards(store, tmp_path, range(2))
    publish(store, PublishOptions())
    for key in [info.key for prefix in ("_receipts/", "_summaries/") for info in store.list(prefix)]:
        if first.shard_id in key or key.startswith("_summaries/"):
            store.delete(key)
    with pytest.raises(
        PublishFailed,
        match=f"1 receipt is gone from .* or cut off although covered by snapshot 1, such as that of shard {first.shard_id}",
    ):
        publish(store, PublishOptions())
    assert Snapshots(store).numbers() == [1]


def test_a_fingerprint_may_be_chosen(store: Store, tmp_path: Path) -> None:
    (receipt,) = add_shards(store, tmp_path, range(1))
    files = write_shard(store, tmp_path / "spool", WriteConfig(), [latent_clip(1), latent_clip(2)], shard=7).files
    other = replace(receipt, fingerprint="ab" * 16, shard_id=receipt.shard.id("ab" * 16), files=files)
    Ledger(store).commit(other)
    assert set(publish(store, PublishOptions(fingerprint="ab")).snapshot.fingerprints) == {"ab" * 16}
    both = publish(store, PublishOptions()).snapshot
    assert set(both.fingerprints) == {receipt.fingerprint, "ab" * 16}


# --- two at once, and killed -------------------------------------------------------------------------------------------


def test_of_two_publishers_at_once_one_wins_and_the_other_says_so(store: Store, tmp_path: Path) -> None:
    add_shards(store, tmp_path, range(3))
    meet, results = threading.Barrier(2), []

    def canary(_: Store, __: list) -> Check:
        meet.wait(60)  # both have gathered what to publish before either makes it visible
        return Check("canary", ok=True, message="")

    def run(number: int) -> None:
        try:
            results.append(publish(store, PublishOptions(job={"run": number}), canary=canary))
        except PublishFailed as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [item for item in results if isinstance(item, Published)]
    (lost,) = [item for item in results if isinstance(item, PublishFailed)]
    assert "another publisher was first: snapshot 1 of" in str(lost)
    assert Snapshots(store).latest() == won.snapshot
    assert shown_ids(store, won.snapshot) == sorted(row.id for row in visible(store))
    assert publish(store, PublishOptions()).made is False


PUBLISHER = """
import sys
from pipeline.config import DrillConfig
from pipeline.operate.publish import PublishOptions, publish
from pipeline.storage.local import LocalStore
publish(LocalStore(sys.argv[1]), PublishOptions(), failures=DrillConfig(point=sys.argv[2], marker_dir=sys.argv[3]))
"""


@pytest.mark.parametrize(
    ("point", "expected"), [("before_manifest", [1, 2]), ("before_snapshot", [1, 2]), ("after_snapshot", [1, 2])]
)
def test_a_publisher_killed_anywhere_leaves_whole_snapshots(
    store: Store, tmp_path: Path, point: str, expected: list[int]
) -> None:
    add_shards(store, tmp_path, range(2))
    first = publish(store, PublishOptions()).snapshot
    add_shards(store, tmp_path, range(2, 4))
    command = [sys.executable, "-c", PUBLISHER, store.root, point, str(tmp_path / "marks")]
    assert subprocess.run(command, timeout=250).returncode == -9
    assert Snapshots(store).numbers() == (expected if point == "after_snapshot" else [1])
    assert Snapshots(store).read(1) == first
    assert verify_output(store, snapshot=1).ok
    after = publish(store, PublishOptions())
    assert after.made is (point != "after_snapshot")
    assert Snapshots(store).numbers() == expected
    assert shown_ids(store, after.snapshot) == sorted(row.id for row in visible(store))


def test_an_empty_record_is_no_snapshot_and_its_number_is_not_used_again(store: Store, tmp_path: Path) -> None:
    """What a kill leaves on a mount without hard links."""
    add_shards(store, tmp_path, range(1))
    store.write("_snapshots/1.json", b"")
    assert Snapshots(store).latest() is None
    assert publish(store, PublishOptions()).snapshot.number == 2


def test_a_store_without_conditional_writes_is_named(tmp_path: Path) -> None:
    store = NoConditions(str(tmp_path / "out"))
    Ledger(store).prepare("films")
    add_shards(store, tmp_path, range(1))
    assert any("cannot refuse a second publisher" in notice for notice in publish(store, PublishOptions()).notices)


def test_statistics_of_constant_receipts_do_not_drift(store: Store, tmp_path: Path) -> None:
    """Standard errors of zero do not lead to a division by zero."""
    same = ChannelStats(480, (1.0,) * 4, (480.0,) * 4, (1.0,) * 4, (1.0,) * 4)
    add_shards(store, tmp_path, range(8), stats=same)
    publish(store, PublishOptions())
    add_shards(store, tmp_path, range(8, 16), stats=same)
    assert publish(store, PublishOptions()).snapshot.number == 2
