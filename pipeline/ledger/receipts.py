"""Receipts of an output: which shards are done, and their files. Readers trust only receipts.

`commit` takes a `Receipt` whose files are uploaded and returns the receipt that counts for its shard: the first one committed.
`_receipts/` holds one object per shard, so one LIST gives the shards that are done. An empty object, or one that is not complete JSON, is
not a receipt.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipeline.config import DrillConfig
from pipeline.errors import BuildError, NotFound, OutputError
from pipeline.format.index import read_index
from pipeline.format.layout import COMPACTED, CURRENT, DATA, DELTA_LOG, RETIRED, is_foreign_cache, retired_receipt
from pipeline.ledger.latent_set import create_latent_set, find_layout, read_latent_set
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.process import kill_points as drill
from pipeline.records import Receipt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from pipeline.format.index import IndexRow
    from pipeline.format.layout import Layout
    from pipeline.ledger.latent_set import LatentSet
    from pipeline.storage import ObjectInfo, Store


class Ledger:
    """The receipts of one output. Holds no state, so any number may work on one output at a time."""

    def __init__(self, store: Store, failures: DrillConfig | None = None, layout: Layout | None = None) -> None:
        """`failures`: where to fail on purpose, for tests. `layout`: of the output; by default it is read from the output when needed."""
        self._store = store
        self._layout = layout
        self._drill = failures or DrillConfig()

    def prepare(self, name: str) -> list[str]:
        """Makes the output a latent set if it is not one yet. Returns notices for the user, usually none.

        Raises:
            OutputError: the folder holds a newer format version, or foreign objects with the same names.
        """
        notices = []
        if not self._store.conditional_writes():
            notices.append(
                f"{self._store.root}: the store has no conditional writes; receipts are named by attempt, "
                "the earliest counts. Results are the same, but two runs at once may do the same work twice"
            )
        self._layout = create_latent_set(self._store, name).layout
        return notices

    @property
    def layout(self) -> Layout:
        """Names of the output's objects.

        Raises:
            OutputError: the output is of a newer format version.
        """
        if self._layout is None:
            self._layout = find_layout(self._store)
        return self._layout

    def latent_set(self) -> LatentSet:
        """Contents of the set object.

        Raises:
            OutputError: not a latent set, one of a newer format version, or a foreign file of that name.
        """
        if (found := read_latent_set(self._store)) is None:
            raise OutputError(
                f"{self._store.root} is not a latent set: it has no {CURRENT.set_key}; give the output of `lathe encode` itself, not a "
                "folder above or below it"
            )
        return found

    def listed(self, *, empty: bool = False) -> Iterator[ObjectInfo]:
        """Objects named like receipts, in key order, by one LIST; with `empty` also those of zero bytes."""
        found = self._store.list(self.layout.receipts)
        return (info for info in found if (info.size or empty) and self.layout.receipt_name(info.key))

    def done(self) -> set[str]:
        """Ids of all shards that have a receipt, by one LIST and no reads. A receipt that was cut off counts here."""
        names = (self.layout.receipt_name(info.key) for info in self.listed())
        return {name.shard_id for name in names if name is not None}

    def commit(self, receipt: Receipt) -> Receipt:
        """Commits `receipt`, unless its shard has one. Returns the receipt that counts; if its `attempt` is another, the caller deletes its
        files.

        Raises:
            BuildError: the receipt's counts do not add up; nothing was written.
        """
        if problems := imbalances(receipt):
            raise BuildError(f"receipt refused, {problems[0]}", shard=receipt.shard_id, stage="commit")
        if not self._store.conditional_writes():
            return self._commit_by_name(receipt)
        key = self.layout.receipt_key(receipt.shard_id)
        self._store.put_if_absent(key, receipt.to_json())
        drill.fire(self._drill, "before_read_back")
        # Read back in any case: some stores accept If-None-Match but do not decide a race with it.
        # The object may be cut off (a writer killed on a mount without hard links). It is neither trusted nor overwritten:
        # two attempts that both replaced it could delete each other's receipt.
        return self.load(key) or self._commit_by_name(receipt)

    def _commit_by_name(self, receipt: Receipt) -> Receipt:
        ours = self.layout.receipt_key(receipt.shard_id, receipt.attempt)
        self._store.write(ours, receipt.to_json())
        drill.fire(self._drill, "before_read_back")
        winner = self.read(receipt.shard_id)
        if winner is None:
            raise BuildError(
                "the receipt just written is not listed by the store", shard=receipt.shard_id, stage="commit"
            )
        if winner.attempt != receipt.attempt:
            self._store.delete(ours)  # before the caller deletes the files it names
        return winner

    def find(self, shard_id: str) -> Receipt | None:
        """As `read`, cheaper if the shard is not done: one HEAD on stores with conditional writes.

        Raises:
            OutputError: a receipt of another format version, or of another shard.
        """
        # A LIST of a local folder costs time for every receipt in it.
        if self._store.conditional_writes() and not self._store.exists(self.layout.receipt_key(shard_id)):
            return None
        return self.read(shard_id)

    def read(self, shard_id: str) -> Receipt | None:
        """The receipt that counts for a shard; None if it is not done.

        Raises:
            OutputError: a receipt of another format version, or of another shard.
        """
        listed = self._store.list(f"{self.layout.receipts}{shard_id}")
        keys = [info.key for info in listed if self.layout.receipt_name(info.key)]
        return self.load_first(keys)

    def all(self, workers: int = 8) -> Iterator[Receipt]:
        """The receipt of every finished shard, by shard id; read ahead by `workers` threads.

        Sources of one receipt may count in another: see `pipeline.ledger.overlaps`.

        Raises:
            OutputError: a receipt of another format version, or of another shard.
        """
        return (receipt for receipt in self.read_all(self.keys_by_shard().values(), workers) if receipt is not None)

    def read_all(self, keys_of_shards: Iterable[list[str]], workers: int = 8) -> Iterator[Receipt | None]:
        """`load_first` of each shard's keys, in order, read ahead by `workers` threads."""
        return mapped_ahead(self.load_first, keys_of_shards, workers, "receipts")

    def keys_by_shard(self, without: Collection[str] = ()) -> dict[str, list[str]]:
        """Keys of receipt objects of every shard but `without`, by shard id, empty and cut-off ones included. Several where the store
        has no conditional writes, or where the first was cut off. Asks the store for names only.
        """
        known = {self.layout.receipt_key(shard) for shard in without}
        found: dict[str, list[str]] = {}
        for key in self._store.keys(self.layout.receipts):
            if key in known:  # a look-up costs a tenth of taking the name apart
                continue
            name = self.layout.receipt_name(key)
            if name is not None and name.shard_id not in without:
                found.setdefault(name.shard_id, []).append(key)
        return found

    def load_first(self, keys: Iterable[str]) -> Receipt | None:
        """Receipt that counts of several of one shard: the lowest (created, attempt), the same for every reader.

        None if no key holds a readable receipt.
        """
        found = [receipt for key in keys if (receipt := self.load(key)) is not None]
        return min(found, key=precedence, default=None)

    def load(self, key: str) -> Receipt | None:
        """One receipt object; None if it is empty or cut off, so that its shard counts as not done.

        Raises:
            OutputError: of another format version, or of another shard than its name says.
        """
        try:
            receipt = Receipt.from_json(self._store.read(key))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None
        except NotFound:  # listed, then deleted by an attempt that was second
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{key} cannot be read as a receipt: {error}", uri=self._store.uri(key)) from None
        name = self.layout.receipt_name(key)
        if name is None or name.shard_id != receipt.shard_id or name.attempt not in (None, receipt.attempt):
            raise OutputError(
                f"{key} holds the receipt of shard {receipt.shard_id}, attempt {receipt.attempt}",
                uri=self._store.uri(key),
            )
        return receipt


