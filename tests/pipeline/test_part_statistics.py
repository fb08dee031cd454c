"""Statistics of a snapshot cover exactly its rows, also where other rows of their files are hidden."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli.snapshot_wording import stats_lines
from pipeline.config import WriteConfig
from pipeline.errors import OutputError, PublishFailed
from pipeline.format.index import read_index
from pipeline.ledger import part_statistics
from pipeline.ledger.part_statistics import measured, subtracted
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshot
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.statistics import statistics
from pipeline.records import ChannelStats
from pipeline.storage import Store
from tests.pipeline.latent_clips import bits_of, latent_clip, local_store, write_shard

SHAPE = (4, 5, 8, 6)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def clips_of(values: list[np.ndarray], dtype: str) -> list:
    return [latent_clip(n, array=bits_of(value, dtype), dtype=dtype) for n, value in enumerate(values)]


def commit(store: Store, folder: Path, values: list[np.ndarray], dtype: str = "float32"):
    return Ledger(store).commit(write_shard(store, folder / "spool", WriteConfig(dtype=dtype), clips_of(values, dtype)))


def random_latents(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(n, 1 + n, SHAPE).astype(np.float32) for n in range(count)]


def assert_statistics(snapshot: Snapshot, values: list[np.ndarray]) -> None:
    """Of exactly these latents."""
    (made,) = snapshot.fingerprints.values()
    together = np.concatenate([value.reshape(4, -1) for value in values], axis=1).astype(np.float64)
    assert made.stats is not None
    assert made.stats.n == together.shape[1]
    assert made.stats.mean == pytest.approx(together.mean(1))
    assert np.array(made.stats.m2) / made.stats.n == pytest.approx(together.var(1))
    assert made.stats.min == tuple(together.min(1))
    assert made.stats.max == tuple(together.max(1))


@pytest.mark.parametrize("hidden", [[0], [3], [1, 2], [0, 1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_statistics_are_those_of_the_rows_that_count(
    store: Store, tmp_path: Path, hidden: list[int], dtype: str
) -> None:
    values = random_latents(4)
    if dtype == "bfloat16":  # by truncation, as stored
        values = [(value.view("<u4") & 0xFFFF0000).view("<f4") for value in values]
    receipt = commit(store, tmp_path, values, dtype)
    rows = {row.source_key: row.id for row in read_index(store.read(receipt.files[0].index_key))[0]}
    record_takedown(store, "asked", ids=[rows[f"dir/video{n:05d}"] for n in hidden])
    snapshot = publish(store, PublishOptions(delta=False)).snapshot
    left = [value for n, value in enumerate(values) if n not in hidden]
    assert snapshot.counts["rows"] == len(left)
    if left:
        assert_statistics(snapshot, left)
    else:
        assert [item.stats for item in snapshot.fingerprints.values()] == [None]


def test_one_hidden_row_within_the_others_costs_one_latent(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = random_latents(3)
    values[0] = np.zeros(SHAPE, np.float32)  # neither least nor greatest anywhere
    receipt = commit(store, tmp_path, values)
    (first, *_) = read_index(store.read(receipt.files[0].index_key))[0]
    record_takedown(store, "asked", ids=[first.id])
    read = []
    plain = part_statistics._latent_stats
    monkeypatch.setattr(part_statistics, "_latent_stats", lambda *given: (read.append(given[2].id), plain(*given))[1])
    assert_statistics(publish(store, PublishOptions(delta=False)).snapshot, values[1:])
    assert read == [first.id]


def test_subtraction_inverts_merging_and_refuses_what_it_cannot_know() -> None:
    one = ChannelStats(4, (1.0, 5.0), (2.0, 8.0), (-9.0, -9.0), (9.0, 9.0))
    two = ChannelStats(3, (2.0, -1.0), (1.0, 3.0), (-1.0, -1.0), (1.0, 1.0))
    rest = subtracted(one.merge(two), two)
    assert rest is not None
    assert (rest.n, rest.min, rest.max) == (one.n, one.min, one.max)
    assert rest.mean == pytest.approx(one.mean)
    assert rest.m2 == pytest.approx(one.m2)
    assert subtracted(one.merge(two), one) is None  # the least value may be in either
    assert subtracted(two, two) is None


def test_a_row_that_is_not_finite_stops_publishing_until_it_is_taken_down(store: Store, tmp_path: Path) -> None:
    values = random_latents(3)
    receipt = commit(store, tmp_path, values)
    key = receipt.files[0].key
    first, second, _ = read_index(store.read(receipt.files[0].index_key))[0]
    broken = replace(receipt, stats=replace(receipt.stats, max=(float("inf"), *receipt.stats.max[1:])))
    store.write(Ledger(store).layout.receipt_key(receipt.shard_id), broken.to_json())
    with pytest.raises(PublishFailed, match="finite: 1 receipt has statistics that are not finite"):
        publish(store, PublishOptions(delta=False))
    record_takedown(store, "not finite", ids=[first.id])
    assert_statistics(publish(store, PublishOptions(delta=False)).snapshot, values[1:])
    assert not np.isfinite(measured(store, [(key, _with_nan(store, key, second))]).mean).all()


def _with_nan(store: Store, key: str, row):
    """The row, after its first value became NaN."""
    from pipeline.format.tensors import payload_hash

    data = bytearray(store.read(key))
    data[row.latent_offset : row.latent_offset + 4] = np.array([np.nan], "<f4").tobytes()
    store.write(key, bytes(data))
    latent = bytes(data[row.latent_offset : row.latent_offset + row.latent_length])
    return replace(row, latent_hash=payload_hash(latent))


def test_what_cannot_be_read_of_a_partly_hidden_receipt_fails_checks(store: Store, tmp_path: Path) -> None:
    receipt = commit(store, tmp_path, random_latents(3))
    (first, *_) = read_index(store.read(receipt.files[0].index_key))[0]
    record_takedown(store, "asked", ids=[first.id])
    index, file = receipt.files[0].index_key, receipt.files[0].key
    kept = {key: store.read(key) for key in (index, file)}

    def failing(words: str) -> None:
        with pytest.raises(PublishFailed, match=words) as caught:
            publish(store, PublishOptions(delta=False))
        assert {"conservation", "files"} == {check.name for check in caught.value.checks if not check.ok}
        with pytest.raises(OutputError, match="1 receipts are wrong, such as: the rows that count are not known"):
            statistics(store)

    store.delete(index)
    failing(f"1 receipt does not add up, .*the rows that count are not known: .*{index}.*files: 1 file is missing")
    store.write(index, kept[index][::-1])
    failing(f"{index} cannot be read as a side index: .*files: 1 file is damaged")
    store.write(index, kept[index])
    store.delete(file)
    failing("files: 1 file is missing")
    store.write(file, kept[file][::-1])
    failing("the latent has the hash .*its index says")
    store.write(file, kept[file])
    assert publish(store, PublishOptions(delta=False)).snapshot.counts["rows"] == 2


def test_stats_name_their_rows_and_takedowns_that_came_later(store: Store, tmp_path: Path) -> None:
    receipt = commit(store, tmp_path, random_latents(3))
    publish(store, PublishOptions(delta=False))
    (first, *_) = read_index(store.read(receipt.files[0].index_key))[0]
    record_takedown(store, "asked", ids=[first.id])
    found = statistics(store)
    text = "\n".join(stats_lines(found))
    assert found["newer_takedowns"] == 1
    assert "720 values per channel of 3 rows" in text
    assert "1 takedown is newer than this snapshot" in text
    publish(store, PublishOptions(delta=False))
    found = statistics(store)
    (item,) = found["fingerprints"].values()
    assert (found["newer_takedowns"], item["rows"], item["exact"]["values_per_channel"]) == (0, 2, 480)
    assert "newer" not in "\n".join(stats_lines(found))
