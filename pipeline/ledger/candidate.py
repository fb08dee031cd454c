"""Contents of the next snapshot of an output: the parent's tables, plus receipts it does not cover, minus rows that no longer count.

A receipt is read only if the parent does not cover it, or if another part of it counts than in the parent. Summaries, statistics and whole
rows stay in files on the local disk, so that memory is a few hundred bytes a receipt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError, OutputError
from pipeline.ledger.copies import CompactedFiles, Copies
from pipeline.ledger.counted import Share, shares
from pipeline.ledger.decisions import decide
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import (
    FILES,
    RECEIPTS,
    TableSpool,
    completed,
    file_row,
    read_batches,
    read_choices,
    read_table,
    receipt_row,
    release_memory,
    write_table,
)
from pipeline.ledger.overlaps import CountedReceipt, whole_state
from pipeline.ledger.part_statistics import part_statistics
from pipeline.ledger.receipts import Ledger, imbalances, retired_shards
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pipeline.ledger.decisions import Decisions
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.versions import Choices
    from pipeline.records import ChannelStats, Counts, Receipt, SourceObject
    from pipeline.storage import Store

    Listing = Sequence[SourceObject] | Callable[[], Sequence[SourceObject]] | None

HEAVY = ("sha256", "index_sha256", "ranges", "file_rows", "file_frames")
LIGHT = [name for name in RECEIPTS.names if name not in ("stats", "state", "videos")]
LIGHT_FILES = [name for name in FILES.names if name not in HEAVY]


@dataclass(slots=True)
class Candidate:
    """A snapshot that is not checked yet."""

    parent: Snapshot | None
    decisions: Decisions
    files: pa.Table  # `manifest.FILES` without `HEAVY`, by key
    files_path: Path  # the whole of it, as Parquet
    receipts: pa.Table  # `manifest.RECEIPTS`, those of `LIGHT`
    receipts_path: Path  # the whole of it, as Parquet
    fresh: pa.Array  # shards with rows that the parent does not cover: new ones, and those that were encoded again
    outdated: pa.Array  # shards of which the parent has other rows, or that are not in the candidate
    unchanged: bool  # against the parent
    cut_off: list[str]  # shards whose only receipt is empty or cut off
    parent_files: Path | None  # `files` of the parent, as Parquet
    parent_receipts: Path | None  # `receipts` of the parent, as Parquet
    listing: Sequence[SourceObject] | None  # the inputs as they are now; None: not known
    copies: Copies  # where compactions put rows of receipts

    def fresh_parts(self, store: Store, most: int) -> list[CountedReceipt]:
        """Up to `most` receipts with rows that the parent does not cover, evenly spread over their shards; else of all receipts."""
        shards = self.files["shard_id"].unique()
        shards = shards.filter(pc.is_in(shards, self.decisions.shards))  # compacted files have ids of their own
        fresh = shards.filter(pc.is_in(shards, self.fresh))
        offered = sorted((fresh if len(fresh) else shards).to_pylist())
        chosen = offered if len(offered) <= most else [offered[i * len(offered) // most] for i in range(most)]
        read = Ledger(store).read_all([self.decisions.key(shard)] for shard in chosen)
        return [self.decisions.overlaps.counted(receipt) for receipt in read if receipt is not None]


@dataclass(frozen=True, slots=True)
class _Read:
    """A receipt with counts, files and statistics of the part that counts. `problem`: the first thing wrong with it."""

    part: CountedReceipt
    counts: Counts
    shares: list[Share]
    stats: ChannelStats | None
    problem: str | None


def _counted_whole(part: CountedReceipt, problem: str | None = None) -> _Read:
    receipt = part.receipt
    files = [Share(item, item.rows, item.frames, item.num_bytes) for item in receipt.files]
    problem = problem or next(iter(imbalances(receipt)), None)
    return _Read(part, receipt.added(), files, receipt.stats, problem)


def _counted(store: Store, part: CountedReceipt) -> _Read:
    """Reads indexes and latents if some rows do not count, or are in other files.

    One that is lost or damaged is a problem of the receipt, which is named with all rows.
    """
    copies = part.copies.of(part.receipt.shard_id)
    if part.whole and not copies:
        return _counted_whole(part)
    dropped = any(copy.dropped for found in copies.values() for copy in found)
    complete = not dropped and not part.takedowns.deleted
    try:
        counts, found = shares(store, part, restore=True)
        stats = part.receipt.stats
        if not (part.whole and complete):
            stats = part_statistics(store, stats, found, complete=complete)
    except (InputError, OutputError) as error:
        return _counted_whole(CountedReceipt(part.receipt), f"the rows that count are not known: {error}")
    return _Read(part, counts, found, stats, next(iter(imbalances(part.receipt)), None))


class _Pool:
    """Rows of receipts that were read, in two files; each receipt with its `Overlaps.state`."""

    def __init__(self, folder: Path, name: str, compacted: CompactedFiles | None = None) -> None:
        """`compacted`: takes shares of compacted files."""
        self._compacted = compacted
        self._files = TableSpool(FILES, folder / f"{name}-files")
        self._receipts = TableSpool(RECEIPTS, folder / f"{name}-receipts")

    def add_whole(self, receipt: Receipt) -> None:
        """Adds a receipt of which all rows count."""
        self.add(_counted_whole(CountedReceipt(receipt)), whole_state(receipt.attempt))

    def add(self, read: _Read, state: bytes) -> None:
        """Adds a receipt with the part that counts."""
        self._receipts.add(receipt_row(read.part, read.counts, read.stats, state, read.problem))
        for share in read.shares:
            if share.copy is not None and self._compacted is not None:
                self._compacted.show(share.copy, share.hidden)
            elif share.rows:
                self._files.add(file_row(read.part, share))

    def finish(self) -> tuple[Path, Path]:
        """Files and receipts, as Parquet files."""
        return self._files.finish(), self._receipts.finish()


def gather(
    store: Store,
    parent: Snapshot | None,
    folder: Path,
    *,
    fingerprint: str | None = None,
    listing: Listing = None,
    drop_missing: bool = False,
    choices: Choices | None = None,
    copies: Copies | None = None,
    only_covered: bool = False,
    save: bool = False,
    workers: int = 8,
) -> Candidate:
    """Reads what is new and decides what counts.

    Args:
        store: the output.
        parent: its newest snapshot.
        folder: local scratch folder; the candidate refers to files in it.
        fingerprint: only receipts of fingerprints with this prefix; None: all.
        listing: the inputs as they are now, if known. A function is called after receipts were read: an input that is added and
            encoded meanwhile would count as gone in an earlier listing.
        drop_missing: whether inputs that are not in `listing` are dropped.
        choices: earlier choices; None: those of the parent.
        copies: of rows of receipts; None: those of the parent.
        only_covered: no receipts that the parent does not cover.
        save: whether to cache the summaries of receipts that were read, in the output.
        workers: threads that read receipts.

    Raises:
        OutputError: a receipt or takedown that cannot be read.
    """
    snapshots = Snapshots(store)
    covered: pa.Array | None = None
    parent_receipts = parent_files = None
    if parent is not None:
        parent_receipts = snapshots.download(parent, "receipts", folder / "parent-receipts")
        covered = pa.concat_arrays(
            [pa.array([], pa.string()), *read_table(parent_receipts, ["shard_id"])["shard_id"].chunks]
        )
    pool = _Pool(folder, "read")

    def keep(receipt: Receipt) -> None:
        if receipt.fingerprint.startswith(fingerprint or ""):
            pool.add_whole(receipt)

    summaries = Summaries(store, workers)
    spooled = summaries.spool(folder / "summaries", keep)
    if save:
        summaries.save()
    release_memory()
    before = choices or {}
    if choices is None and parent is not None:
        before = read_choices(snapshots.table(parent, "choices"))
    if copies is None:
        copies = Copies() if parent is None else Copies(snapshots.table(parent, "copies"))
    found = listing() if callable(listing) else listing
    decisions = decide(
        spooled,
        read_takedowns(store),
        covered,
        before,
        found,
        fingerprint=fingerprint,
        drop_missing=drop_missing,
        only_covered=only_covered,
        copies=copies,
    )
    spooled.unlink()
    fresh, covered_shards = decisions.shards, 0
    if covered is not None:
        fresh, covered_shards = fresh.filter(pc.invert(pc.is_in(fresh, covered))), len(covered)
        gone = covered.filter(pc.invert(pc.is_in(covered, decisions.shards))).to_pylist()
        covered_shards -= len(retired_shards(store).intersection(gone)) if gone else 0
    del covered  # before tables of the same number of rows are read
    release_memory()
    # Receipts that were read for their summaries name the files of their attempt, not copies.
    sources = [_Source(*pool.finish(), pa.concat_arrays([decisions.repeated, copies.shards]))]
    if parent is not None and parent_receipts is not None:
        parent_files = snapshots.download(parent, "files", folder / "parent-files")
        sources.insert(0, _Source(parent_files, parent_receipts))
    files_path, receipts_path, taken, outdated = _combined(store, decisions, copies, sources, folder, workers)
    release_memory()
    files = read_table(files_path, LIGHT_FILES, ["network", "fingerprint"])
    if parent_files is not None and len(outdated):
        fresh = pa.concat_arrays([fresh, _encoded_again(files, parent_files, outdated, copies)])
    return Candidate(
        parent=parent,
        decisions=decisions,
        files=files,
        files_path=files_path,
        receipts=read_table(receipts_path, LIGHT, ["fingerprint", "rejects", "warnings"]),
        receipts_path=receipts_path,
        fresh=fresh,
        outdated=outdated,
        unchanged=parent is not None and taken == [covered_shards, *([0] * (len(taken) - 1))],
        cut_off=summaries.cut_off,
        parent_files=parent_files,
        parent_receipts=parent_receipts,
        listing=found,
        copies=copies,
    )


def _encoded_again(files: pa.Table, parent_files: Path, outdated: pa.Array, copies: Copies) -> pa.Array:
    """Outdated shards with files that the parent does not name: their receipts are those of other attempts. A file whose rows were copied
    was in an earlier snapshot; it is named again where rows count again that a compaction dropped.
    """
    files = files.select(["key", "shard_id"]).filter(pc.is_in(files["shard_id"], outdated))
    before = (
        batch["key"].filter(pc.is_in(batch["shard_id"], outdated))
        for batch in read_batches(parent_files, ["key", "shard_id"])
    )
    known = pa.concat_arrays([pa.array([], pa.string()), *before, *copies.table["origin"].chunks])
    return files["shard_id"].filter(pc.invert(pc.is_in(files["key"], known))).unique()


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows that were made before, as two Parquet files. `unusable`: shards that have rows of several receipts."""

    files: Path
    receipts: Path
    unusable: pa.Array | None = None


