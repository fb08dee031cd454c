"""`Annotations`: rows of all tables of a job, on local disk by source, and their digests as part of the identity of the sources.

Takes tables, local or remote; gives shards whose objects have digests, and, when a shard is handed out, the rows about its objects.
Memory is 28 bytes a row; the rows are in a temporary file. The digest of a source depends on its rows only: not on their order, the
table's format or name, or rows about other sources (ADR 23).
"""

from __future__ import annotations

import hashlib
import mmap
import os
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.corpus.tables import read_rows
from pipeline.errors import InputError, NotFound
from pipeline.process.scratch import ScratchFolder, local_disk
from pipeline.records.annotation_rows import AnnotationRow, packed, record, record_start
from pipeline.storage import is_remote, locate, open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from io import BufferedWriter

    from pipeline.config import EncodeJob, StorageConfig, TableConfig
    from pipeline.records import Shard, SourceObject

BLOCK_BYTES = 1024 * 1024


def job_annotations(job: EncodeJob) -> Annotations:
    """The annotations of a job, to be passed to `resolve_inputs`, which reads its tables."""
    return Annotations(job.table, job.storage, job.clips.spans_field, table=job.annotations)


class Annotations:
    """See the module. Call `read` for each table, then `attach`, then `with_rows` for each shard; `close` deletes the file.

    Args:
        config: columns.
        storage: where tables and inputs are.
        spans_field: column that lists spans.
        table: path or URI of the job's table of annotations; None: only tables among the inputs.
    """

    def __init__(
        self, config: TableConfig, storage: StorageConfig, spans_field: str, *, table: str | None = None
    ) -> None:
        self.table = table
        self._config, self._storage, self._spans_field = config, storage, spans_field
        self._scratch: ScratchFolder | None = None
        self._file: BufferedWriter | None = None
        self._hashes, self._ends = array("Q"), array("Q")
        self._sorted = self._order = np.empty(0, np.uint64)
        self._map: mmap.mmap | bytes = b""
        self._example = ""

    def read(self, source: SourceObject, uri_of: Callable[[str], str]) -> Iterator[str]:
        """Adds the rows of a table; yields the URI of each. `uri_of`: the URI of a source as the table spells it.

        Raises:
            ConfigError, InputError: as `tables.read_rows`.
            StorageUnavailable: the store, or the temporary folder, failed.
        """
        path, name = self._local(source), source.uri
        with local_disk():
            if self._scratch is None:
                self._scratch = ScratchFolder()
            if self._file is None:
                self._file = open(os.path.join(self._scratch.path, "rows"), "xb")  # noqa: SIM115 - closed by `close`
        end = self._ends[-1] if self._ends else 0
        spelled, uri, hashed = None, "", 0
        for number, row in enumerate(read_rows(path, name, self._config, self._spans_field), 1):
            if row.source != spelled:  # rows about one object mostly follow each other
                try:
                    spelled, uri = row.source, uri_of(row.source)
                except InputError as error:
                    raise InputError(f"{name}: row {number} names {row.source!r}; {error}") from None
                hashed = _hash(uri)
            line = record(AnnotationRow(uri, row.key, row.text))
            try:
                self._file.write(line)
            except OSError:
                with local_disk(self._scratch.path):
                    raise
            end += len(line)
            self._hashes.append(hashed)
            self._ends.append(end)
            self._example = self._example or f"{row.source!r}, which is {uri}"
            yield uri

    def attach(self, shards: Iterable[Shard], *, all_of: str | None = None) -> list[Shard]:
        """The shards, with digests of the rows about their objects. `all_of`: name of a table, at least one row of which must be about one.

        Raises:
            InputError: none is.
        """
        self._sort()
        found = []
        named = 0
        for shard in shards:
            digests = [self._digest(source.uri) for source in shard.objects]
            named += sum(map(bool, digests))
            objects = tuple(
                replace(source, annotations=digest) if digest else source
                for source, digest in zip(shard.objects, digests, strict=True)
            )
            found.append(replace(shard, objects=objects) if any(digests) else shard)
        if all_of is not None and not named:
            raise InputError(
                f"{all_of}: none of its {len(self._ends)} rows is about an input; the first names {self._example}. Relative paths begin at "
                "the table's folder"
            )
        return found

    def with_rows(self, shard: Shard) -> Shard:
        """The shard with the rows about its objects."""
        records = [line for source in shard.objects if source.annotations for line in self._records(source.uri)]
        return replace(shard, rows=packed(records)) if records else shard

    def close(self) -> None:
        """Deletes the temporary file; safe to call twice."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        self._map = b""
        for held in (self._file, self._scratch):
            if held is not None:
                held.close()
        self._file = self._scratch = None

    def __enter__(self) -> Annotations:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _local(self, source: SourceObject) -> str:
        """Path of a table; a remote one is copied."""
        if not is_remote(source.uri):
            return os.path.join(*locate(source.uri))
        with local_disk():
            if self._scratch is None:
                self._scratch = ScratchFolder()
            path = os.path.join(self._scratch.path, f"table-{_hash(source.uri):016x}")
        try:
            with open_source(source, self._storage) as stream, open(path, "wb") as file:
                while block := stream.read(BLOCK_BYTES):
                    with local_disk(self._scratch.path):
                        file.write(block)
        except NotFound:
            raise InputError(f"table {source.uri} was deleted after it was listed; run again") from None
        return path

    def _sort(self) -> None:
        if self._file is None or not self._ends or len(self._sorted) == len(self._ends):
            return
        with local_disk():
            self._file.flush()
            if isinstance(self._map, mmap.mmap):
                self._map.close()
            with open(self._file.name, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        hashes = np.frombuffer(self._hashes.tobytes(), np.uint64)
        self._order = np.argsort(hashes, kind="stable").astype(np.uint32 if len(hashes) < 1 << 32 else np.uint64)
        self._sorted = hashes[self._order]

    def _records(self, uri: str) -> list[bytes]:
        """Distinct records about an object, sorted: rows may have another order in the next table."""
        wanted = np.uint64(_hash(uri))
        first, stop = np.searchsorted(self._sorted, wanted, "left"), np.searchsorted(self._sorted, wanted, "right")
        start, found = record_start(uri), set[bytes]()
        for row in self._order[first:stop].tolist():
            line = self._map[self._ends[row - 1] if row else 0 : self._ends[row]]
            if line.startswith(start):  # else another URI with the same hash
                found.add(line)
        return sorted(found)

    def _digest(self, uri: str) -> str:
        """Hex BLAKE2b-128 of the records about an object, without its URI; empty if there is none."""
        records = self._records(uri)
        if not records:
            return ""
        start = len(record_start(uri))
        digest = hashlib.blake2b(digest_size=16)
        for line in records:
            digest.update((len(line) - start).to_bytes(8, "little") + line[start:])
        return digest.hexdigest()


def _hash(uri: str) -> int:
    return int.from_bytes(hashlib.blake2b(uri.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
