"""Filter of a dataset's rows by an SQL expression over their columns and their metadata, evaluated by DuckDB (ADR 17).

Files that the manifest decides are not read. Of the others only the columns that the expression names are read: from the byte index, or
from the data file without its tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.loader.columns import read_columns
from pipeline.loader.expression import FRAMES_BUCKET, Expression, connect
from pipeline.loader.file_index import TEXTS
from pipeline.loader.threads import threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pipeline.loader.expression import Path
    from pipeline.loader.file_index import IndexCache
    from pipeline.loader.files import DataFiles
    from pipeline.loader.ranges import Bounds
    from pipeline.storage import Store

INDEXED = (*TEXTS, "num_frames")
_INT64 = range(-(2**63), 2**63)


def filtered_rows(
    store: Store,
    files: DataFiles,
    indexes: IndexCache,
    bounds: Mapping[Path, Bounds],
    where: str,
    threads: int,
    members: Sequence[str] = (),
) -> dict[int, np.ndarray]:
    """Rows that count and for which `where` is true: by file number, their positions, int32, ascending. Without files that keep all rows.
    `members`: names of paired videos, which `where` may test for null.

    Raises:
        ConfigError: DuckDB is not installed; not an expression over one row; a column or key of metadata that no row has; no row is left.
    """
    expression = Expression(where, members)
    counts = files.counts()
    sure, possible = _decided(expression, bounds, len(files))
    none = np.zeros(0, np.int32)
    kept = dict.fromkeys(np.flatnonzero(~possible & (counts > 0)).tolist(), none)
    undecided = np.flatnonzero(possible & ~sure & (counts > 0)).tolist()
    for number, positions in _Rows(store, files, indexes, bounds, expression, threads).matching(undecided).items():
        if len(positions) < counts[number]:
            kept[number] = positions
    if sum(map(len, kept.values())) + counts.sum() == sum(counts[number] for number in kept):
        names = ", ".join(sorted(files.buckets()))
        raise ConfigError(f"where: {where!r} matches no row of {store.root}, whose buckets are {names}")
    return kept


def digest_of_rows(kept: dict[int, np.ndarray]) -> str:
    """Hash of the rows that a filter left: another version of DuckDB cannot change them unnoticed."""
    digest = hashlib.blake2b(digest_size=8)
    for number, positions in sorted(kept.items()):
        digest.update(
            number.to_bytes(8, "little") + len(positions).to_bytes(8, "little") + positions.astype("<i4").tobytes()
        )
    return digest.hexdigest()


def _decided(expression: Expression, bounds: Mapping[Path, Bounds], count: int) -> tuple[np.ndarray, np.ndarray]:
    """By file, bool: whether `where` is true of all rows, and whether it may be true of one."""
    known = [path for path in expression.columns if path in bounds]
    columns: dict[str, Any] = {"lathe_row": pa.array(np.arange(count))}
    complete = np.ones(count, bool)
    for path in known:
        found = bounds[path]
        columns |= {expression.name(path, "low"): found.low, expression.name(path, "high"): found.high}
        if path != FRAMES_BUCKET:
            complete &= found.low.is_valid().to_numpy(zero_copy_only=False)
    table = pa.table(columns)
    sure, possible = (_true_of(text, table, expression) for text in expression.over_files)
    return sure & complete, possible | ~complete


class _Rows:
    """Columns that an expression names, of rows that count."""

    def __init__(
        self,
        store: Store,
        files: DataFiles,
        indexes: IndexCache,
        bounds: Mapping[Path, Bounds],
        expression: Expression,
        threads: int,
    ) -> None:
        self._store, self._files, self._indexes, self._threads = store, files, indexes, threads
        self._bounds, self._expression = bounds, expression
        self._constant = {
            path: bounds[path].constant().to_numpy(zero_copy_only=False)
            for path in expression.columns
            if path in bounds
        }

    def matching(self, numbers: list[int]) -> dict[int, np.ndarray]:
        """Positions of rows for which the expression is true, by file. Raises as `filtered_rows`."""
        if not numbers:
            return {}
        paths = self._expression.columns
        with threads(self._threads, "filter") as pool:
            parts = list(pool.map(lambda number: self._read(number, paths), numbers))
        counts = [len(positions) for positions, _ in parts]
        table: dict[str, Any] = {"lathe_row": pa.array(np.arange(sum(counts)))}
        for n, path in enumerate(paths):
            column = _joined([columns[n] for _, columns in parts], path)
            if len(path) > 1 and column.type == pa.null() and path not in self._expression.optional:
                self._find_key(path, set(numbers))
            table[self._expression.name(path)] = column
        mask = _true_of(self._expression.over_rows, pa.table(table), self._expression)
        ends = np.cumsum(counts).tolist()
        return {
            number: positions[mask[end - len(positions) : end]]
            for number, (positions, _), end in zip(numbers, parts, ends, strict=True)
        }

    def _find_key(self, path: Path, known: set[int]) -> None:
        """Raises ConfigError if no row has this key of metadata, also not in files that the manifest decided."""
        for number in range(len(self._files)):
            if number not in known and any(value.null_count < len(value) for value in self._read(number, [path])[1]):
                return
        name = ".".join(path)
        raise ConfigError(
            f"where: no row has {name}; if only some outputs have it, write `{name} is not null and ...` or coalesce({name}, ...)"
        )

    def _read(self, number: int, paths: list[Path]) -> tuple[np.ndarray, list[Any]]:
        """Positions that count in a file, and their values by path: an array, or a list where they have several types."""
        kept = self._files.positions(number)
        positions = np.arange(self._files.value("file_rows", number), dtype=np.int32) if kept is None else kept
        constant = [path in self._constant and bool(self._constant[path][number]) for path in paths]
        wanted = {
            "num_frames" if path == FRAMES_BUCKET else path[0]
            for path, same in zip(paths, constant, strict=True)
            if not same
        }
        found = self._columns(number, sorted(wanted), positions)
        values: list[Any] = []
        for path, same in zip(paths, constant, strict=True):
            if same:
                values.append(pa.repeat(self._bounds[path].low[number], len(positions)))
            elif path == FRAMES_BUCKET:
                size = self._files.value("bucket", number).partition("x")[2]
                values.append(pa.array([f"{frames}x{size}" for frames in found["num_frames"].to_pylist()], pa.string()))
            else:
                values.append(_values(found[path[0]], path))
        return positions, values

    def _columns(self, number: int, names: list[str], positions: np.ndarray) -> dict[str, pa.Array]:
        """From the index if it has all of them, else from the data file, with the index only if that is a tar."""
        if not names:
            return {}
        if set(names) <= set(INDEXED):
            table = self._indexes.columns(number, names).take(pa.array(positions))
        else:
            index = self._indexes.read(number) if self._files.value("key", number).endswith(".tar") else None
            table = read_columns(self._store, self._files, number, index, names, positions)
        return {name: table[name].combine_chunks() for name in names}


def _values(column: pa.Array, path: Path) -> Any:
    """The column, or the values of a key of metadata; null where a row lacks it."""
    if len(path) == 1:
        return column
    found = []
    for text in column.to_pylist():
        value: Any = json.loads(text)
        for key in path[1:]:
            value = value.get(key) if isinstance(value, dict) else None
        found.append(value)
    try:
        return pa.array(found)
    except (pa.ArrowException, OverflowError):
        return found


def _joined(parts: list[Any], path: Path) -> pa.ChunkedArray:
    """Values of all files as one type: whole numbers become float64 where others have fractions, decimals where they exceed int64."""
    kinds = {part.type if isinstance(part, pa.Array) else None for part in parts} - {pa.null()}
    if len(kinds) > 1 or None in kinds:
        values = [value for part in parts for value in (part.to_pylist() if isinstance(part, pa.Array) else part)]
        parts = [_typed(values, path)]
        kinds = {parts[0].type}
    kind = kinds.pop() if kinds else pa.null()
    if clashing := next(_clashing(kind), None):
        raise ConfigError(
            f"where: {'.'.join(path)} has keys that differ in case only ({clashing}), which SQL does not tell apart; name the key: "
            f"{'.'.join(path)}.{clashing}"
        )
    return pa.chunked_array([part.cast(kind) for part in parts], kind)


def _typed(values: list[Any], path: Path) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    try:
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif kinds == {int} and not all(value is None or value in _INT64 for value in values):
            return pa.array(values, pa.decimal128(38, 0))
        if not all(math.isfinite(value) for value in values if isinstance(value, float)):
            raise OverflowError
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        name = f"metadata->>'$.{'.'.join(path[1:])}'"
        raise ConfigError(
            f"where: {'.'.join(path)} has values of several types, or numbers of more than 38 digits; cast the text yourself: {name}"
        ) from None


def _clashing(kind: pa.DataType) -> Iterator[str]:
    """Names of fields of which a struct has several that differ in case only."""
    if pa.types.is_list(kind):
        yield from _clashing(kind.value_type)
    if pa.types.is_struct(kind):
        names = [field.name for field in kind]
        folded = [name.casefold() for name in names]
        yield from (name for name in names if folded.count(name.casefold()) > 1)
        for field in kind:
            yield from _clashing(field.type)


def _true_of(text: str, rows: pa.Table, expression: Expression) -> np.ndarray:
    """By row, bool: whether an expression over these columns is true, not false and not null."""
    import duckdb

    connection = connect()
    connection.register("rows", rows)
    try:
        found = connection.execute(f"select lathe_row from rows where {text}").fetchnumpy()["lathe_row"]
    except duckdb.Error as error:
        message = str(error).splitlines()[0]
        for path in expression.columns:
            shown = "bucket" if path == FRAMES_BUCKET else ".".join(path)
            for name in (expression.name(path, bound) for bound in ("low", "high", "")):
                message = message.replace(f'"{name}"', shown).replace(name, shown)
        raise ConfigError(f"where: {expression.where!r}: {message}") from None
    mask = np.zeros(rows.num_rows, bool)
    mask[np.asarray(found, np.int64)] = True
    return mask
