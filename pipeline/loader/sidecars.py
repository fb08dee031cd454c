"""Sidecar sets joined to the rows of a dataset: text embeddings of the captions that are trained with, tensors of rows by id.

What is missing is decided when the loader is made, before the order: refused, left out, or zeros. Rows that are left out enter the
dataset's identity like those that a filter leaves out, so the order stays a function of snapshot, filter and version of the set.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.errors import ConfigError, InputError
from pipeline.loader import arguments
from pipeline.loader.columns import read_columns
from pipeline.loader.filter import digest_of_rows
from pipeline.loader.open_files import OpenFiles
from pipeline.loader.threads import threads
from pipeline.sidecars.names import BY_CAPTION, key_of, split_version
from pipeline.sidecars.reading import SidecarReader
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    import torch

    from pipeline.loader.captions import CaptionRule
    from pipeline.loader.dataset import LatentDataset
    from pipeline.loader.stats import LoaderStats
    from pipeline.sidecars.reading import Position

MISSING = ("error", "drop", "zero")
THREADS = 8
NAMED = 3  # rows that a message names
Tensors = dict[str, dict[str, "list[torch.Tensor]"]]


class Wanted(NamedTuple):
    """One tensor of a set for one or more rows of a batch: where it is, and its place in the block."""

    position: Position
    start: int
    stop: int


def join_sidecars(
    datasets: Sequence[LatentDataset],
    sidecars: str | Sequence[str] | Sequence[Sequence[str]],
    missing: str,
    captions: CaptionRule,
    stats: LoaderStats,
) -> tuple[list[LatentDataset], list[SidecarJoin]]:
    """The datasets with the rows that `missing` leaves, and a join for each. No sets: the datasets as they are, no joins.

    `sidecars`: names of sets, or a list of names for each dataset, whose versions may differ.

    Raises:
        ConfigError: not a policy; a set twice; sets of several datasets that were made differently; no tensors of the empty caption.
        InputError: no such set or version; rows without tensors, with `error`; no row left, with `drop`.
        OutputError: an object of a set that cannot be read.
    """
    if missing not in MISSING:
        raise ConfigError(f"missing_sidecars: expected {', '.join(MISSING)}, got {missing!r}")
    each = _names_of_each(sidecars, len(datasets))
    if not any(each):
        return list(datasets), []
    plain = [[split_version(name)[0] for name in names] for names in each]
    if len(set(plain[0])) < len(plain[0]):
        raise ConfigError(f"sidecars: expected each set once, got {list(each[0])}")
    if any(sorted(other) != sorted(plain[0]) for other in plain):
        raise ConfigError(f"sidecars: expected the same sets for every dataset, got {[list(names) for names in each]}")
    joins = [
        SidecarJoin(dataset, names, missing, captions, stats) for dataset, names in zip(datasets, each, strict=True)
    ]
    for name in plain[0]:
        prints = sorted({join.readers[name].described.fingerprint[:8] for join in joins})
        if len(prints) > 1:
            raise ConfigError(
                f"sidecars: the sets {name} of the datasets were made differently, fingerprints {', '.join(prints)}"
            )
    return [join.dataset for join in joins], joins


def _names_of_each(sidecars: str | Sequence[str] | Sequence[Sequence[str]], count: int) -> list[tuple[str, ...]]:
    """Names of sets for each of `count` datasets."""
    if not isinstance(sidecars, list | tuple) or not sidecars or isinstance(sidecars[0], str):
        return [arguments.texts("sidecars", sidecars)] * count
    found = [arguments.texts("sidecars", names) for names in sidecars]
    if len(found) != count:
        raise ConfigError(
            f"sidecars: expected names, or a list of names for each of {count} datasets, got {sidecars!r}"
        )
    return found


class SidecarJoin:
    """Sets of one dataset. `dataset`: with the rows that are left. `described`: sets, versions and policy, for the loader's state."""

    def __init__(
        self, dataset: LatentDataset, names: Sequence[str], missing: str, captions: CaptionRule, stats: LoaderStats
    ) -> None:
        """Raises as `join_sidecars`."""
        self._missing, self._captions, self._stats = missing, captions, stats
        self._store = dataset.store
        readers = [self._store.patiently(partial(SidecarReader, self._store, name)) for name in names]
        self.readers = {reader.name: reader for reader in readers}
        self.described = [f"{reader.identity}:{missing}" for reader in self.readers.values()]
        self._open = {name: OpenFiles() for name in self.readers}
        self._remote = is_remote(dataset.store.root)
        for reader in self.readers.values():
            needs_empty = captions.dropout and self._by_caption(reader)
            if needs_empty and self._store.patiently(partial(reader.tensors, "")) is None:
                raise ConfigError(
                    f"caption_dropout: sidecar set {reader.name} has no tensors of the empty caption; import them as well"
                )
        self.dataset = dataset if missing == "zero" else self._complete(dataset)

    @staticmethod
    def _by_caption(reader: SidecarReader) -> bool:
        return reader.described.key == BY_CAPTION

    def _complete(self, dataset: LatentDataset) -> LatentDataset:
        """The dataset without rows that lack tensors; itself if none does."""
        unsure = [reader for reader in self.readers.values() if not self._covers(reader, dataset)]
        lacking: dict[int, np.ndarray] = {}
        if unsure:
            with threads(THREADS, "sidecars") as pool:
                found = pool.map(lambda number: self._lacking(dataset, number, unsure), range(len(dataset.files)))
                lacking = {number: rows for number, rows in enumerate(found) if len(rows)}
        count = sum(map(len, lacking.values()))
        if count and self._missing == "error":
            self._refuse(dataset, lacking, count, unsure)
        kept = {number: np.setdiff1d(dataset.counted(number), rows) for number, rows in lacking.items()}
        self._stats.add(sidecars_dropped=count)
        if self._missing == "drop":
            label = f":with {','.join(self.readers)}:{digest_of_rows(kept)}"
            dataset = dataset.narrowed(kept, label)
            if not dataset.places:
                raise InputError(
                    f"no row of {self._store.root} has tensors in {self._versions(unsure)}; run `lathe embed`"
                )
        return dataset

    def _covers(self, reader: SidecarReader, dataset: LatentDataset) -> bool:
        """Whether the version says that every row of the snapshot has its tensors."""
        sources = self._captions.sources if self._by_caption(reader) else ()
        return any(
            one.snapshot == dataset.snapshot
            and one.fingerprint == dataset.spec.fingerprint
            and all(name in one.captions or _is_among(name, one.captions) for name in sources)
            for one in reader.version.covers
        )

    def _lacking(self, dataset: LatentDataset, number: int, readers: list[SidecarReader]) -> np.ndarray:
        """Positions in a file of rows that count and lack a tensor of one of the sets, int32."""
        positions = dataset.counted(number)
        if (
            self._missing == "error" and dataset.takedowns
        ):  # what is hidden is not read; the order of `drop` must not depend on it
            hidden = dataset.indexes.read(number).hidden(dataset.takedowns)
            positions = positions if hidden is None else positions[~hidden[positions]]
        table = dataset.indexes.columns(number, ["id", "caption"]).take(positions)
        ids, captions = table["id"].to_pylist(), table["caption"].to_pylist()
        gone = np.zeros(len(positions), bool)
        texts: list[list[str]] | None = None
        for reader in readers:
            if not self._by_caption(reader):
                gone |= ~reader.has([key_of(name) for name in ids])
                continue
            if texts is None:
                columns = self._columns(dataset, number, positions)
                texts = [self._captions.candidates(*each) or [""] for each in zip(captions, columns, strict=True)]
            has = reader.has([key_of(text) for each in texts for text in each])
            starts = np.cumsum([0, *(len(each) for each in texts[:-1])])
            gone |= ~np.logical_and.reduceat(has, starts) if len(texts) else False
        return positions[gone]

    def _columns(self, dataset: LatentDataset, number: int, positions: np.ndarray) -> list[dict[str, Any]]:
        """Columns that captions come from, of rows of a file."""
        if not (names := self._captions.columns):
            return [{}] * len(positions)
        tar = dataset.files.value("key", number).endswith(".tar")
        index = dataset.indexes.read(number) if tar else None
        rows: list[dict[str, Any]] = read_columns(
            dataset.store, dataset.files, number, index, names, positions
        ).to_pylist()
        for row in rows:
            if "metadata" in row:
                row["metadata"] = json.loads(row["metadata"])
        return rows

    def _refuse(
        self, dataset: LatentDataset, lacking: dict[int, np.ndarray], count: int, readers: list[SidecarReader]
    ) -> None:
        number, rows = next(iter(lacking.items()))
        ids = dataset.indexes.columns(number, ["id"])["id"].take(rows[:NAMED]).to_pylist()
        total = sum(dataset.buckets.values())
        raise InputError(
            f"{count} of {total} rows of {dataset.identity} have no tensors in {self._versions(readers)}, such as {', '.join(ids)}; run "
            '`lathe embed` again, or give missing_sidecars="drop" or "zero"'
        )

    @staticmethod
    def _versions(readers: Sequence[SidecarReader]) -> str:
        return ", ".join(f"{reader.name}@{reader.number}" for reader in readers)

    def tensors(
        self,
        ids: Sequence[str],
        captions: Sequence[str],
        pool: Executor,
        move: Callable[[torch.Tensor], torch.Tensor],
        *,
        verify: bool,
    ) -> Tensors:
        """Tensors of each row by set and name, in their stored type and true shape, on the device of `move`.

        Args:
            ids: of the rows.
            captions: that each row trains with.
            pool: threads for reads over a network.
            move: puts bytes on the device.
            verify: check hashes.

        Raises:
            InputError: a row without tensors, unless zeros are given.
            OutputError: damaged bytes.
            StorageUnavailable: the store failed for too long.
        """
        found: Tensors = {}
        for name, reader in self.readers.items():
            keys = [key_of(text) for text in (captions if self._by_caption(reader) else ids)]
            positions = reader.find(keys)
            lacking = [i for i, position in enumerate(positions) if position is None]
            if lacking and self._missing != "zero":
                raise InputError(
                    f"row {ids[lacking[0]]} has no tensors in {name}@{reader.number}; run `lathe embed` again"
                )
            self._stats.add(sidecars_missing=len(lacking))
            files = {position.file for position in positions if position is not None}
            missing = [file for file in files if not reader.held(file)]
            list(pool.map(lambda file, reader=reader: reader.load([file]), missing))
            found[name] = {
                tensor: self._read(reader, tensor, positions, pool, move, verify=verify)
                for tensor in reader.described.tensors
            }
        return found

    def _read(
        self,
        reader: SidecarReader,
        tensor: str,
        positions: list[Position | None],
        pool: Executor,
        move: Callable[[torch.Tensor], torch.Tensor],
        *,
        verify: bool,
    ) -> list[torch.Tensor]:
        import torch

        kind = reader.described.tensors[tensor]
        zeros = tuple(1 if size is None else size for size in kind.shape)
        dtype: torch.dtype = getattr(torch, kind.dtype)
        wanted: dict[Position | None, Wanted | slice] = {}
        shapes, end = {}, 0
        for position in dict.fromkeys(positions):  # rows that share a caption share its bytes
            place = None if position is None else reader.place(position, tensor)
            length = int(np.prod(zeros)) * dtype.itemsize if place is None else place.length
            shapes[position] = zeros if place is None else place.shape
            wanted[position] = slice(end, end + length) if position is None else Wanted(position, end, end + length)
            end += length
        block = np.zeros(end, np.uint8)

        def read(item: Wanted) -> None:
            view = block[item.start : item.stop].data
            file, start = item.position.file, reader.place(item.position, tensor).offset
            files, opened = self._open[reader.name], lambda: self._store.open_reader(reader.data_key(file))
            done = self._store.patiently(lambda: files.read_into(file, opened, start, [view]))
            if verify or done < len(view):
                reader.check(view[:done], item.position, tensor)

        items = [item for item in wanted.values() if isinstance(item, Wanted)]
        list(pool.map(read, items) if self._remote else map(read, items))
        moved = move(torch.from_numpy(block))
        parts = {}
        for position, item in wanted.items():
            part = moved[item.start : item.stop]
            # torch does not view an empty array of bytes as another type
            typed = part.view(dtype) if part.numel() else part.to(dtype)
            parts[position] = typed.view(shapes[position])
        return [parts[position] for position in positions]

    def close(self) -> None:
        """Closes open files."""
        for one in self._open.values():
            one.clear()


def _is_among(source: str, captions: Sequence[str]) -> bool:
    """Whether all captions of a row, if they are among `captions`, are also those of `source`."""
    return source.startswith("captions.") and "captions" in captions
