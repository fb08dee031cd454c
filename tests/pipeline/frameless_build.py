"""A build without frames, for tests of what counts: it lists real files, finds its work, and commits receipts with real side indexes.

It goes one shard at a time, so that tests can interleave several.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import EncodeJob, build_job
from pipeline.corpus import resolve_inputs
from pipeline.engine.driver.coverage import find_work, without_unchanged
from pipeline.engine.driver.retries import retry_work
from pipeline.engine.driver.unchanged import find_unchanged, record_unchanged
from pipeline.format.columns import storable
from pipeline.format.index import IndexRow, read_index, write_index
from pipeline.format.layout import CURRENT
from pipeline.format.tensors import payload_hash
from pipeline.ledger.counted import counted_receipts, shares, shown
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.records import (
    ChannelStats,
    Counts,
    Receipt,
    Reject,
    Shard,
    SourceObject,
    Timings,
    WrittenFile,
)
from pipeline.storage.local import LocalStore

FINGERPRINT = "f" * 32
DAMAGE = ("decoder_crashed", "undecodable", "decode_timeout")
LATENT = b"PAR1"  # of every row: the first bytes of its file, as one float32
ticks = itertools.count()


class NoConditions(LocalStore):
    """A store without conditional writes."""

    def conditional_writes(self) -> bool:
        return False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


class Careless(LocalStore):
    """A store that claims conditional writes and replaces what is there."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.write(key, data)
        return True


def job_for(output: Path, *overrides: str, **flags: object) -> EncodeJob:
    return build_job({"inputs": ["."], "output": str(output), **flags}, overrides=overrides)


