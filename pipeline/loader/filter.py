"""Filter of a dataset's rows by an SQL expression over their columns and their metadata, evaluated by DuckDB (ADR 17).

Only the columns that the expression names are read: from the manifest, from the byte index, or from the data file without its tensors.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError
from pipeline.format.columns import SCALARS
from pipeline.loader.columns import read_columns

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.loader.file_index import IndexCache
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store

COLUMNS = ("id", *SCALARS)
Path = tuple[str, ...]
"""A column; for metadata, the keys below it."""


def filtered_rows(
    store: Store, files: DataFiles, indexes: IndexCache, where: str, threads: int
) -> dict[int, np.ndarray]:
    """By file number, the positions (int32, ascending) of rows that count and for which `where` is true; every file has an entry.

    Raises:
        ConfigError: DuckDB is not installed; not an expression over one row; a column or key of metadata that no row has.
    """
    paths = named_columns(where)
    if not len(files):
        return {}
    wanted = sorted({path[0] for path in paths if path[0] not in ("bucket", "fingerprint")})

    def read(number: int) -> tuple[np.ndarray, list[pa.Array]]:
        found: dict[str, Any] = {name: pa.array([files.value(name, number)]) for name in ("bucket", "fingerprint")}
        index = indexes.read(number) if wanted else None
        rows = int(files.value("file_rows", number)) if index is None else len(index)
        found = {name: pa.repeat(value[0], rows) for name, value in found.items()}
        if index is not None:
            found |= {name: column for name in wanted if (column := index.column(name)) is not None}
            if missing := [name for name in wanted if name not in found]:
                table = read_columns(store, files, number, index, missing)
                found |= {name: table[name].combine_chunks() for name in missing}
        kept = files.positions(number)
        positions = np.arange(rows, dtype=np.int32) if kept is None else kept
        return positions, [_values(found[path[0]].take(pa.array(positions)), path) for path in paths]

    with ThreadPoolExecutor(threads, thread_name_prefix="filter") as pool:
        parts = list(pool.map(read, range(len(files))))
    counts = np.array([len(positions) for positions, _ in parts])
    table = _table(
        paths, [_joined([columns[n] for _, columns in parts], path) for n, path in enumerate(paths)], int(counts.sum())
    )
    mask = _evaluate(where, table)
    return {
        number: positions[mask[end - len(positions) : end]]
        for number, ((positions, _), end) in enumerate(zip(parts, np.cumsum(counts).tolist(), strict=True))
    }


def digest_of_rows(kept: dict[int, np.ndarray]) -> str:
    """Hash of the rows that a filter left: another version of DuckDB cannot change them unnoticed."""
    digest = hashlib.blake2b(digest_size=8)
    for number, positions in sorted(kept.items()):
        digest.update(
            number.to_bytes(8, "little") + len(positions).to_bytes(8, "little") + positions.astype("<i4").tobytes()
        )
    return digest.hexdigest()


def named_columns(where: str) -> list[Path]:
    """Columns that an expression names, spelled as in files; metadata with the keys below it.

    Raises:
        ConfigError: not one expression over the columns of one row, or an unknown column.
    """
    connection = _connect()
    (text,) = connection.execute("select json_serialize_sql(?)", [f"select 1 from rows where ({where})"]).fetchone()
    parsed = json.loads(text)
    if parsed["error"]:
        raise ConfigError(f"where: {where!r} is not an SQL expression: {parsed['error_message']}")
    nodes = list(_nodes(parsed))
    selects = sum(node.get("type") == "SELECT_NODE" for node in nodes)
    if len(parsed["statements"]) != 1 or selects != 1 or parsed["statements"][0]["node"]["modifiers"]:
        raise ConfigError(
            f"where: expected an expression over the columns of one row, without subqueries, got {where!r}"
        )
    volatile = {
        name for (name,) in connection.execute(
            "select distinct function_name from duckdb_functions() where stability <> 'CONSISTENT'"
        ).fetchall()
    }  # fmt: skip
    if changing := sorted({node["function_name"] for node in nodes if node.get("function_name") in volatile}):
        raise ConfigError(
            f"where: {changing[0]}() gives other values at each call, so that the order could not be repeated"
        )
    found = {tuple(node["column_names"]) for node in nodes if node.get("class") == "COLUMN_REF"}
    return sorted({_spelled(path) for path in found})


def _spelled(path: Path) -> Path:
    name = next((known for known in COLUMNS if known == path[0].lower()), None)
    if name is None or (len(path) > 1 and name != "metadata"):
        raise ConfigError(
            f"where: no column {'.'.join(path)}; there are {', '.join(COLUMNS)}, and keys of metadata as metadata.KEY"
        )
    return (name, *path[1:])


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            yield from _nodes(item)


def _values(column: pa.Array, path: Path) -> pa.Array:
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
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        raise _mixed(path) from None


def _joined(parts: list[pa.Array], path: Path) -> pa.ChunkedArray:
    """Values of all files as one type: whole numbers become float64 where another file has fractions."""
    kinds = {part.type for part in parts if part.type != pa.null()}
    if not kinds and len(path) > 1:
        raise ConfigError(f"where: no row has {'.'.join(path)}")
    if kinds == {pa.int64(), pa.float64()}:
        kinds = {pa.float64()}
    if len(kinds) > 1:
        raise _mixed(path)
    kind = kinds.pop() if kinds else pa.null()
    return pa.chunked_array([part.cast(kind) for part in parts], kind)


def _mixed(path: Path) -> ConfigError:
    return ConfigError(
        f"where: {'.'.join(path)} has values of several types; cast the text yourself: metadata->>'$.{'.'.join(path[1:])}'"
    )


def _table(paths: list[Path], columns: list[pa.ChunkedArray], rows: int) -> pa.Table:
    tree: dict[str, Any] = {}
    for path, column in zip(paths, columns, strict=True):
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ConfigError(f"where: names both {key} and a key of it; name one of them")
        if path[-1] in place:
            raise ConfigError(f"where: names both {'.'.join(path)} and a key of it; name one of them")
        place[path[-1]] = column.combine_chunks()
    made = {name: _struct(value) for name, value in tree.items()}
    return pa.table({**made, "lathe_row": pa.array(np.arange(rows))})


def _struct(value: Any) -> pa.Array:
    if isinstance(value, pa.ChunkedArray):
        return value.combine_chunks()
    if not isinstance(value, dict):
        return value
    return pa.StructArray.from_arrays([_struct(item) for item in value.values()], names=list(value))


def _evaluate(where: str, rows: pa.Table) -> np.ndarray:
    import duckdb

    connection = _connect()
    connection.register("rows", rows)
    try:
        found = connection.execute(f"select lathe_row from rows where ({where})").fetchnumpy()["lathe_row"]
    except duckdb.Error as error:
        raise ConfigError(f"where: {where!r}: {str(error).splitlines()[0]}") from None
    mask = np.zeros(rows.num_rows, bool)
    mask[np.asarray(found, np.int64)] = True
    return mask


def _connect() -> Any:
    try:
        import duckdb
    except ImportError:
        raise ConfigError("where: needs DuckDB, which is not installed; run `pip install lathe[filter]`") from None
    return duckdb.connect(config={"enable_external_access": "false", "threads": "2"})
