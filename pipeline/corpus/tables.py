"""Reader of tables that list or annotate inputs: `.parquet`, `.csv`, `.tsv`, `.jsonl`, `.ndjson` as rows of source, key and JSON text.

Reads row by row, in bounded memory. The text of a row has sorted names, so that equal rows have equal text in every format; numbers of CSV
stay text, times of Parquet become text to the microsecond, with and without pandas. A table that cannot be read as a whole is an error
before anything starts.
"""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import TableConfig

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")
SOURCES = ("source", "source_uri", "path", "uri", "file", "file_name", "video", "video_path", "media_path")
CAPTIONS = ("caption", "text", "prompt", "captions")  # as in the JSON of a sample
KEYS = ("key", "source_key", "__key__")
CELL_BYTES = 4 * 1024 * 1024  # longest cell of a CSV: as of a caption or JSON beside a video
BATCH_ROWS = 1024  # of Parquet
COLUMNS_NAMED = 20

Cells = dict[str, Any]
_JSON = json.JSONEncoder(sort_keys=True, default=str)


class TableRow(NamedTuple):
    """A row: `source` as the table spells it, `key` of the sample ("" if the table gives none), the other columns as a JSON object."""

    source: str
    key: str
    text: bytes


def is_table(name: str) -> bool:
    """Whether an input is a table, by its suffix."""
    return name.lower().endswith(TABLE_SUFFIXES)


def read_rows(path: str, name: str, config: TableConfig, spans_field: str) -> Iterator[TableRow]:
    """Rows of the local file `path`, in order. `name` is for messages. `spans_field` is kept whatever `config.fields` says.

    Raises:
        ConfigError: a column that `config` names is not in the table.
        InputError: the table cannot be read, has no column of sources, or a row has none; the message names the row.
    """
    columns: _Columns | None = None
    number = 0
    try:
        for number, (names, cells) in enumerate(_cells(path, name), 1):
            if columns is None:
                columns = _Columns(name, names, config, spans_field)
            yield columns.row(number, cells)
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(
            f"{name}: cannot be read as a table after row {number}: {' '.join(str(error).split())}; expected "
            "Parquet, CSV with a line of column names, or JSON lines, in UTF-8"
        ) from None
    if not number:
        raise InputError(f"{name}: the table has no rows")


class _Columns:
    """Meaning of the columns of one table."""

    def __init__(self, name: str, names: tuple[str, ...], config: TableConfig, spans_field: str) -> None:
        self._name = name
        given = [(f"table.{role}", getattr(config, role)) for role in ("source", "key", "start", "end")]
        given += [("table.captions", column) for column in config.captions]
        given += [("table.fields", column) for column in config.fields or ()]
        for option, column in given:
            if column is not None and column not in names:
                raise ConfigError(f"{option}: {name} has no column {column!r}; its columns: {_listed(names)}")
        source = config.source or next((column for column in SOURCES if column in names), None)
        if source is None:
            raise InputError(
                f"{name}: no column names the video or tar of a row; expected one of {', '.join(SOURCES)}, or table.source=COLUMN; "
                f"its columns: {_listed(names)}"
            )
        self._source = source
        self._key = config.key or next((column for column in KEYS if column in names), None)
        self._captions = config.captions
        chosen = {role: column for role, column in (("start", config.start), ("end", config.end)) if column is not None}
        kept = {*names} if config.fields is None else {*config.fields, *CAPTIONS, "start", "end", spans_field}
        kept -= {self._source, self._key, *chosen.values(), *(CAPTIONS if self._captions else ()), *self._captions}
        self._kept = {column: column for column in names if column in kept} | chosen  # name in the text -> column

    def row(self, number: int, cells: Cells) -> TableRow:
        source, key = cells.get(self._source), cells.get(self._key) if self._key is not None else None
        if not isinstance(source, str) or not source.strip():
            raise InputError(
                f"{self._name}: row {number} has {source!r} in column {self._source!r}; expected the path or URI of a video or tar"
            )
        values = {name: value for name, column in self._kept.items() if (value := cells.get(column)) is not None}
        if captions := [found for column in self._captions for found in _named(column, cells.get(column))]:
            values["captions"] = captions
        elif isinstance(
            named := values.get("captions"), dict
        ):  # as a list: names are sorted, and the first caption is `caption`
            values["captions"] = [found for name, value in named.items() for found in _named(name, value)]
        text = _JSON.encode(values)
        return TableRow(source.strip(), "" if key is None else str(key), text.encode())


def _named(name: str, value: Any) -> list[dict[str, Any]]:
    """Captions of one name: a text, or a list of texts."""
    return [
        {"name": name, "text": text} for text in (value if isinstance(value, list) else [value]) if text is not None
    ]


