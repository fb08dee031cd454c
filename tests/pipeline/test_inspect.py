"""`inspect_path` and `status`: what is in a file or an output, from little reading."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import StorageConfig, WriteConfig
from pipeline.errors import InputError, NotFound, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.operate.inspect import inspect_path
from pipeline.operate.status import status
from pipeline.records import Bucket, Receipt, Reject
from pipeline.storage import Store, open_store
from pipeline.storage.local import LocalStore
from tests.conftest import S3Server
from tests.pipeline.latent_clips import (
    FINGERPRINT,
    METADATA,
    PARTS,
    WHOLE,
    latent_clip,
    local_store,
    values_of,
    write_shard,
)

CONFIG = StorageConfig()
REJECTS = (
    Reject("a", "clips", "too_short", "3 frames", policy=True),
    Reject("b", "decode", "undecodable", "broken", policy=False),
    Reject("c", "clips", "too_short", "4 frames", policy=True),
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return local_store(tmp_path / "out")


def build(store: Store, folder: Path, format: str = "parquet") -> list[Receipt]:
    """Two shards: 3 clips of 17 frames and one of 5 in each, a whole one of 41 in the second; three rejects in the
    first.
    """
    ledger = Ledger(store)
    ledger.prepare("films")
    config = WriteConfig(format=format)
    small = Bucket(5, 64, 48)
    first = [latent_clip(n) for n in range(3)] + [latent_clip(3, bucket=small, num_frames=5)]
    second = [latent_clip(n + 10) for n in range(3)] + [latent_clip(13, bucket=small, num_frames=5)]
    second.append(latent_clip(14, bucket=WHOLE, num_frames=41))
    return [
        ledger.commit(write_shard(store, folder / "s", config, first, shard=0, rejects=REJECTS)),
        ledger.commit(write_shard(store, folder / "s", config, second, shard=1)),
    ]


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_output(store: Store, tmp_path: Path, format: str) -> None:
    receipts = build(store, tmp_path, format)
    found = inspect_path(store.root, CONFIG)
    assert (found["kind"], found["name"]) == ("output", "films")
    (made,) = found["fingerprints"]
    assert (made["fingerprint"], made["fingerprint_parts"], made["shards"]) == (FINGERPRINT, PARTS, 2)
    assert {name: (item["clips"], item["frames"]) for name, item in made["buckets"].items()} == {
        "v17x64x48": (6, 102),
        "v5x64x48": (2, 10),
        "vnx64x48": (1, 41),
    }
    assert sum(item["bytes"] for item in made["buckets"].values()) == made["bytes"]
    assert made["bytes"] == sum(item.num_bytes for receipt in receipts for item in receipt.files)
    assert (made["counts"]["samples"], made["counts"]["encoded"], made["counts"]["rejected"]) == (12, 9, 3)
    assert made["rejects"] == {"too_short": 2, "undecodable": 1}
    assert made["spec"] == json.loads(json.dumps(METADATA["spec"]))
    assert made["latent"]["dtype"] == "float16"
    assert made["container"] == format
    json.dumps(found)


def test_output_statistics_are_merged_over_shards(store: Store, tmp_path: Path) -> None:
    build(store, tmp_path)
    clips = [latent_clip(n) for n in (0, 1, 2, 10, 11, 12)]
    clips += [latent_clip(n, bucket=Bucket(5, 64, 48), num_frames=5) for n in (3, 13)] + [
        latent_clip(14, bucket=WHOLE, num_frames=41)
    ]
    values = np.concatenate([values_of(clip.latent_CTHW, "float16").reshape(4, -1) for clip in clips], 1).astype(
        np.float64
    )
    found = inspect_path(f"{store.root}/_latentset.json", CONFIG)["fingerprints"][0]["statistics"]
    assert found["values_per_channel"] == values.shape[1]
    np.testing.assert_allclose(found["mean"], values.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found["std"], values.std(1), rtol=1e-6)
    assert (found["min"], found["max"]) == (values.min(1).tolist(), values.max(1).tolist())


def test_several_fingerprints_are_told_apart(store: Store, tmp_path: Path) -> None:
    from dataclasses import replace

    receipts = build(store, tmp_path)
    other = replace(receipts[0], fingerprint="ab" * 16, fingerprint_parts={"fps": 24.0}, shard_id="cd" * 16)
    Ledger(store).commit(other)
    found = inspect_path(store.root, CONFIG)["fingerprints"]
    assert {item["fingerprint"]: item["shards"] for item in found} == {FINGERPRINT: 2, "ab" * 16: 1}
    assert status(store)["fingerprints"] == {FINGERPRINT: 2, "ab" * 16: 1}


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_single_files(store: Store, tmp_path: Path, format: str) -> None:
    receipt = build(store, tmp_path, format)[0]
    item = receipt.files[0]
    data = inspect_path(store.uri(item.key), CONFIG)
    assert (data["kind"], data["bytes"], data["uri"]) == (format, item.num_bytes, store.uri(item.key))
    assert data["metadata"]["fingerprint"] == FINGERPRINT
    assert data["metadata"]["bucket"] == item.bucket
    if format == "parquet":
        assert data["rows"] == item.rows
        assert data["columns"][:3] == ["id", "vae_latent_bytes", "vae_latent_shape"]
    index = inspect_path(store.uri(item.index_key), CONFIG)
    assert (index["kind"], index["rows"], index["frames"]) == ("index", item.rows, item.frames)
    assert index["metadata"]["data"]["key"] == item.key
    shard = inspect_path(store.uri(f"_receipts/{receipt.shard_id}.json"), CONFIG)
    assert (shard["kind"], shard["attempt"], shard["counts"]["rejected"]) == ("receipt", "a1", 3)
    for found in (data, index, shard):
        json.dumps(found)


@pytest.mark.parametrize("format", ["parquet", "tar"])
def test_data_files_are_not_fetched(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts what leaves the store: a fraction of the file, in few requests."""
    store = local_store(tmp_path / "out")
    clips = [latent_clip(n, bucket=Bucket(17, 512, 512)) for n in range(40)]  # 160 KiB each
    item = write_shard(store, tmp_path / "s", WriteConfig(format=format), clips).files[0]
    lengths = []
    plain = LocalStore.read_range

    def counted(self: LocalStore, key: str, start: int, length: int, *, etag: str | None = None) -> bytes:
        lengths.append(length)
        return plain(self, key, start, length, etag=etag)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    inspect_path(store.uri(item.key), CONFIG)
    assert sum(lengths) < 256 * 1024 < item.num_bytes / 20
    assert len(lengths) <= 4


