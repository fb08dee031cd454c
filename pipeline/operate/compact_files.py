"""Writes the files of a compaction: rows of several data files into one, tensors byte for byte, uploaded under keys of their own.

Takes groups of manifest rows, returns for each the written file and which row came from where. Source files are compared with their
hashes while they are read, written files while they are read back (`pipeline.writer`).
"""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import DrillConfig, WriteConfig
from pipeline.errors import LatheError
from pipeline.format.layout import COMPACTED
from pipeline.format.stored import OPTIONAL
from pipeline.ledger.copies import dropped_row
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.operate.stored_rows import fetch
from pipeline.process.scratch import ScratchFolder
from pipeline.records import MemberRule
from pipeline.storage import is_remote
from pipeline.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipeline.format.layout import Layout
    from pipeline.operate.compact_plan import Group
    from pipeline.operate.stored_rows import StoredFile
    from pipeline.records import WrittenFile
    from pipeline.storage import Store

WHOLE_FILE_BYTES = 1 << 50  # a group is one file, whatever its size
WORKERS = 2  # groups at a time: one is hashed while another is written
REMOTE_WORKERS = 4
AHEAD = 4  # threads that fetch small files of a group from a remote store: each costs three round trips
SMALL_BYTES = 16 * 1024 * 1024
# Metadata that the writer makes anew.
MADE_BY_WRITER = {
    "format",
    "format_version",
    "container",
    "bucket",
    "shard_id",
    "fingerprint",
    "latent",
    "normalisation",
}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one source file in a compacted one. Arrays have an entry for each row of the source."""

    source: dict[str, Any]  # row of `manifest.FILES`
    first: int  # position of its first row in the compacted file
    kept: np.ndarray = field(repr=False)  # int32: positions in the source of rows that were copied, ascending
    frames: np.ndarray = field(repr=False)  # int64
    num_bytes: np.ndarray = field(repr=False)  # int64, of the tensors
    dropped: dict[int, dict[str, Any]]  # the others, by position, as in `copies.COPIES`


@dataclass(frozen=True, slots=True)
class Compacted:
    """One written file."""

    shard_id: str  # of its own, 32 hex digits
    file: WrittenFile
    parts: tuple[Part, ...]


class CompactionWriter:
    """Writer of the files of one compaction. Leaving it without `keep` deletes them all."""

    def __init__(self, store: Store, layout: Layout, drill: DrillConfig | None = None) -> None:
        """`drill`: where to fail on purpose, for tests."""
        self._store, self._layout = store, layout
        self._drill = drill or DrillConfig()
        self._writers: list[ShardWriter] = []
        self._kept = False
        self.left: list[str] = []  # keys of files with columns of another version of Lathe, which stay as they are

    def __enter__(self) -> CompactionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept:
            return
        for writer in self._writers:
            with suppress(LatheError):  # files that no snapshot names are orphans, which `lathe gc` deletes
                writer.abort()

    def keep(self, kept: bool = True) -> None:
        """Whether to leave the files: a snapshot names them, or may."""
        self._kept = kept

    def write(self, groups: Sequence[Group], progress: Callable[[int], None] | None = None) -> list[Compacted]:
        """Writes the groups, several at a time. `progress` gets the bytes that were read, from any thread.

        Raises:
            OutputError: a file does not have the bytes it was written with; the message names it.
            StorageUnavailable: the local disk or the store cannot be written.
        """
        workers = min(REMOTE_WORKERS if is_remote(self._store.root) else WORKERS, max(1, len(groups)))
        scratch = ScratchFolder()
        try:
            with ThreadPoolExecutor(workers, thread_name_prefix="compact") as pool:
                futures = [pool.submit(self._write, group, Path(scratch.path), progress) for group in groups]
                try:
                    found = [future.result() for future in futures]
                except BaseException:
                    for writer in list(self._writers):
                        writer.stop()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            scratch.close()
        return [item for item in found if item is not None]

    def _write(self, group: Group, scratch: Path, progress: Callable[[int], None] | None) -> Compacted | None:
        """One file; None if files that cannot be copied leave nothing to do."""
        shard_id, parts, writer = secrets.token_hex(16), [], None
        folder = scratch / shard_id
        folder.mkdir()
        copied = read = 0  # rows
        ahead = AHEAD if is_remote(self._store.root) and group.num_bytes < SMALL_BYTES * len(group.files) else 1
        fetched = mapped_ahead(lambda file: fetch(self._store, file, folder), group.files, ahead, "fetch")
        for file, stored in zip(group.files, fetched, strict=True):
            if progress is not None:
                progress(file["bytes"])
            if not stored.has_these_columns:
                self.left.append(file["key"])
                continue
            if writer is None:
                writer = self._writer(group, shard_id, stored, folder)
            parts.append(_copy(writer, stored, file, copied, read))
            stored.path.unlink()  # its rows that wait for their row group keep it mapped
            copied += len(parts[-1].kept)
            read += len(stored.index)
        if writer is None:
            return None
        if len(parts) == 1 and not parts[0].dropped:
            writer.abort()
            return None
        (written,), _ = writer.finish()
        return Compacted(shard_id, written, tuple(parts))

    def _writer(self, group: Group, shard_id: str, stored: StoredFile, folder: Path) -> ShardWriter:
        about, columns = stored.metadata, stored.stored
        config = WriteConfig(
            format=about["container"],
            dtype=about["latent"]["dtype"],
            compression=about["latent"].get("compression", "none"),
            file_bytes=WHOLE_FILE_BYTES,
            moments=columns["moments"],
            store=[name for name in columns["store"] if name in OPTIONAL],
        )
        writer = ShardWriter(
            self._store,
            folder / "written",
            config,
            shard_id=shard_id,
            attempt=COMPACTED + secrets.token_hex(4),
            fingerprint=group.fingerprint,
            metadata={name: value for name, value in about.items() if name not in MADE_BY_WRITER},
            layout=self._layout,
            drill=self._drill,
            members=[name for name in (*columns["store"], *columns["without"]) if name not in OPTIONAL],
            unpaired=MemberRule.of(about["fingerprint_parts"]).unpaired,
        )
        self._writers.append(writer)
        return writer


def _copy(writer: ShardWriter, stored: StoredFile, file: dict[str, Any], copied: int, read: int) -> Part:
    """Copies rows that count. `copied`, `read`: rows of earlier files that were copied, and all of them."""
    gone = set(file["hidden"])
    for row in stored.rows(gone, read):
        writer.copy(row)
    kept = np.array([row.row for row in stored.index if row.row not in gone], np.int32)
    frames = np.array([row.num_frames for row in stored.index], np.int64)
    sizes = np.array([sum(span.length for span in row.spans()) for row in stored.index], np.int64)
    dropped = {row.row: dropped_row(row) for row in stored.index if row.row in gone}
    return Part(file, copied, kept, frames, sizes, dropped)
