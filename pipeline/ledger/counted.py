"""Receipts with the part of each that counts, and the counts and bytes of that part.

Takes the store of an output, returns `CountedReceipt`s and `Share`s. If a source was encoded under two receipts, only rows of the earlier
one are shown. Side indexes are read only for receipts that are partly hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import NotFound, OutputError
from pipeline.format.columns import storable
from pipeline.ledger.overlaps import CountedReceipt, Overlaps
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.snapshots import published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns
from pipeline.records import Counts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.format.index import IndexRow
    from pipeline.ledger.copies import Copies, Copy
    from pipeline.records import Receipt, WrittenFile
    from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class Share:
    """Part of one data file that counts."""

    file: WrittenFile
    rows: int
    frames: int
    num_bytes: int  # of the file if all rows count, else of the tensors of those that do
    # Rows that count and rows that do not, of receipts that are partly hidden.
    shown: tuple[IndexRow, ...] = ()
    hidden_rows: tuple[IndexRow, ...] = ()
    copy: Copy | None = None  # if `file` is a compacted one: `rows` and `hidden` are of this part of it

    @property
    def hidden(self) -> tuple[int, ...]:
        """Positions of rows that do not count."""
        return tuple(row.row for row in self.hidden_rows)


def counted_receipts(store: Store, workers: int = 8, copies: Copies | None = None) -> Iterator[CountedReceipt]:
    """Every receipt with the part of it that counts, by shard id, including receipts of which nothing counts. Without receipts that are
    committed meanwhile: which of their sources other receipts have is not known.

    `copies`: those of the newest snapshot if None.

    Raises:
        OutputError: a receipt of another format version, or of another shard; a newest snapshot that cannot be read.
    """
    copies = published_copies(store) if copies is None else copies
    overlaps = Overlaps(Summaries(store, workers).all(), read_takedowns(store), copies)
    receipts = Ledger(store).all(workers)
    return (overlaps.counted(receipt) for receipt in receipts if receipt.shard_id in overlaps.by_shard)


def shown(part: CountedReceipt, rows: list[IndexRow]) -> list[IndexRow]:
    """Rows of this receipt's files that count, of those given."""
    return [row for row in counting(part, rows) if not part.takedowns.hides(row)]


def counting(part: CountedReceipt, rows: list[IndexRow]) -> list[IndexRow]:
    """As `shown`, including rows that were taken down."""
    if not part.hidden_uris and not part.hidden_samples:
        return rows
    uris = set(map(storable, part.hidden_uris))  # spelled as in rows
    samples = {(storable(uri), storable(key)) for uri, key in part.hidden_samples}
    return [row for row in rows if row.source_uri not in uris and (row.source_uri, row.source_key) not in samples]


def shares(store: Store, part: CountedReceipt, *, restore: bool = False) -> tuple[Counts, list[Share]]:
    """Counts of the part of a receipt that counts, and its share of each data file.

    Rows that a compaction dropped are left out, as if taken down. With `restore`, those that count again, because an input or a takedown
    was taken back, are in the share of the file that the receipt names.

    Raises:
        NotFound: an index is missing, of a receipt that is partly hidden.
        OutputError: it cannot be read, or rows that count again are in no file any more.
    """
    receipt = part.receipt
    copies = part.copies.of(receipt.shard_id)
    if part.whole and not any(copy.dropped for found in copies.values() for copy in found):
        return receipt.added(), [share for item in receipt.files for share in _whole(item, copies.get(item.key, ()))]
    if part.superseded:
        return Counts(), []
    if not part.hidden_uris and not part.hidden_samples and part.takedowns.hides_all(receipt):
        # No index is needed: files that were taken down may be deleted.
        rows, frames = (sum(getattr(item, name) for item in receipt.files) for name in ("rows", "frames"))
        taken_counts = Counts(clips_planned=rows, clips=rows, frames=frames)
        return receipt.added() + _negative(taken_counts), [Share(item, 0, 0, 0) for item in receipt.files]
    found: list[Share] = []
    lost: list[IndexRow] = []
    taken: list[IndexRow] = []
    gone = Counts()
    for item in receipt.files:
        again: dict[str, IndexRow] = {}  # dropped rows that count again
        for copy in copies.get(item.key, (None,)):
            place, dropped = (item, ()) if copy is None else (copy.file, copy.dropped)
            stored: list[IndexRow] = []
            if is_deleted := place.index_key in part.takedowns.deleted:  # takedowns hide all its rows
                moved = item if copy is None else copy
                gone += Counts(clips_planned=moved.rows, clips=moved.rows, frames=moved.frames)
            else:
                stored = stored_index(store, place.index_key) if copy is None else part.copies.rows(store, copy)
            every = [*stored, *dropped]
            counted = counting(part, every)
            names = {row.id for row in counted}
            lost += [row for row in every if row.id not in names]
            taken += [row for row in counted if part.takedowns.hides(row)]
            names -= {row.id for row in taken}
            if not is_deleted and (copy is None or copy.rows):
                found.append(_partly(place, stored, names, copy))
            again |= {row.id: row for row in dropped if row.id in names}
        if again and restore:
            found.append(_restored(store, receipt, item, set(again)))
        else:
            taken += again.values()
    # A takedown hides rows, but its inputs still count as encoded.
    taken_counts = Counts(clips_planned=len(taken), clips=len(taken), frames=sum(row.num_frames for row in taken))
    return receipt.added() + _negative(_hidden_counts(part, lost) + taken_counts + gone), found


