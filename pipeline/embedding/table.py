"""Table of tensors that others made: a Parquet or safetensors file, a row per id, caption or caption hash. Read several times, in batches.

Parquet: exactly one of the columns `id`, `caption`, `caption_hash`, and for each tensor `NAME_bytes`, `NAME_shape`, `NAME_dtype`, or a
column `NAME` of lists of numbers (`[D]`) or of lists of those (`[L, D]`).
Safetensors: tensors named `ID` (which are `embedding`) or `ID.NAME`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from pipeline.embedding.checkpoint import safetensors_header
from pipeline.errors import InputError
from pipeline.sidecars.description import DTYPES
from pipeline.sidecars.names import key_of
from pipeline.storage import is_remote
from pipeline.storage.checkpoints import fetch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import StorageConfig

KEYS = ("id", "caption", "caption_hash")
EMBEDDING = "embedding"
ROWS = 64  # of a Parquet file that are in memory at a time
_SAFETENSORS = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}


class Kind(NamedTuple):
    """Type and shape of one tensor of one row."""

    dtype: str
    shape: tuple[int, ...]


class Table(ABC):
    """`key`: what rows are found by, of `KEYS`. Positions of rows count from 0."""

    key: str

    @abstractmethod
    def kinds(self) -> Iterator[tuple[str, dict[str, Kind]]]:
        """Of every row, its id, caption or hash, and what its tensors are. Raises InputError for a row that is not as it should be."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Every row with its tensors, in the order of `kinds`; bfloat16 as its bits."""

    def key_bytes(self, text: str) -> bytes:
        """Key of a row in a sidecar set."""
        return bytes.fromhex(text) if self.key == "caption_hash" else key_of(text)


def open_table(uri: str, key: str | None, storage: StorageConfig) -> Table:
    """The table at `uri`; a remote one is fetched into the cache folder. `key`: what names of safetensors are.

    Raises:
        InputError: not such a table.
    """
    try:
        path = Path(fetch(uri, storage) if is_remote(uri) else uri)
    except FileNotFoundError as error:
        raise InputError(f"{error}; expected a Parquet or safetensors table") from None
    if not path.is_file():
        raise InputError(f"{uri} is not a file; expected a Parquet or safetensors table")
    if path.suffix == ".safetensors":
        return _Safetensors(path, key or "id")
    found = _Parquet(path)
    if key is not None and key != found.key:
        raise InputError(f"{uri} has its rows by {found.key}, not by {key}")
    return found