def _combined(
    store: Store, decisions: Decisions, copies: Copies, sources: list[_Source], folder: Path, workers: int
) -> tuple[Path, Path, list[int], pa.Array]:
    """Files and receipts of all shards: rows whose state still holds, the others read now.

    Also how many receipts came from each source, and the outdated shards of the first, with those of compacted files that changed.
    """
    tables, taken, outdated = [], [], []
    compacted = CompactedFiles(store, copies)
    path, left = folder / "receipts", np.ones(len(decisions.shards), bool)
    with pq.ParquetWriter(path, RECEIPTS, compression="zstd", write_page_checksum=True) as out:

        def take(source: _Source) -> None:
            names = read_table(source.receipts, ["shard_id", "state"])
            valid = _valid(names, decisions, source.unusable, left)
            outdated.append(
                pa.concat_arrays([pa.array([], pa.string()), *names["shard_id"].filter(pa.array(~valid)).chunks])
            )
            del names
            first = 0
            for batch in read_batches(source.receipts):
                mine = batch.filter(pa.array(valid[first : first + batch.num_rows]))
                first += batch.num_rows
                if mine.num_rows:
                    out.write_batch(completed(mine, RECEIPTS))
            release_memory()
            # By row groups: a filter over the whole table would hold it twice.
            batches = compacted.take_out(read_batches(source.files), outdated[-1])
            kept = (batch.filter(pc.invert(pc.is_in(batch["shard_id"], outdated[-1]))) for batch in batches)
            tables.append(pa.Table.from_batches(kept, FILES))
            taken.append(int(valid.sum()))

        for source in sources:
            take(source)
        open_shards = decisions.shards.filter(pa.array(left)), decisions.states.filter(pa.array(left))
        take(_read_now(store, decisions, *open_shards, folder, workers, compacted))
    tables.append(compacted.table())
    changed = pa.concat_arrays([outdated[0], pa.array(compacted.ids(), pa.string())])
    return write_table(pa.concat_tables(tables), folder / "files", "key"), path, taken, changed


