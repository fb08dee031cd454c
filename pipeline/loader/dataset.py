"""`LatentDataset`: the rows of one snapshot of an output that count, of one network. Counts, single rows, rows in file order."""

from __future__ import annotations

import copy
import functools
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import StorageConfig
from pipeline.errors import ConfigError, InputError
from pipeline.format.columns import SCALARS
from pipeline.format.stored import LATENT, LOGVAR, OPTIONAL
from pipeline.ledger.addresses import open_output
from pipeline.ledger.copies import NO_COPIES
from pipeline.ledger.snapshots import published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import Takedowns, read_takedowns
from pipeline.loader.arguments import integer, texts
from pipeline.loader.buckets import Bucket, make_buckets
from pipeline.loader.columns import ColumnCache
from pipeline.loader.fetch import Fetcher
from pipeline.loader.file_index import IndexCache
from pipeline.loader.file_rows import rows_of_file
from pipeline.loader.files import DataFiles, published_files, received_files
from pipeline.loader.filter import digest_of_rows, filtered_rows
from pipeline.loader.ranges import bounds_of_files
from pipeline.loader.spec import DatasetSpec
from pipeline.loader.threads import threads
from pipeline.operate.inspect import file_metadata
from pipeline.storage import open_store

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pipeline.loader.expression import Path
    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.map_style import LatentRows
    from pipeline.loader.ranges import Bounds
    from pipeline.loader.row import Row
    from pipeline.storage import Store

OPENING_THREADS = 8