@pytest.mark.s3
def test_on_s3_files_and_outputs(s3: S3Server, tmp_path: Path) -> None:
    store = open_store(f"{s3.root}/deep/out", s3.config())
    receipt = build(store, tmp_path)[0]
    data = inspect_path(f"{s3.root}/deep/out/{receipt.files[0].key}", s3.config())
    assert (data["kind"], data["rows"]) == ("parquet", receipt.files[0].rows)
    found = inspect_path(f"{s3.root}/deep/out", s3.config())
    assert (found["uri"], found["fingerprints"][0]["shards"]) == (f"{s3.root}/deep/out", 2)
    assert status(store)["clips"] == 9


def test_what_is_not_ours_is_said_so(store: Store, tmp_path: Path) -> None:
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "foreign.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    (tmp_path / "empty.idx").write_bytes(b"")
    (tmp_path / "other.json").write_text("{}")
    with tarfile.open(tmp_path / "foreign.tar", "w") as archive:
        archive.add(tmp_path / "other.json", "a.json")
    (tmp_path / "__latentset__").write_bytes(b"{\xff")
    with tarfile.open(tmp_path / "scratched.tar", "w") as archive:
        archive.add(tmp_path / "__latentset__", "__latentset__")
    words = {
        "scratched.tar": "__latentset__ is not JSON",
        "foreign.parquet": "Parquet that Lathe did not write: no 'latentset' metadata; its columns: a, b",
        "broken.parquet": "cannot be read as Parquet",
        "broken.tar": "is not a readable tar",
        "foreign.tar": "expected __latentset__ as its first member, found a.json",
        "empty.idx": "cannot be read as a side index",
        "other.json": "cannot be read as a receipt",
    }
    for name, expected in words.items():
        with pytest.raises(InputError, match=expected):
            inspect_path(str(tmp_path / name), CONFIG)
    with pytest.raises(NotFound):
        inspect_path(str(tmp_path / "missing.tar"), CONFIG)
    with pytest.raises(OutputError, match=r"not a latent set: it has no _latentset\.json; give the output"):
        inspect_path(str(tmp_path / "nowhere"), CONFIG)


# --- status -----------------------------------------------------------------------------------------------------------


def test_status_adds_receipts_up(store: Store, tmp_path: Path) -> None:
    ledger = Ledger(store)
    ledger.prepare("films")
    empty = status(store)
    assert (empty["shards"], empty["samples"], empty["last_commit"], empty["progress"]) == (0, 0, None, None)
    receipts = build(store, tmp_path)
    alive = {"shards_total": 7, "updated": time.time(), "every_s": 30, "started": 1}
    store.write("_progress/build.json", json.dumps(alive).encode())
    found = status(store)
    expected = {
        "shards": 2,
        "samples": 12,
        "encoded": 9,
        "rejected": 3,
        "clips": 9,
        "frames": 153,
        "damaged": 1,
        "files": 5,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["rejects"] == {"too_short": 2, "undecodable": 1}
    assert found["last_commit"] == max(receipt.created for receipt in receipts)
    assert {**found["progress"], "last_seen": None} == {**alive, "last_seen": None}
    json.dumps(found)


def test_status_of_no_output(store: Store) -> None:
    with pytest.raises(OutputError, match="not a latent set"):
        status(store)


def test_a_damaged_heartbeat_is_named(store: Store, tmp_path: Path) -> None:
    Ledger(store).prepare("films")
    store.write("_progress/build.json", b"{half")
    with pytest.raises(OutputError, match=r"_progress/build\.json is not a heartbeat"):
        status(store)
