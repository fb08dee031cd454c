"""A build without frames, for tests of what counts: it lists real files, finds its work, and commits receipts with real side indexes.

It goes one shard at a time, so that tests can interleave several.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

from pipeline.config import EncodeJob, build_job
from pipeline.corpus import resolve_inputs
from pipeline.engine.driver.coverage import find_work, without_unchanged
from pipeline.engine.driver.retries import retry_work
from pipeline.engine.driver.unchanged import find_unchanged, record_unchanged
from pipeline.format.index import IndexRow, read_index, write_index
from pipeline.format.layout import CURRENT
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
STATS = ChannelStats(1, (0.0,), (0.0,), (0.0,), (0.0,))
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


def row_id(uri: str, etag: str) -> str:
    return hashlib.blake2b(f"{uri}{etag}".encode(), digest_size=8).hexdigest()


def commit(
    store: LocalStore, job: EncodeJob, shard: Shard, spool: Path, rejected: dict[str, str] | None, created: str | None
) -> Receipt:
    """An attempt at a shard of plain files: one row per file, or the reject given by `rejected` (stem -> reason); then the receipt."""
    attempt = f"{next(ticks):08x}"
    rejected = rejected or {}
    rows, rejects, digests = [], [], {}
    for source in shard.objects:
        stem = Path(source.uri).stem
        digests[source.uri] = hashlib.blake2b(Path(source.uri).read_bytes(), digest_size=16).hexdigest()
        if stem in rejected:
            policy = rejected[stem] not in DAMAGE
            rejects.append(Reject(stem, "decode", rejected[stem], "x", policy=policy, uri=source.uri))
            continue
        name = row_id(source.uri, source.etag)
        text = (source.uri, stem, digests[source.uri])
        rows.append(IndexRow(name, len(rows), 0, 4, "", None, None, None, (1,), "float32", "v5", 5, *text, None))
    files = ()
    if rows:
        data, index = f"data/{attempt}.parquet", f"_index/{attempt}.idx"
        write_index(spool / attempt, rows, {})
        size = store.upload(spool / attempt, index).size
        store.write(data, bytes(4))
        files = (WrittenFile(data, index, "v5", 4, size, len(rows), "", "", 5 * len(rows)),)
    made = Receipt(
        format_version=CURRENT.version,
        shard_id=shard.id(FINGERPRINT),
        shard=shard,
        fingerprint=FINGERPRINT,
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
        stats=STATS if rows else None,
        timings=Timings(),
        limits=job.limits(),
        digests=digests,
        empty=tuple(source.uri for source in shard.objects if Path(source.uri).stem in rejected),
        recovered=tuple((row.source_uri, row.source_key) for row in rows) if shard.retry is not None else (),
    )
    return Ledger(store).commit(made)


def _is_there(source: SourceObject, shard: Shard) -> bool:
    """Whether the object is the one that is to be read: of a retry, it may have been touched since the base was made."""
    path = Path(source.uri)
    etag = dict(shard.retry.etags if shard.retry is not None else ()).get(source.uri, source.etag)
    return path.exists() and f"{path.stat().st_mtime_ns}-{path.stat().st_size}" == etag


class Run:
    """A build that can be stopped after any step."""

    def __init__(self, store: LocalStore, inputs: list[str], spool: Path, job: EncodeJob) -> None:
        self.store, self.spool, self.job = store, spool, job
        listed = resolve_inputs(inputs, job.storage)
        self.work = find_work(listed, Summaries(store).all(), FINGERPRINT, job)
        if self.work.touched and (same := find_unchanged(store, self.work.touched, job)):
            record_unchanged(store, same, SimpleNamespace(fingerprint=FINGERPRINT, fingerprint_parts={}, job=job))
            self.work = without_unchanged(self.work, same)
        retry_work(store, self.work, job)
        self.todo = self.work.todo(job.storage)
        self.committed: list[Receipt] = []

    def step(self, rejected: dict[str, str] | None = None, created: str | None = None) -> bool:
        """One shard; False if there was none left."""
        if not self.todo:
            return False
        shard = self.todo.pop(0)
        found = Ledger(self.store).read(shard.id(FINGERPRINT))
        if found is None and all(_is_there(source, shard) for source in shard.objects):
            self.committed.append(commit(self.store, self.job, shard, self.spool, rejected, created))
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

    def run(names: str = "abcdef", *overrides: str, **flags: object) -> Run:
        paths = [str(folder / f"{name}.mp4") for name in names]
        return Run(store, paths, spool, job_for(tmp_path / "out", *overrides, **flags))

    return SimpleNamespace(folder=folder, store=store, run=run, spool=spool)


def touch(path: Path) -> None:
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1_000_000_000))
