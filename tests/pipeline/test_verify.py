"""`verify_output` finds what is wrong, whatever it is, names the file, and says nothing when nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import WriteConfig
from pipeline.format.index import read_index, write_index
from pipeline.ledger.receipts import Ledger
from pipeline.operate.verify import VerifyReport, verify_output
from pipeline.records import Receipt
from pipeline.storage import Store
from tests.pipeline.latent_clips import latent_clip, local_store, write_shard

FORMATS = ("parquet", "tar")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


def build(store: Store, folder: Path, format: str = "parquet", shards: int = 3) -> list[Receipt]:
    """An output of `shards` shards with four clips each, committed."""
    ledger = Ledger(store)
    ledger.prepare("films")
    made = []
    for shard in range(shards):
        clips = [latent_clip(100 * shard + n) for n in range(4)]
        made.append(ledger.commit(write_shard(store, folder / "spool", WriteConfig(format=format), clips, shard=shard)))
    return made


def rewrite(store: Store, receipt: Receipt, **changes: object) -> None:
    """Puts a changed receipt in the place of a committed one."""
    store.write(f"_receipts/{receipt.shard_id}.json", replace(receipt, **changes).to_json())


def reported(report: VerifyReport) -> str:
    return "\n".join(f"{item.file} | {item.found} | {item.expected}" for item in report.problems)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("deep", [True, False])
def test_a_sound_output_is_ok(store: Store, tmp_path: Path, format: str, deep: bool) -> None:
    receipts = build(store, tmp_path, format)
    report = verify_output(store, deep=deep)
    assert report.ok, reported(report)
    assert (report.shards, report.files, report.rows, report.frames, report.orphans) == (3, 3, 12, 12 * 17, 0)
    assert report.notices == []
    indexes = sum(item.index_bytes for receipt in receipts for item in receipt.files)
    data = sum(item.num_bytes for receipt in receipts for item in receipt.files)
    assert report.bytes_read == indexes + (data if deep else 0)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


@pytest.mark.parametrize("format", FORMATS)
def test_any_flipped_byte_is_found(store: Store, tmp_path: Path, format: str) -> None:
    (receipt,) = build(store, tmp_path, format, shards=1)
    item = receipt.files[0]
    rows, _ = read_index(store.read(item.index_key))
    whole = store.read(item.key)
    inside = rows[2].latent_offset + 100
    for at in (0, inside, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        store.write(item.key, bytes(damaged))
        report = verify_output(store)
        assert f"{item.key} | sha256" in reported(report)
        assert (f"{item.key}#{rows[2].id} | hash" in reported(report)) == (at == inside or _within(rows[2], at))
    index = bytearray(store.read(item.index_key))
    index[len(index) // 2] ^= 1
    store.write(item.key, whole)
    store.write(item.index_key, bytes(index))
    for deep in (True, False):
        assert f"{item.index_key} | sha256" in reported(verify_output(store, deep=deep))


def _within(row: object, at: int) -> bool:
    return row.latent_offset <= at < row.latent_offset + row.latent_length


def lose_data(store: Store, receipt: Receipt) -> None:
    store.delete(receipt.files[0].key)


def lose_index(store: Store, receipt: Receipt) -> None:
    store.delete(receipt.files[0].index_key)


def cut_data(store: Store, receipt: Receipt) -> None:
    store.write(receipt.files[0].key, store.read(receipt.files[0].key)[:-100])


def empty_data(store: Store, receipt: Receipt) -> None:
    store.write(receipt.files[0].key, b"")


def unbalance(store: Store, receipt: Receipt) -> None:
    rewrite(store, receipt, counts=replace(receipt.counts, samples=99))


def break_receipt(store: Store, receipt: Receipt) -> None:
    store.write(f"_receipts/{receipt.shard_id}.json", b'{"format_version": 2}')


def wrong_rows(store: Store, receipt: Receipt) -> None:
    counts = replace(receipt.counts, samples=5, encoded=5, clips_planned=5, clips=5)
    rewrite(store, receipt, files=(replace(receipt.files[0], rows=5),), counts=counts)


def other_source(store: Store, receipt: Receipt) -> None:
    objects = (replace(receipt.shard.objects[0], etag="other"),)
    rewrite(store, receipt, shard=replace(receipt.shard, objects=objects))


def other_version(store: Store, receipt: Receipt) -> None:
    store.write("_latentset.json", b'{"format": "latentset", "format_version": 9}')


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_data, "parquet | no such file"),
        (lose_index, ".idx | no such file"),
        (cut_data, "cannot be read as Parquet"),
        (empty_data, "parquet | 0 bytes"),
        (unbalance, "counts do not reconcile"),
        (break_receipt, "cannot be read as a receipt"),
        (wrong_rows, "parquet | 4 rows | 5 rows"),
        (wrong_rows, ".idx | rows: 4 | 5"),
        (other_source, "from its sources and fingerprint"),
        (other_version, "latentset.json | the output holds format version 9"),
    ],
)
def test_damage_is_named(
    store: Store, tmp_path: Path, damage: Callable[[Store, Receipt], None], words: str, deep: bool
) -> None:
    receipts = build(store, tmp_path)
    damage(store, receipts[1])
    report = verify_output(store, deep=deep)
    assert not report.ok
    assert words in reported(report)
    assert report.shards == (2 if damage is break_receipt else 3)  # the others are checked all the same


def test_an_index_that_points_elsewhere_is_found(store: Store, tmp_path: Path) -> None:
    """Even where its own hash is right: as if the writer had computed a wrong offset."""
    import hashlib

    (receipt,) = build(store, tmp_path, shards=1)
    item = receipt.files[0]
    rows, metadata = read_index(store.read(item.index_key))
    rows[1] = replace(rows[1], latent_offset=rows[1].latent_offset + 2)
    rows[3] = replace(rows[3], latent_offset=item.num_bytes - 10)
    write_index(tmp_path / "i", rows, metadata)
    data = (tmp_path / "i").read_bytes()
    store.write(item.index_key, data)
    rewrite(
        store, receipt, files=(replace(item, index_sha256=hashlib.sha256(data).hexdigest(), index_bytes=len(data)),)
    )
    report = verify_output(store)
    assert f"#{rows[1].id} | hash" in reported(report)
    assert f"#{rows[3].id} | the file ends at byte {item.num_bytes}" in reported(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_that_are_not_finite_are_found(store: Store, tmp_path: Path, dtype: str) -> None:
    """As a writer without checks would have left them: hashes agree, values are infinite."""
    from pipeline import writer

    Ledger(store).prepare("films")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "measure", lambda *_, **__: write_shard_stats())
        bad = {"float16": np.float16(np.inf), "bfloat16": np.uint16(0xFF80), "float32": np.float32(np.nan)}[dtype]
        array = latent_clip(1, dtype=dtype).latent_CTHW
        array[3, 4, 7, 5] = bad
        clips = [latent_clip(0, dtype=dtype), latent_clip(1, dtype=dtype, array=array)]
        Ledger(store).commit(write_shard(store, tmp_path / "s", WriteConfig(dtype=dtype), clips))
    assert "1 values NaN or infinite | finite values" in reported(verify_output(store))
    assert verify_output(store, deep=False).ok


def write_shard_stats() -> object:
    from pipeline.records import ChannelStats

    return ChannelStats(1, (0.0,), (0.0,), (0.0,), (0.0,))


def test_ids_in_two_shards_are_found(store: Store, tmp_path: Path) -> None:
    ledger = Ledger(store)
    ledger.prepare("films")
    for shard, numbers in enumerate(([1, 2, 3], [4, 5], [3, 6, 1])):
        clips = [latent_clip(n) for n in numbers]
        ledger.commit(write_shard(store, tmp_path / "s", WriteConfig(), clips, shard=shard))
    report = verify_output(store, deep=False)
    assert sorted(item.found.split(" also")[0] for item in report.problems) == [
        "id video00001-0000",
        "id video00003-0000",
    ]


def test_many_doubled_ids_are_listed_in_part(store: Store, tmp_path: Path) -> None:
    ledger = Ledger(store)
    ledger.prepare("films")
    for shard in range(2):
        ledger.commit(
            write_shard(store, tmp_path / "s", WriteConfig(), [latent_clip(n) for n in range(30)], shard=shard)
        )
    report = verify_output(store, deep=False)
    assert len(report.problems) == 21
    assert report.problems[-1].found == "10 more ids that occur twice"


def test_orphans_and_foreign_objects_are_notices(store: Store, tmp_path: Path) -> None:
    build(store, tmp_path)
    write_shard(store, tmp_path / "s", WriteConfig(), [latent_clip(900)], shard=9, attempt="lost")
    store.write("_receipts/notes.txt", b"hello")
    report = verify_output(store)
    assert report.ok
    assert (report.orphans, report.rows) == (2, 12)
    assert report.orphan_bytes > 0
    assert any("2 files" in notice and "no receipt names" in notice for notice in report.notices)
    assert any("_receipts/notes.txt" in notice for notice in report.notices)


def test_an_empty_folder_is_no_output(store: Store) -> None:
    report = verify_output(store)
    assert not report.ok
    assert "it has no _latentset.json" in reported(report)
