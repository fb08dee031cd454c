"""Rows of a finished data file as the writer takes them, for `lathe compact`: every byte of the file compared with its recorded hashes.

Takes a row of a snapshot's manifest. Fetches the file once, in one stream, to a local folder; gives its metadata and `LatentRow`s whose
tensors are views of that local file. Memory: the scalar columns of one row group.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import NotFound, OutputError
from pipeline.format.columns import METADATA_MEMBER, SCALARS, LatentRow, parquet_schema
from pipeline.format.index import METADATA_KEY, read_index
from pipeline.format.stored import stored_names, tensor_shape
from pipeline.format.tensors import Payload, SpanChecker, image_payload

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.format.index import IndexRow
    from pipeline.format.tensors import Span
    from pipeline.storage import Store

PIECE_BYTES = 8 * 1024 * 1024
IN_JSON = {"id", "vae_latent_shape", "vae_latent_dtype", *SCALARS}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A local copy of a data file that has the bytes it was written with."""

    path: Path
    metadata: dict[str, Any]
    index: list[IndexRow]

    @property
    def stored(self) -> dict[str, Any]:
        """What the rows store, as the options of a file builder: `moments`, `store` and `without`."""
        latent = self.metadata["latent"]
        more = {name: tuple(latent.get(name, ())) for name in ("store", "without")}
        return {"moments": latent["posterior"] == "moments", **more}

    @property
    def has_these_columns(self) -> bool:
        """Whether the columns are those that this version of Lathe writes."""
        if self.path.suffix == ".tar":
            return set(next(_members(self.path), {})) == IN_JSON
        return bool(pq.read_schema(self.path).names == parquet_schema(**self.stored).names)

    def rows(self, left_out: set[int], first: int) -> Iterator[LatentRow]:
        """Rows but those at the positions `left_out`, in file order; `order` counts from `first`.

        Raises:
            OutputError: the file and its index have different rows, or a row has other columns than the first.
        """
        tar = self.path.suffix == ".tar"
        scalars = _tar_scalars(self.path) if tar else _parquet_scalars(self.path)
        stored, content = self.stored, np.memmap(self.path, np.uint8, "r")
        names = stored_names(moments=stored["moments"], store=stored["store"])
        for row, values in zip(self.index, scalars, strict=True):
            if values.pop("id") != row.id:
                raise OutputError(f"{self.path.name} has another row than {row.id} at position {row.row}")
            if row.row in left_out:
                continue
            spans = zip(names, row.spans(), strict=True)
            tensors = {name: _payload(content, tensor_shape(name, row.shape), span) for name, span in spans}
            yield LatentRow(row.id, (first + row.row, 0), row.num_frames, tensors, values)


def fetch(store: Store, file: dict[str, Any], folder: Path) -> StoredFile:
    """Copies the file of a manifest row into `folder` and compares every byte of it and of its index.

    Raises:
        OutputError: file or index is missing, or has other bytes than were written; the message names it.
    """
    key, path = file["key"], folder / file["key"].replace("/", "_")
    index = checked_index(store, file)
    checker = SpanChecker((span for row in index for span in row.spans()), finite=False)
    try:
        info = store.stat(key)
        with store.open_stream(key, size=info.size, etag=info.etag) as stream, path.open("wb") as out:
            while piece := stream.read(PIECE_BYTES):
                checker.feed(piece)
                out.write(piece)
    except NotFound:
        raise damaged(store, key, "it is missing") from None
    if (found := checker.finish()) != file["sha256"]:
        raise damaged(store, key, f"sha256 {found}, expected {file['sha256']}")
    for problem in checker.problems:
        raise damaged(store, key, f"row {problem.id} has {problem.found}, its index says {problem.expected}")
    return StoredFile(path, _metadata(path), index)


def damaged(store: Store, key: str, what: str) -> OutputError:
    """Error for a file that cannot be copied."""
    return OutputError(
        f"{key} is not as it was written: {what}; nothing was published. `lathe verify` lists all damaged files; restore it, or encode its "
        "inputs again",
        uri=store.uri(key),
    )


def checked_index(store: Store, file: dict[str, Any]) -> list[IndexRow]:
    """Index rows of the file of a manifest row.

    Raises:
        OutputError: the index is missing, or has other bytes than were written.
    """
    try:
        data = store.read(file["index_key"])
    except NotFound:
        raise damaged(store, file["index_key"], "it is missing") from None
    if (found := hashlib.sha256(data).hexdigest()) != file["index_sha256"]:
        raise damaged(store, file["index_key"], f"sha256 {found}, expected {file['index_sha256']}")
    return read_index(data)[0]


def _metadata(path: Path) -> dict[str, Any]:
    found: dict[str, Any]
    if path.suffix != ".tar":
        found = json.loads(pq.read_schema(path).metadata[METADATA_KEY])
        return found
    with tarfile.open(path, "r:") as archive:
        content = archive.extractfile(METADATA_MEMBER)
        if content is None:
            raise OutputError(f"{path.name} has no member {METADATA_MEMBER}")
        found = json.load(content)
        return found


def _parquet_scalars(path: Path) -> Iterator[dict[str, Any]]:
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        yield from file.read_row_group(group, ["id", *SCALARS], use_threads=False).select(["id", *SCALARS]).to_pylist()


def _tar_scalars(path: Path) -> Iterator[dict[str, Any]]:
    for values in _members(path):
        if set(values) != IN_JSON:
            raise OutputError(f"{path.name} has a row with the columns {sorted(values)}, expected {sorted(IN_JSON)}")
        yield {name: values[name] for name in ("id", *SCALARS)}


def _members(path: Path) -> Iterator[dict[str, Any]]:
    """JSON members of a tar."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.endswith(".json") else None
            if content is not None:
                yield json.load(content)


def _payload(content: np.ndarray, shape: tuple[int, ...], span: Span) -> Payload:
    data = content[span.offset : span.offset + span.length].data
    return image_payload(data) if span.dtype is None else Payload(data, shape, span.dtype, span.hash)