def row_id(uri: str, etag: str, fingerprint: str = FINGERPRINT) -> str:
    return hashlib.blake2b(f"{uri}{etag}{fingerprint}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@functools.cache
def parquet_of(rows: int) -> bytes:
    """A Parquet file of that many rows, whose contents nobody reads."""
    out = io.BytesIO()
    pq.write_table(pa.table({"row": pa.array(range(rows), pa.int8())}), out)
    return out.getvalue()


def stats_of(rows: int) -> ChannelStats:
    """Statistics of that many latents."""
    value = (float(np.frombuffer(LATENT, "<f4")[0]),)
    return ChannelStats(rows, value, (0.0,), value, value)


def commit(
    store: LocalStore,
    job: EncodeJob,
    shard: Shard,
    spool: Path,
    rejected: dict[str, str] | None,
    created: str | None,
    fingerprint: str = FINGERPRINT,
) -> Receipt:
    """An attempt at a shard of plain files: one row per file, or the reject given by `rejected` (stem -> reason); then the receipt."""
    attempt = f"{next(ticks):08x}"
    rejected = rejected or {}
    rows, rejects, digests, videos = [], [], {}, {}
    for source in shard.objects:
        stem = Path(source.uri).stem
        digests[source.uri] = hashlib.blake2b(Path(source.uri).read_bytes(), digest_size=16).hexdigest()
        if stem in rejected:
            policy = rejected[stem] not in DAMAGE
            known = {"video": {"px480": 1, "s1": 1, "ms": 1500}, "buckets": {"v9": 1}}
            rejects.append(Reject(stem, "decode", rejected[stem], "x", policy=policy, uri=source.uri, **known))
            continue
        videos[source.uri] = {"px720": 1, "s5": 1, "ms": 5000}
        name = row_id(source.uri, source.etag, fingerprint)
        text = (storable(source.uri), storable(stem), digests[source.uri])
        tensor = (0, len(LATENT), payload_hash(LATENT), None, None, None, (1,), "float32")
        rows.append(IndexRow(name, len(rows), *tensor, "v5", 5, *text, None))
    files = ()
    if rows:
        data, index = f"data/{attempt}.parquet", f"_index/{attempt}.idx"
        content = parquet_of(len(rows))
        digest = hashlib.sha256(content).hexdigest()
        store.write(data, content)
        write_index(spool / attempt, rows, {"data": {"key": data, "num_bytes": len(content), "sha256": digest}})
        size = store.upload(spool / attempt, index).size
        digests_of_files = (digest, hashlib.sha256(store.read(index)).hexdigest())
        files = (WrittenFile(data, index, "v5", len(content), size, len(rows), *digests_of_files, 5 * len(rows)),)
    made = Receipt(
        format_version=CURRENT.version,
        shard_id=shard.id(fingerprint),
        shard=shard,
        fingerprint=fingerprint,
        fingerprint_parts={},
        attempt=attempt,
        created=created or attempt,
        files=files,
        counts=Counts(
            len(shard.objects),
            len(rows),
            len(rejects),
            len(rows),
            len(rows),
            0,
            5 * len(rows),
            sum(not reject.policy for reject in rejects),
        ),
        rejects=tuple(rejects),
        stats=stats_of(len(rows)) if rows else None,
        timings=Timings(),
        limits=job.limits(),
        digests=digests,
        empty=tuple(source.uri for source in shard.objects if Path(source.uri).stem in rejected),
        recovered=tuple((row.source_uri, row.source_key) for row in rows) if shard.retry is not None else (),
        videos=tuple(videos.get(source.uri, {}) for source in shard.objects),
    )
    return Ledger(store).commit(made)


def _is_there(source: SourceObject, shard: Shard) -> bool:
    """Whether the object is the one that is to be read: of a retry, it may have been touched since the base was made."""
    path = Path(source.uri)
    etag = dict(shard.retry.etags if shard.retry is not None else ()).get(source.uri, source.etag)
    return path.exists() and f"{path.stat().st_mtime_ns}-{path.stat().st_size}" == etag


class Run:
    """A build that can be stopped after any step."""

    def __init__(
        self, store: LocalStore, inputs: list[str], spool: Path, job: EncodeJob, fingerprint: str = FINGERPRINT
    ) -> None:
        self.store, self.spool, self.job, self.fingerprint = store, spool, job, fingerprint
        listed = resolve_inputs(inputs, job.storage)
        self.work = find_work(listed, Summaries(store).all(), fingerprint, job)
        if self.work.touched and (same := find_unchanged(store, self.work.touched, job)):
            record_unchanged(store, same, SimpleNamespace(fingerprint=fingerprint, fingerprint_parts={}, job=job))
            self.work = without_unchanged(self.work, same)
        retry_work(store, self.work, job)
        self.todo = self.work.todo(job.storage)
        self.committed: list[Receipt] = []

    def step(self, rejected: dict[str, str] | None = None, created: str | None = None) -> bool:
        """One shard; False if there was none left."""
        if not self.todo:
            return False
        shard = self.todo.pop(0)
        found = Ledger(self.store).read(shard.id(self.fingerprint))
        if found is None and all(_is_there(source, shard) for source in shard.objects):
            made = commit(self.store, self.job, shard, self.spool, rejected, created, self.fingerprint)
            self.committed.append(made)
        return True

    def finish(self, rejected: dict[str, str] | None = None, created: str | None = None) -> Run:
        while self.step(rejected, created):
            pass
        return self


def visible(store: LocalStore) -> list[IndexRow]:
    """Rows as readers see them."""
    found = []
    for part in counted_receipts(store):
        for item in () if part.superseded else part.receipt.files:
            found += shown(part, read_index(store.read(item.index_key))[0])
    return found


def totals(store: LocalStore) -> Counts:
    return sum((shares(store, part)[0] for part in counted_receipts(store)), Counts())


def make_workspace(tmp_path: Path) -> SimpleNamespace:
    """A folder of six videos, an output, a spool folder, and a way to run over some of the files."""
    folder, spool = tmp_path / "in", tmp_path / "spool"
    folder.mkdir()
    spool.mkdir()
    for name in "abcdef":
        (folder / f"{name}.mp4").write_bytes(name.encode() * 10)
    store = LocalStore(str(tmp_path / "out"))

    def run(names: Iterable[str] = "abcdef", *overrides: str, fingerprint: str = FINGERPRINT, **flags: object) -> Run:
        paths = [str(folder / f"{name}.mp4") for name in names]
        return Run(store, paths, spool, job_for(tmp_path / "out", *overrides, **flags), fingerprint)

    return SimpleNamespace(folder=folder, store=store, run=run, spool=spool)


def touch(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))