class _Parquet(Table):
    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from None
        schema = self._file.schema_arrow
        keys = [name for name in KEYS if name in schema.names]
        self._triples = [
            name.removesuffix("_bytes")
            for name in schema.names
            if name.endswith("_bytes")
            and {f"{name.removesuffix('_bytes')}_{part}" for part in ("shape", "dtype")} <= set(schema.names)
        ]
        self._lists = [
            field.name for field in schema if _depth(field.type) in (1, 2) and not field.name.endswith("_shape")
        ]
        if len(keys) != 1 or not (self._triples or self._lists):
            raise InputError(
                f"{path} has the columns {', '.join(schema.names)}; expected exactly one of {', '.join(KEYS)}, and tensors as "
                "NAME_bytes, NAME_shape, NAME_dtype or as lists of numbers; see docs/sidecars.md"
            )
        self.key = keys[0]

    def kinds(self) -> Iterator[tuple[str, dict[str, Kind]]]:
        columns = [f"{name}_{part}" for name in self._triples for part in ("shape", "dtype")]
        for place, row in enumerate(self._read([self.key, *columns, *self._lists])):
            text = self._name(row, place)
            found = {name: Kind(row[f"{name}_dtype"], tuple(row[f"{name}_shape"] or ())) for name in self._triples}
            found |= {name: Kind("float32", self._array(row, name, place).shape) for name in self._lists}
            for name, kind in found.items():
                shape = row.get(f"{name}_shape", list(kind.shape))
                if kind.dtype not in DTYPES or shape is None or not _has_values(shape):
                    raise InputError(
                        f"{self._path}: row {place} ({text}) has {name} of type {kind.dtype!r}, shape {shape}; expected sizes of at "
                        f"least 1, and one of {', '.join(DTYPES)}"
                    )
            yield text, found

    def rows(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        columns = [f"{name}_{part}" for name in self._triples for part in ("bytes", "shape", "dtype")]
        for place, row in enumerate(self._read([self.key, *columns, *self._lists])):
            found = {}
            for name in self._triples:
                data, shape, dtype = (row[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
                kind = np.dtype(DTYPES[dtype])
                if data is None or len(data) != math.prod(shape) * kind.itemsize:
                    got = "no" if data is None else len(data)
                    raise InputError(f"{self._path}: row {place} has {got} bytes for {name} {dtype} of shape {shape}")
                found[name] = np.frombuffer(data, kind).reshape(shape)
            yield row[self.key], found | {name: self._array(row, name, place) for name in self._lists}

    def _read(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        try:
            for batch in self._file.iter_batches(ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._path} cannot be read as Parquet: {error}") from None

    def _name(self, row: dict[str, Any], place: int) -> str:
        text = row[self.key]
        if not isinstance(text, str) or (self.key == "caption_hash" and not re.fullmatch("[0-9a-f]{32}", text)):
            expected = "32 hex digits, BLAKE2b-128 of the caption" if self.key == "caption_hash" else "text"
            raise InputError(f"{self._path}: row {place} has the {self.key} {text!r}; expected {expected}")
        return text

    def _array(self, row: dict[str, Any], name: str, place: int) -> np.ndarray:
        try:
            return np.array(row[name], np.float32)
        except (ValueError, TypeError):
            raise InputError(
                f"{self._path}: row {place} has no {name}, or lists of unequal length or nulls in it"
            ) from None


class _Safetensors(Table):
    def __init__(self, path: Path, key: str) -> None:
        self.key, self._path = key, path
        try:
            with safe_open(path, "numpy"):  # checks types, shapes and places of all tensors
                header, self._base = safetensors_header(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read as safetensors: {error}") from None
        self._rows: dict[str, dict[str, dict[str, Any]]] = {}
        for name, one in header.items():
            text, _, tensor = name.rpartition(".")
            self._rows.setdefault(text or tensor, {})[tensor if text else EMBEDDING] = one

    def kinds(self) -> Iterator[tuple[str, dict[str, Kind]]]:
        for text, tensors in self._rows.items():
            if unknown := [one["dtype"] for one in tensors.values() if one["dtype"] not in _SAFETENSORS]:
                raise InputError(
                    f"{self._path}: {text} is of type {unknown[0]}; expected one of {', '.join(_SAFETENSORS)}"
                )
            if empty := [name for name, one in tensors.items() if not _has_values(one["shape"])]:
                raise InputError(
                    f"{self._path}: {empty[0]} of {text} has the shape {tensors[empty[0]]['shape']}; expected sizes of at least 1"
                )
            if self.key == "caption_hash" and not re.fullmatch("[0-9a-f]{32}", text):
                raise InputError(f"{self._path}: {text!r} is not a hash of a caption, 32 hex digits; see --by")
            yield text, {name: Kind(_SAFETENSORS[one["dtype"]], tuple(one["shape"])) for name, one in tensors.items()}

    def rows(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        with self._path.open("rb") as file:
            for text, tensors in self._rows.items():
                found = {}
                for name, one in tensors.items():
                    begin, end = one["data_offsets"]
                    file.seek(self._base + begin)
                    data, kind = file.read(end - begin), np.dtype(DTYPES[_SAFETENSORS[one["dtype"]]])
                    if len(data) != math.prod(one["shape"]) * kind.itemsize:
                        raise InputError(
                            f"{self._path} is cut off: {text} has {len(data)} bytes for {one['dtype']} {one['shape']}"
                        )
                    found[name] = np.frombuffer(data, kind).reshape(one["shape"])
                yield text, found


def _has_values(shape: Sequence[Any]) -> bool:
    """Whether a tensor of this shape has a value: an embedding without a token is a mistake of what made it."""
    return all(isinstance(size, int) and size > 0 for size in shape)


def _depth(kind: pa.DataType) -> int:
    """How many lists are inside each other, of numbers with fractions; 0 for anything else."""
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if pa.types.is_floating(kind) else 0
