"""`lathe gc` when inputs come back, and when an older snapshot shows rows of a receipt only in a compacted file."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.format.layout import RETIRED
from pipeline.ledger.receipts import Ledger
from pipeline.operate.compact import compact
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.takedown import take_down
from pipeline.operate.verify import verify_output
from pipeline.records import Counts, Receipt
from pipeline.storage import Store
from tests.operate.outputs import (
    NEWEST,
    aged,
    files_of,
    receipt_for,
    shown,
    stored,
    tar,
    write_version,
)
from tests.pipeline.latent_clips import FINGERPRINT
from tests.pipeline.published import publish_all


def retired_and_deleted(store: Store) -> Receipt:
    """The receipt of the first version of `b`, after two gcs: retired, its files deleted."""
    old = receipt_for(store, "b")
    collect(store, NEWEST)
    aged(store, keys=store.keys(RETIRED))
    collect(store, NEWEST)
    assert not files_of(old) & stored(store)
    return old


def encode_again(store: Store, folder: Path) -> Receipt:
    """Another attempt at the first version of `b`, published."""
    made = write_version(store, folder, "b", "e1", (10, 11), attempt="a9")
    publish_all(store, listing=[tar("b", "e1").objects[0]])
    assert {"video00010-0000", "video00011-0000"} <= shown(store)
    return made


def test_an_input_that_was_encoded_again_keeps_its_new_receipt(store: Store, tmp_path: Path) -> None:
    """The receipt of the earlier attempt stays retired: its files are deleted, and as the earlier one it would count."""
    retired_and_deleted(store)
    made = encode_again(store, tmp_path)
    aged(store)
    expected = shown(store)
    assert collect(store, NEWEST)["receipts"] == {"retired": 1, "restored": 0}, "the second version retires"
    assert Ledger(store).read(made.shard_id) == made
    write_version(store, tmp_path, "e", "e1", (40,))
    publish_all(store)
    assert shown(store) == expected | {"video00040-0000"}
    compact(store)
    assert shown(store) == expected | {"video00040-0000"}
    assert verify_output(store).problems == []


def test_a_retired_receipt_does_not_stand_for_the_lost_one_of_another_attempt(store: Store, tmp_path: Path) -> None:
    retired_and_deleted(store)
    made = encode_again(store, tmp_path)
    store.delete(Ledger(store).layout.receipt_key(made.shard_id))
    aged(store)
    with pytest.raises(OutputError, match=f"nothing was deleted: 1 receipts .* such as .*{made.shard_id}"):
        collect(store, NEWEST)


def test_an_unchanged_input_does_not_bring_a_receipt_back_whose_files_are_deleted(store: Store, tmp_path: Path) -> None:
    """A build found the bytes of the first version again. The receipt that names it stands for nothing, the input is encoded again."""
    old = retired_and_deleted(store)
    shard = tar("b", "e3")
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    named = {"shard": shard, "shard_id": shard.id(FINGERPRINT), "same_as": {shard.objects[0].uri: old.shard_id}}
    Ledger(store).commit(replace(old, **named, created=now, files=(), counts=Counts(), stats=None))
    assert collect(store, NEWEST)["receipts"] == {"retired": 0, "restored": 0}
    assert Ledger(store).read(old.shard_id) is None
    publish_all(store)
    assert verify_output(store).problems == []


def test_a_receipt_stays_while_a_kept_snapshot_shows_its_rows_in_a_compacted_file(store: Store) -> None:
    """A takedown finds rows of every kept snapshot by their receipt."""
    dropped = receipt_for(store, "a")
    (source,) = dropped.shard.objects
    compact(store)
    publish_all(store, listing=[tar("b", "e2").objects[0], tar("c", "e1").objects[0]], removed="drop")
    aged(store)
    two = GcOptions(keep_snapshots=2, keep_days=0)
    collect(store, two)
    assert receipt_for(store, "a") == dropped
    assert {"video00000-0000", "video00001-0000"} <= shown(store, 4)
    taken = take_down(store, [source.uri], reason="asked", by="ann")
    assert (taken["snapshots"], taken["stored"]) == ({4: 2, 5: 0}, {"rows": 2, "files": 1})
    assert not {"video00000-0000", "video00001-0000"} & shown(store, 4)