def _valid(names: pa.Table, decisions: Decisions, unusable: pa.Array | None, left: np.ndarray) -> np.ndarray:
    """Mask of receipts whose state holds and which no source had before; takes them out of `left`, a mask of `decisions.shards`."""
    places = pc.index_in(names["shard_id"], decisions.shards)
    valid = pc.fill_null(pc.equal(decisions.states.take(places), names["state"]), False)
    if unusable is not None and len(unusable):
        valid = pc.and_(valid, pc.invert(pc.is_in(names["shard_id"], unusable)))
    mask = valid.to_numpy() & left[pc.fill_null(places, 0).to_numpy()] if len(left) else np.zeros(len(names), bool)
    left[places.to_numpy(zero_copy_only=False)[mask].astype(np.int64)] = False
    return mask


def _read_now(
    store: Store,
    decisions: Decisions,
    shards: pa.Array,
    states: pa.Array,
    folder: Path,
    workers: int,
    compacted: CompactedFiles,
) -> _Source:
    pool, ledger = _Pool(folder, "again", compacted), Ledger(store)
    keys = decisions.keys.take(pc.index_in(shards, decisions.shards)).to_pylist()

    def read(key: str) -> _Read | None:
        receipt = ledger.load(key)
        return None if receipt is None else _counted(store, decisions.overlaps.counted(receipt))

    for state, found in zip(states.to_pylist(), mapped_ahead(read, keys, workers, "receipts"), strict=True):
        if found is not None:
            pool.add(found, state)
    return _Source(*pool.finish())