def _cells(path: str, name: str) -> Iterator[tuple[tuple[str, ...], Cells]]:
    """Names of the columns and cells of each row."""
    suffix = name.lower().rpartition(".")[2]
    if suffix == "parquet":
        yield from _parquet(path, name)
    elif suffix in ("csv", "tsv"):
        yield from _csv(path, name, "\t" if suffix == "tsv" else ",")
    else:
        yield from _json_lines(path, name)


def _parquet(path: str, name: str) -> Iterator[tuple[tuple[str, ...], Cells]]:
    # Spark stores times as int96, which as nanoseconds end in 2262.
    with pq.ParquetFile(path, coerce_int96_timestamp_unit="us") as file:
        _check_distinct(name, tuple(file.schema_arrow.names))
        kept = pa.schema(
            item.with_type(_readable(item.type)) for item in file.schema_arrow if not _has_bytes(item.type)
        )
        names, before = tuple(kept.names), 0
        for batch in file.iter_batches(BATCH_ROWS, columns=list(names)):
            for cells in _cells_of(batch.select(list(names)), kept, name, before):
                yield names, cells
            before += len(batch)


def _cells_of(batch: pa.RecordBatch, kept: pa.Schema, name: str, before: int) -> list[Cells]:
    """Cells of each row of a batch, with values of the types of `kept`. Raises `InputError` for a value that Python does not have."""
    try:
        return batch.cast(kept, safe=False).to_pylist()
    except (ValueError, OverflowError):
        for row in range(len(batch)):
            _check_readable(batch.slice(row, 1), kept, f"{name}: row {before + row + 1}")
        raise


def _check_readable(row: pa.RecordBatch, kept: pa.Schema, what: str) -> None:
    for column, item in zip(row.columns, kept, strict=True):
        try:
            column.cast(item.type, safe=False).to_pylist()
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{what}, column {item.name!r}: a value of {str(column.type)[:80]} cannot be read ({' '.join(str(error).split())}); "
                "expected times of the years 1 to 9999, known time zones and distinct names of fields; store it as text, or leave the "
                "column out of the table"
            ) from None


def _readable(kind: pa.DataType) -> pa.DataType:
    """The type with microseconds for nanoseconds: pyarrow gives these as objects of pandas if it is installed, else not at all."""
    types = pa.types
    if types.is_timestamp(kind) and kind.unit == "ns":
        return pa.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pa.duration("us")
    if types.is_time64(kind):
        return pa.time64("us")
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _readable(kind.value_type), kind.ordered)
    if types.is_map(kind):
        return pa.map_(_readable(kind.key_type), _readable(kind.item_type))
    if types.is_struct(kind):
        return pa.struct([item.with_type(_readable(item.type)) for item in kind])
    if types.is_list(kind):
        return pa.list_(_readable(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_readable(kind.value_type))
    if types.is_fixed_size_list(kind):
        return pa.list_(_readable(kind.value_type), kind.list_size)
    return kind


def _has_bytes(kind: pa.DataType) -> bool:
    """Whether values of a Parquet column are bytes, or hold some, as `{bytes, path}` of Hugging Face."""
    if pa.types.is_nested(kind):
        return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in binary)


def _csv(path: str, name: str, delimiter: str) -> Iterator[tuple[tuple[str, ...], Cells]]:
    csv.field_size_limit(CELL_BYTES)
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        names = tuple(cell.strip() for cell in next((line for line in lines if line), ()))
        _check_distinct(name, names)
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(names):
                raise InputError(
                    f"{name}: line {lines.line_num} has {len(cells)} cells, expected {len(names)}: {_listed(names)}"
                )
            yield names, {column: cell for column, cell in zip(names, cells, strict=True) if cell != ""}


def _json_lines(path: str, name: str) -> Iterator[tuple[tuple[str, ...], Cells]]:
    """Read twice: the columns are the names of all lines, of which each may lack some."""
    columns: dict[str, None] = {}
    for cells in _objects(path, name):
        columns.update(dict.fromkeys(cells))
    names = tuple(columns)
    for cells in _objects(path, name):
        yield names, cells


def _objects(path: str, name: str) -> Iterator[Cells]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}: line {number} is not JSON: {error}") from None
            if not isinstance(cells, dict):
                found = type(cells).__name__
                raise InputError(f"{name}: line {number} is {found}, expected a JSON object of columns and values")
            yield cells


def _check_distinct(name: str, names: tuple[str, ...]) -> None:
    if len(set(names)) < len(names):
        raise InputError(f"{name}: two columns have the same name: {_listed(names)}")


def _listed(names: tuple[str, ...]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > COLUMNS_NAMED else ""
    return ", ".join(names[:COLUMNS_NAMED]) + more