def stored_index(store: Store, key: str) -> list[IndexRow]:
    """Rows of a side index of an output.

    Raises:
        NotFound: it is missing.
        OutputError: it cannot be read.
    """
    try:
        return read_index(store.read(key))[0]
    except (ValueError, OSError) as error:
        raise OutputError(f"{key} cannot be read as a side index: {error}", uri=store.uri(key)) from None


def retired_shards(store: Store) -> set[str]:
    """Shards whose receipts `lathe gc` retired, because nothing of them counted. They may have been encoded again since."""
    names = map(retired_receipt, retired_keys(store))
    return {name.shard_id for name in names if name is not None}


def retired_keys(store: Store) -> list[str]:
    """Keys of the receipts that `lathe gc` retired. Not those of zero bytes, left by kills on a mount, nor of other objects."""
    return [info.key for info in store.list(RETIRED) if info.size and retired_receipt(info.key) is not None]


def read_retired(store: Store, key: str) -> Receipt:
    """A receipt in `_retired/`.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        return Receipt.from_json(store.read(key))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{key} cannot be read as a receipt: {error}", uri=store.uri(key)) from None


def precedence(receipt: Receipt) -> tuple[str, str]:
    """Sort key of receipts. If several are of one shard or source, the lowest counts, for every reader."""
    return receipt.created, receipt.attempt


def imbalances(receipt: Receipt) -> list[str]:
    """Inconsistencies between counts, files, rejects and statistics of a receipt, worst first; empty if there are none."""
    counts, files = receipt.counts, receipt.files
    found = []
    try:
        counts.check()
    except ValueError as error:
        found.append(str(error))
    if (rows := sum(item.rows for item in files)) != counts.clips:
        found.append(f"files hold {rows} rows, counts say {counts.clips} clips")
    if (frames := sum(item.frames for item in files)) != counts.frames:
        found.append(f"files hold {frames} frames, counts say {counts.frames}")
    if counts.encoded > counts.clips and receipt.shard.retry is None:  # of a retry, clips may be in an earlier receipt
        found.append(f"{counts.encoded} samples encoded, but only {counts.clips} clips")
    if len(receipt.rejects) < counts.rejected:
        found.append(f"{counts.rejected} samples rejected, but only {len(receipt.rejects)} rejects give a reason")
    shard = receipt.shard
    if shard.kind == "files" and shard.retry is None and not receipt.same_as and counts.samples != len(shard.objects):
        found.append(f"{len(shard.objects)} plain files, but {counts.samples} samples")
    keys = [key for item in files for key in (item.key, item.index_key)]
    if len(set(keys)) != len(keys):
        found.append("a file is named twice")
    if (receipt.stats is None) != (counts.clips == 0):
        found.append(f"{counts.clips} clips with{'out' if receipt.stats is None else ''} statistics")
    return found


def orphans(store: Store) -> Iterator[ObjectInfo]:
    """Data files and side indexes that no receipt names: work in progress, or left by killed attempts. Compacted files are none of them.

    Lists data before it reads receipts, so that a shard committed meanwhile is not an orphan. Delete only after a grace time.
    """
    ledger = Ledger(store)
    listed = [info for prefix in (DATA, ledger.layout.index) for info in store.list(prefix)]
    listed = [info for info in listed if not info.key.startswith(DELTA_LOG) and f"-{COMPACTED}" not in info.key]
    named = {key for receipt in ledger.all() for item in receipt.files for key in (item.key, item.index_key)}
    yield from (info for info in listed if info.key not in named and not is_foreign_cache(info.key))