def _whole(item: WrittenFile, copies: tuple[Copy, ...]) -> list[Share]:
    if not copies:
        return [Share(item, item.rows, item.frames, item.num_bytes)]
    return [Share(copy.file, copy.rows, copy.frames, copy.num_bytes, copy=copy) for copy in copies]


def _partly(file: WrittenFile, rows: list[IndexRow], shown: set[str], copy: Copy | None = None) -> Share:
    """The share of `rows` with these ids."""
    seen = tuple(row for row in rows if row.id in shown)
    hidden = tuple(row for row in rows if row.id not in shown)
    whole = file.num_bytes if copy is None else copy.num_bytes
    num_bytes = sum(span.length for row in seen for span in row.spans()) if hidden else whole
    return Share(file, len(seen), sum(row.num_frames for row in seen), num_bytes, seen, hidden, copy)


def _restored(store: Store, receipt: Receipt, item: WrittenFile, shown: set[str]) -> Share:
    """Rows that count although a compaction dropped them, from the file of the receipt.

    Raises:
        OutputError: that file is deleted.
    """
    try:
        return _partly(item, stored_index(store, item.index_key), shown)
    except NotFound:
        raise OutputError(
            f"{len(shown)} rows of shard {receipt.shard_id} count again that `lathe compact` dropped, and {item.key} is deleted; "
            "delete the receipt of this shard and encode again",
            uri=store.uri(item.key),
        ) from None


def _hidden_counts(part: CountedReceipt, rows: list[IndexRow]) -> Counts:
    """Contribution to `Receipt.added` of hidden plain files (one sample each), or of hidden samples of a retry."""
    receipt, retry = part.receipt, part.receipt.shard.retry
    rejects = [item for item in receipt.rejects if not part.counts(str(item.uri), str(item.key))]
    damaged = len({(reject.uri, reject.key) for reject in rejects if not reject.policy})
    clips_rejected = sum(reject.clips for reject in rejects)
    if retry is None:
        samples = len(part.hidden_uris)
        encoded = len({row.source_uri for row in rows})
        rejected = samples - encoded
    else:
        before = [sample for sample in retry.samples if not part.counts(sample.uri, sample.key)]
        damaged -= sum(sample.damaged for sample in before)
        clips_rejected -= sum(sample.clips_rejected for sample in before)
        samples, encoded = 0, sum(not part.counts(*sample) for sample in receipt.recovered)
        rejected = -encoded
    return Counts(
        samples=samples,
        encoded=encoded,
        rejected=rejected,
        clips_planned=len(rows) + clips_rejected,
        clips=len(rows),
        clips_rejected=clips_rejected,
        frames=sum(row.num_frames for row in rows),
        damaged=damaged,
    )


def _negative(counts: Counts) -> Counts:
    return Counts(**{name: -getattr(counts, name) for name in counts.__slots__})
