"""The check of files finds data files, indexes and receipts that do not belong together, whose sizes and ends are right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import WriteConfig
from pipeline.errors import PublishFailed
from pipeline.format.index import read_index, write_index
from pipeline.ledger.receipts import Ledger
from pipeline.operate.publish import PublishOptions, publish
from pipeline.records import Receipt
from pipeline.storage import Store
from tests.pipeline.latent_clips import WHOLE, latent_clip, local_store, write_shard

TARS = WriteConfig(format="tar")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path, list[Receipt]]:
    """Two receipts of one tar of two clips each, with equal sizes; not committed."""
    folder = tmp_path_factory.mktemp("files")
    store = local_store(folder / "out")
    Ledger(store).prepare("films")
    clips = [[latent_clip(100 * shard + n) for n in range(2)] for shard in range(2)]
    return store, folder, [write_shard(store, folder / f"spool-{n}", TARS, clips[n], shard=n) for n in range(2)]


@pytest.fixture
def two(written: tuple[Store, Path, list[Receipt]]) -> Iterator[tuple[Store, Path, list[Receipt]]]:
    """`written`, as it was for every test."""
    store = written[0]
    kept = {info.key: store.read(info.key) for prefix in ("data/", "_index/") for info in store.list(prefix)}
    yield written
    for key, data in kept.items():
        store.write(key, data)
    for key in [info.key for prefix in ("_receipts/", "_summaries/", "_snapshots/") for info in store.list(prefix)]:
        store.delete(key)


def swap_data(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    """The tar of the other receipt under this name."""
    store.write(one.files[0].key, store.read(two.files[0].key))
    return one


def replace_index(store: Store, folder: Path, receipt: Receipt, data: bytes) -> Receipt:
    """An index that its receipt knows by size and hash."""
    (item,) = receipt.files
    store.write(item.index_key, data)
    item = replace(item, index_bytes=len(data), index_sha256=hashlib.sha256(data).hexdigest())
    return replace(receipt, files=(item,))


def other_index(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    return replace_index(store, folder, one, store.read(two.files[0].index_key))


def short_index(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    rows, metadata = read_index(store.read(one.files[0].index_key))
    write_index(folder / "short", rows[:1], metadata)
    return replace_index(store, folder, one, (folder / "short").read_bytes())


def no_index(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    return replace_index(store, folder, one, b"x")


def same_file(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    return replace(one, files=two.files)


def other_statistics(store: Store, folder: Path, one: Receipt, two: Receipt) -> Receipt:
    return replace(one, stats=replace(one.stats, n=one.stats.n - 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            swap_data,
            r"data/\S+\.tar \(its first latent is in video00100-0000\.latent\.npy, expected one of row video00000",
        ),
        (other_index, r"_index/\S+ \(it was written for {'key': '\S+', .*}, expected {'key'"),
        (short_index, r"_index/\S+ \(it has 1 rows, expected 2\)"),
        (no_index, r"_index/\S+ \(it cannot be read as Parquet"),
        (same_file, "2 files are named by two receipts, such as data/"),
        (other_statistics, r"receipt of shard \w+ \(statistics of 1916 values, its indexes say 1920\)"),
    ],
)
def test_files_that_do_not_belong_to_their_receipt(
    two: tuple[Store, Path, list[Receipt]], damage: Callable[..., Receipt], words: str
) -> None:
    store, folder, receipts = two
    made = [damage(store, folder, *receipts), receipts[1]]
    for receipt in made:
        Ledger(store).commit(receipt)
    with pytest.raises(PublishFailed, match=words) as caught:
        publish(store, PublishOptions(delta=False))
    assert [check.name for check in caught.value.checks if not check.ok] == ["files"]


def test_sound_tars_pass(two: tuple[Store, Path, list[Receipt]]) -> None:
    store, _, receipts = two
    for receipt in receipts:
        Ledger(store).commit(receipt)
    (files,) = [check for check in publish(store, PublishOptions(delta=False)).snapshot.checks if check.name == "files"]
    assert files.numbers == {"files": 4, "missing": 0, "other_size": 0, "named_twice": 0, "read": 4, "damaged": 0}


def test_latents_of_several_lengths_in_one_file_pass(tmp_path: Path) -> None:
    """Their number of values is not that of equal latents."""
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    clips = [latent_clip(n, bucket=WHOLE, num_frames=frames) for n, frames in enumerate((17, 33, 17))]
    receipt = Ledger(store).commit(write_shard(store, tmp_path / "spool", WriteConfig(), clips))
    (files,) = [check for check in publish(store, PublishOptions(delta=False)).snapshot.checks if check.name == "files"]
    assert (files.numbers["read"], files.numbers["damaged"]) == (2, 0)
    made = replace(receipt, stats=replace(receipt.stats, n=3 * receipt.stats.n // 4))
    store.write(f"_receipts/{receipt.shard_id}.json", made.to_json())
    for prefix in ("_snapshots/", "_summaries/"):
        for info in list(store.list(prefix)):
            store.delete(info.key)
    with pytest.raises(PublishFailed, match="its indexes say"):
        publish(store, PublishOptions(delta=False))
