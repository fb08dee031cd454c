"""Table of text embeddings that the user made: a Parquet file, a row per latent id or per caption.

Key column, exactly one of `id` (of the latent), `caption` (the text), `caption_hash` (BLAKE2b-128 of its UTF-8 bytes in hex).
For each tensor NAME three columns as latents have them: `NAME_bytes`, `NAME_shape`, `NAME_dtype`; `embedding` [L, D] is required, `mask`
[L] (1 for a token, 0 for padding) and others are the targets' to ask for.

Memory: 32 bytes a row for the keys, and the row group in use.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.errors import InputError
from pipeline.export.values import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pipeline.export.rows import Row

KEYS = ("id", "caption", "caption_hash")
EMBEDDING = "embedding"
MASK = "mask"
KEPT_GROUPS = 4
LARGEST_GROUP = 1 << 30  # bytes
STORED = {**DTYPES, "int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8, "bool": torch.bool}


class Texts(Protocol):
    """Text embeddings by latent. `label`: where they are from, for messages; `key`: what rows are found by; `names`: the tensors; `width`,
    `dtype`: of `embedding`.
    """

    label: str
    key: str
    names: tuple[str, ...]
    width: int
    dtype: str

    @property
    def lengths(self) -> tuple[int, int]:
        """Least and greatest number of tokens, padding included."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What all exports into one directory must share, JSON-ready."""
        ...

    def position(self, row: Row) -> int | None:
        """A number if there are embeddings for a latent, else None."""
        ...

    def tensors(self, row: Row) -> dict[str, Tensor]:
        """All tensors of a latent's text by name. Raises InputError if there are none."""
        ...


class TextTable:
    """Text embeddings by latent. `names`: the tensors; `width`: D of `embedding`; `dtype`: its type."""

    def __init__(self, path: str | Path) -> None:
        """Opens the table and reads its keys and shapes.

        Raises:
            InputError: not such a table; a key twice; a null; embeddings of different width or type.
        """
        self.path = str(path)
        self.label = f"--text-embeddings {path}"
        try:
            self._file = pq.ParquetFile(self.path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"--text-embeddings {self.path} cannot be read as Parquet: {error}") from None
        columns = self._file.schema_arrow.names
        keys = [name for name in KEYS if name in columns]
        self.names = tuple(name.removesuffix("_bytes") for name in columns if name.endswith("_bytes"))
        lacking = [
            f"{name}_{part}" for name in self.names for part in ("shape", "dtype") if f"{name}_{part}" not in columns
        ]
        if len(keys) != 1 or EMBEDDING not in self.names or lacking:
            raise InputError(
                f"--text-embeddings {self.path} has the columns {', '.join(columns)}; expected one of {', '.join(KEYS)}, and "
                "embedding_bytes, embedding_shape, embedding_dtype; see docs/export.md"
            )
        self.key = keys[0]
        self._check_groups()
        self._index()
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def _check_groups(self) -> None:
        footer = self._file.metadata
        sizes = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
        if max(sizes, default=0) > LARGEST_GROUP:
            raise InputError(
                f"--text-embeddings {self.path} has a row group of {max(sizes) / 2**30:.1f} GiB, and reading one row reads its group; "
                "write it with smaller ones, e.g. pyarrow.parquet.write_table(..., row_group_size=64)"
            )
        self._starts = np.cumsum([0, *(footer.row_group(n).num_rows for n in range(footer.num_row_groups))])

    def _index(self) -> None:
        digests: list[str] = []
        lengths: list[int] = []
        kinds: set[tuple[int, str]] = set()
        for batch in self._file.iter_batches(
            columns=[self.key, f"{EMBEDDING}_shape", f"{EMBEDDING}_dtype"], batch_size=65536
        ):
            for key, shape, dtype in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                row = len(digests)
                if key is None or shape is None or dtype not in DTYPES or len(shape) != 2 or min(shape) < 1:
                    raise InputError(
                        f"--text-embeddings {self.path}: row {row} has key {key!r}, embedding {dtype} of shape {shape}; expected a key and "
                        f"[tokens, width] in {', '.join(DTYPES)}"
                    )
                digests.append(key if self.key == "caption_hash" else _digest(key))
                lengths.append(shape[0])
                kinds.add((shape[1], dtype))
        if len(kinds) != 1:
            found = ", ".join(f"{width} ({dtype})" for width, dtype in sorted(kinds)) or "none: the table is empty"
            raise InputError(f"--text-embeddings {self.path}: expected one width and type of embeddings, got {found}")
        self.width, self.dtype = kinds.pop()
        hashes = np.array(digests, dtype="S32")
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._lengths = np.array(lengths, dtype=np.int32)
        same = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(same):
            first, second = sorted(int(self._order[same[0] + n]) for n in (0, 1))
            raise InputError(
                f"--text-embeddings {self.path}: rows {first} and {second} have the same {self.key}; expected each once"
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What all exports into one directory must share."""
        return {"width": self.width, "dtype": self.dtype}

    @property
    def lengths(self) -> tuple[int, int]:
        """Least and greatest number of tokens, padding included."""
        return int(self._lengths.min()), int(self._lengths.max())

    def position(self, row: Row) -> int | None:
        """Row of the table for a latent, or None."""
        key = row.id if self.key == "id" else row.caption
        if key is None:
            return None
        digest = _digest(key).encode()
        at = int(np.searchsorted(self._sorted, digest))
        return int(self._order[at]) if at < len(self._sorted) and self._sorted[at] == digest else None

    def tensors(self, row: Row) -> dict[str, Tensor]:
        """All tensors of a latent's text by name.

        Raises:
            InputError: the table has no row for it, or bytes that do not fit their shape.
        """
        if (at := self.position(row)) is None:
            raise InputError(f"--text-embeddings {self.path} has no row for {row.id} ({self.key})")
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        values = self._group(number).slice(at - int(self._starts[number]), 1).to_pylist()[0]
        return {name: self._tensor(values, name, at) for name in self.names if values[f"{name}_bytes"] is not None}

    def _group(self, number: int) -> pa.Table:
        if number not in self._groups:
            while len(self._groups) >= KEPT_GROUPS or (self._groups and self._bytes() > LARGEST_GROUP // 4):
                self._groups.popitem(last=False)
            names = [f"{name}_{part}" for name in self.names for part in ("bytes", "shape", "dtype")]
            self._groups[number] = self._file.read_row_group(number, columns=names)
        self._groups.move_to_end(number)
        return self._groups[number]

    def _bytes(self) -> int:
        return sum(table.nbytes for table in self._groups.values())

    def _tensor(self, values: dict[str, Any], name: str, at: int) -> Tensor:
        data, shape, dtype = (values[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
        kind = STORED.get(dtype)
        if kind is None or shape is None or len(data) != int(np.prod(shape)) * kind.itemsize:
            raise InputError(
                f"--text-embeddings {self.path}: row {at} has {len(data)} bytes for {name} {dtype} of shape {shape}; expected "
                f"as many as that takes, in one of {', '.join(STORED)}"
            )
        return torch.frombuffer(bytearray(data), dtype=kind).reshape(shape)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