class LatentDataset:
    """`spec`: network and storage type. `snapshot`: its number, None with `receipts=True`. `identity`: snapshot and filter as text.

    `places`: by bucket, where its rows lie. `columns`: names of scalar columns that rows and batches carry. `others`: which of
    `first_frame` and `i2v_cond` they carry.
    """

    def __init__(
        self,
        store: Store,
        files: DataFiles,
        snapshot: int | None,
        where: str | None,
        columns: str | Sequence[str],
        threads: int,
    ) -> None:
        """Use `open`."""
        columns, threads = texts("columns", columns), integer("threads", threads, 1)
        if not len(files):
            raise InputError(f"{store.root} has no row{'' if snapshot is None else f' in snapshot {snapshot}'}")
        self.store, self.files, self.snapshot, self.where = store, files, snapshot, where
        self._threads = threads
        self.columns = tuple(name for name in columns if name in SCALARS)
        first = files.value("key", 0)
        self.spec = DatasetSpec.from_metadata(store.patiently(lambda: file_metadata(store, first)))
        there = [name for name in self.spec.stored if name not in (LATENT, LOGVAR)]
        known = (*SCALARS, *OPTIONAL, *(name for name in there if name not in OPTIONAL))
        if unknown := [name for name in columns if name not in known]:
            raise ConfigError(f"columns: no column {unknown[0]}; there are {', '.join(known)}")
        if lacking := [name for name in columns if name in OPTIONAL and name not in there]:
            raise ConfigError(f"columns: {store.root} does not store {lacking[0]}; encode with --store {lacking[0]}")
        self.takedowns = Takedowns()
        self._start()
        self.takedowns = self.read_takedowns()
        self._kept = None
        if where is not None:
            options = self.indexes, self.bounds, where, threads, self.spec.members
            self._kept = filtered_rows(store, files, *options)
        self.identity = files.identity
        if where is not None and self._kept is not None:
            self.identity += f":{where.strip()}:{digest_of_rows(self._kept)}"
        self.carry([name for name in there if name in columns])
        self.places = self._buckets()

    def carry(self, others: Sequence[str]) -> None:
        """Sets `others`, in the order of a file.

        Raises:
            ConfigError: rows lack one of these paired videos.
        """
        counts = self._kept_counts()
        for name in (name for name in others if name in self.spec.members):
            has = self.bounds[name,].low.to_numpy(zero_copy_only=False)
            if lacking := int(counts[~has].sum()):
                raise ConfigError(
                    f"{lacking} of {int(counts.sum())} rows of {self.store.root} have no {name}; take the others alone by "
                    f'where "{name} is not null", or these by "{name} is null"'
                )
        self.others = tuple(others)

    def _kept_counts(self) -> np.ndarray:
        """Rows of each file that snapshot and filter leave, int64."""
        counts = self.files.counts()
        for number, positions in (self._kept or {}).items():
            counts[number] = len(positions)
        return counts

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike[str],
        snapshot: int | str = "latest",
        where: str | None = None,
        columns: str | Sequence[str] = (),
        receipts: bool = False,
        *,
        fingerprint: str | None = None,
        storage: StorageConfig | None = None,
        threads: int = OPENING_THREADS,
    ) -> LatentDataset:
        """Opens a snapshot of the output at `uri`, a path or `s3://bucket/prefix`, which may end in `@3`.

        Args:
            uri: the output.
            snapshot: its number, or `latest`.
            where: SQL expression over the columns of docs/formats.md and keys of the metadata, `"fps >= 24 and metadata.aesthetic > 5"`;
                of paired videos `"control is not null"`.
            columns: scalar columns to read for each row, such as `metadata`; `first_frame`, `i2v_cond` and paired videos where they
                are stored. Id, caption and frames are there without.
            receipts: take what receipts name at present, not a snapshot; also of a build that still runs.
            fingerprint: first digits of the fingerprint to read, where there are several.
            storage: options of the object store.
            threads: for reading indexes and columns while opening.

        While a mount fails, its reads are made again for `storage.patience_s`.

        Raises:
            InputError: nothing published (run `lathe publish`), no such snapshot, no row, several fingerprints.
            ConfigError: an unknown column, a filter that cannot be evaluated.
            OutputError: not an output, or a manifest that cannot be read.
        """
        uri, config = os.fspath(uri), storage or StorageConfig()
        store, number = open_store(uri, config).patiently(lambda: open_output(uri, config))
        if snapshot != "latest":
            if not str(snapshot).isdecimal() or number not in (None, int(snapshot)):
                raise ConfigError(f"snapshot: expected latest or a number, once, got {snapshot!r} for {uri}")
            number = int(snapshot)
        if receipts:
            if number is not None:
                raise ConfigError("receipts: reads what is there now, so there is no number of a snapshot to give")
            files = store.patiently(lambda: received_files(store, fingerprint))
            return cls(store, files, None, where, columns, threads)
        files, number = store.patiently(lambda: published_files(store, number, fingerprint))
        return cls(store, files, number, where, columns, threads)

    def _buckets(self) -> dict[str, Bucket]:
        return make_buckets(self.files, self.spec, self._kept or {}, lambda: self.bounds["num_frames",], self._lengths)

    def narrowed(self, kept: dict[int, np.ndarray], label: str) -> LatentDataset:
        """A copy with fewer rows: of files in `kept` those at these positions, some of `counted`. `label` is added to its identity."""
        made = copy.copy(self)
        made._kept = {**(self._kept or {}), **kept}
        made.identity, made._counts = f"{self.identity}{label}", None
        made.places = made._buckets()
        return made

    def counted(self, number: int) -> np.ndarray:
        """Positions of rows of a file that snapshot and filter leave, int32, ascending; also of those taken down since."""
        found = (self._kept or {}).get(number)
        found = self.files.positions(number) if found is None else found
        return np.arange(self.files.value("file_rows", number), dtype=np.int32) if found is None else found

    def _start(self) -> None:
        self.indexes = IndexCache(self.store, self.files, self.spec.stored)
        self.scalars = ColumnCache(self.store, self.files)
        self.fetcher = Fetcher(self.store, self.files)
        self._counts: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy hides the rows that this one hides, so that numbers of rows mean the same in another process.
        left_out = ("bounds", "indexes", "scalars", "fetcher", "_counts")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    @property
    def buckets(self) -> dict[str, int]:
        """Rows of each bucket, by name (`17x256x256`), as published: rows taken down since count here."""
        return {name: len(bucket) for name, bucket in self.places.items()}

    @functools.cached_property
    def bounds(self) -> dict[Path, Bounds]:
        """What the manifest says of the values in each file."""
        return bounds_of_files(self.files, self.spec.members)

    def __len__(self) -> int:
        """Rows that may be read: without those taken down since the snapshot."""
        return int(self.row_counts().sum())

    def row_counts(self) -> np.ndarray:
        """Rows of each file that may be read, int64. Reads the indexes of files that new takedowns may concern."""
        if self._counts is None:
            counts = self._kept_counts()
            for number in self._touched():
                counts[number] = len(self._positions(number, self.indexes.get(number)))
            self._counts = counts
        return self._counts

    def look_for_takedowns(self) -> bool:
        """Applies takedowns that were recorded since the last look. Whether there were some. Raises as `read_takedowns`."""
        return self.apply_takedowns(self.read_takedowns())

    def apply_takedowns(self, found: Takedowns) -> bool:
        """Hides the rows that these hide, and no others. Whether they are other ones than before."""
        if [item.key for item in found.records] == [item.key for item in self.takedowns.records]:
            return False
        self.takedowns, self._counts = found, None
        return True

    def read_takedowns(self) -> Takedowns:
        """Takedowns that the snapshot does not have applied, as they are now. Reads the records that this dataset does not know yet."""
        return self.store.patiently(
            lambda: read_takedowns(self.store, known=self.takedowns, without=self.files.applied)
        )

    def row(self, name: str) -> Row:
        """The row with this id, with its tensors.

        Raises:
            InputError: no such row in this dataset.
            ConfigError: `name` is not text.
        """
        if not isinstance(name, str):
            raise ConfigError(
                f"row: expected the id of a row, a str, got {name!r}; rows by number: as_map_dataset()[i]"
            )
        ids = self.bounds["id",]
        outside = pc.or_(pc.less(name, ids.low), pc.greater(name, ids.high))
        for number in np.flatnonzero(~pc.fill_null(outside, False).to_numpy(zero_copy_only=False)).tolist():
            index = self.indexes.get(number)
            position = index.find(name)
            if position is not None and position in self._positions(number, index):
                return next(rows_of_file(self, number, index, np.array([position])))
        raise InputError(
            f"{self.store.root} has no row {name!r} in this dataset: not published, filtered out or taken down"
        )

    def __iter__(self) -> Iterator[Row]:
        """`rows()`."""
        return self.rows()

    def rows(self, *, tensors: bool = True) -> Iterator[Row]:
        """Every row once, file by file in the order of the manifest; at most one index and 32 MiB of tensors (or one tensor) are held.

        Raises:
            InputError: a tensor whose bytes are not the recorded ones.
        """
        for number in range(len(self.files)):
            index = self.indexes.read(number)
            if len(positions := self._positions(number, index)):
                yield from rows_of_file(self, number, index, positions, tensors=tensors)

    def placed(self) -> Iterator[tuple[int, int, Row]]:
        """Rows without tensors in the order of `rows`, each with its place for `rows_of`: number of the file, which of its rows."""
        for number in range(len(self.files)):
            index = self.indexes.read(number)
            positions = self._positions(number, index)
            if len(positions):
                rows = rows_of_file(self, number, index, positions, tensors=False)
                yield from ((number, place, row) for place, row in enumerate(rows))

    def rows_of(self, number: int, places: np.ndarray) -> Iterator[Row]:
        """Rows of one file with their tensors: the `places`-th of those that may be read, in the order given. Raises as `rows`."""
        index = self.indexes.get(number)
        return rows_of_file(self, number, index, self._positions(number, index)[places])

    def file_uris(self) -> list[str]:
        """URIs of all data files, for other readers. They also see rows that do not count, see `hidden_rows`."""
        return [self.store.uri(key) for key in self.files.table["key"].to_pylist()]

    def hidden_rows(self) -> set[tuple[str, str]]:
        """Rows in these files that other readers must leave out: superseded, taken down, filtered out. By URI of the file and id: if two
        runs encoded one source, a row of the same id counts in another file.
        """
        found: set[tuple[str, str]] = set()
        for number in sorted({*self.files.hidden, *(self._kept or {}), *self._touched()}):
            index, uri = self.indexes.get(number), self.store.uri(self.files.value("key", number))
            gone = np.setdiff1d(np.arange(len(index)), self._positions(number, index))
            found.update((uri, str(index.text("id", row))) for row in gone.tolist())
        return found

    def as_map_dataset(self) -> LatentRows:
        """The rows as a map-style dataset for `torch.utils.data.DataLoader`."""
        from pipeline.loader.map_style import LatentRows

        return LatentRows(self)

    def close(self) -> None:
        """Closes open files."""
        self.fetcher.close()

    def _positions(self, number: int, index: FileIndex) -> np.ndarray:
        """Rows of a file that may be read, ascending."""
        found = self.counted(number)
        gone = index.hidden(self.takedowns)
        return found if gone is None else found[~gone[found]]

    def _lengths(self, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """Frames of every row of the given files, from their indexes."""
        numbers = list(numbers)

        def read(number: int) -> np.ndarray:
            return self.indexes.columns(number, ["num_frames"])["num_frames"].to_numpy()

        with threads(self._threads, "lengths") as pool:
            return dict(zip(numbers, pool.map(read, numbers), strict=True))

    def _touched(self) -> list[int]:
        """Files of shards that have a source which a new takedown names."""
        if not self.takedowns:
            return []
        return self.store.patiently(self._named_files)

    def _named_files(self) -> list[int]:
        named = self.takedowns.uri_ids()
        shards = [item.shard_id for item in Summaries(self.store).all() if not named.isdisjoint(item.uri_ids())]
        named_shards = pa.array(shards, pa.string())
        number = self.files.copies_of  # not the newest snapshot, which may name other files
        copies = NO_COPIES if number is None else published_copies(self.store, number)
        compacted = pa.array(copies.places(named_shards), pa.string())
        table = self.files.table
        mine = pc.or_(pc.is_in(table["shard_id"], named_shards), pc.is_in(table["key"], compacted))
        found: list[int] = np.flatnonzero(mine.to_numpy()).tolist()
        return found
