"""Writer of one shard attempt: checked data files with side indexes, under keys that no other attempt uses.

Takes `LatentClip`s in any order. Returns uploaded `WrittenFile`s, which no reader sees until a receipt names them, and per-channel
statistics. A file has rows of one bucket, all with the job's paired videos or all without. `add` refuses non-finite latents, wrong shapes
and repeated ids. A finished file is read back and hashed, then uploaded by other threads while the next one is built.

- `open_file`: a data file being written, and the rows that wait for it
- `parquet_file`, `parquet_pages`, `tar_file`: the two containers
- `upload_queue`: uploads while the next files are built
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import BuildError, StorageUnavailable
from pipeline.format.codec import INT8, held_type, storage_name
from pipeline.format.columns import latent_row
from pipeline.format.index import write_index
from pipeline.format.tensors import LARGEST_HALF, SpanChecker, measure, measure_stored
from pipeline.records import ChannelStats, WrittenFile
from pipeline.writer.open_file import BUILDERS, FileKind, OpenFile
from pipeline.writer.parquet_file import MAX_VALUE_BYTES
from pipeline.writer.upload_queue import FinishedFile, UploadQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    import numpy as np

    from pipeline.config import DrillConfig, WriteConfig
    from pipeline.format.columns import LatentRow
    from pipeline.format.index import IndexRow
    from pipeline.format.layout import Layout
    from pipeline.records import LatentClip
    from pipeline.storage import Store
    from pipeline.writer.open_file import DataFileBuilder

READ_BACK_BYTES = 4 * 1024 * 1024
FINISHED_FILES = 2
"""Finished files on the local disk, being uploaded or waiting, in multiples of `write.file_bytes`."""
OPEN_BYTES = 128 * 1024 * 1024
"""Bytes of latents held over all open buckets, or four row groups if that is more; above it the fullest bucket is written early."""


class ShardWriter:
    """Writer of one shard attempt. A context manager: leaving it without `finish`, or by an exception, deletes all files of the attempt.

    Args:
        store: the output.
        spool_dir: local folder for unfinished files; needs space for one file per open bucket and `FINISHED_FILES` finished ones.
        config: format, dtype, sizes, limits.
        shard_id: 32 hex digits, names the receipt and, shortened, the files.
        attempt: unique to this attempt, so that two attempts never share a key.
        fingerprint: hex; its first 8 digits are a folder.
        metadata: JSON-ready, goes into every file. Must hold `spec` (`LatentSpec.to_dict()`), `fingerprint_parts`, `encoder`, `versions`.
        layout: names of the objects of the output.
        drill: where to fail on purpose, for tests.
        members: names of paired videos, stored in addition to `config.store`.
        unpaired: whether a clip may have none of them.
        progress: called with the number of bytes written, read back or sent, from any thread.
    """

    def __init__(
        self,
        store: Store,
        spool_dir: str | Path,
        config: WriteConfig,
        *,
        shard_id: str,
        attempt: str,
        fingerprint: str,
        metadata: dict[str, Any],
        layout: Layout,
        drill: DrillConfig,
        progress: Callable[[int], None] | None = None,
        members: Sequence[str] = (),
        unpaired: bool = False,
    ) -> None:
        if missing := {"spec", "fingerprint_parts", "encoder", "versions"} - metadata.keys():
            raise ValueError(f"metadata lacks {sorted(missing)}, got {sorted(metadata)}")
        self._config = config
        self._members, self._unpaired = tuple(members), unpaired
        self._storage = storage_name(config.dtype, config.compression)
        self._progress = progress or (lambda num_bytes: None)
        self._uploads = UploadQueue(
            store, most_bytes=FINISHED_FILES * config.file_bytes, drill=drill, progress=self._progress
        )
        self._spool_dir = Path(spool_dir)
        self._shard_id, self._attempt, self._fingerprint = shard_id, attempt, fingerprint
        self._metadata = metadata
        self._layout = layout
        self._open: dict[FileKind, OpenFile] = {}
        self._ids: set[str] = set()
        self._files: list[WrittenFile] = []
        self._stats = ChannelStats(n=0, mean=(), m2=(), min=(), max=())
        self._seq = 0
        self._finished = False
        with self._spooling():
            self._spool_dir.mkdir(parents=True, exist_ok=True)

    def add(self, *variants: LatentClip) -> None:
        """Checks the variants of a clip and takes ownership: their arrays must not change any more; the encoded video is released. They
        become neighbours in one file, in the order of their plans.

        Raises:
            DamagedInput: `non_finite_latent`: values that are NaN, infinite or above `max_abs`; the message has clip, channel and
                magnitude. Nothing of the variants is kept; further clips can be added.
            BuildError: wrong shape for the clip, wrong dtype, an id that is malformed or was used before in this shard, or a latent too
                large for a Parquet value (2 GiB).
            StorageUnavailable: the spool folder or the output cannot be written.
            LatheError: an upload failed.
        """
        rows, stats, ids = [], self._stats, set[str]()
        for clip in variants:
            row, values = self._checked(clip, ids)
            rows.append(row)
            ids.add(clip.id)
            stats = stats.merge(values)
        self._stats = stats
        self._ids |= ids
        self._take(rows)

    def _checked(self, clip: LatentClip, others: set[str]) -> tuple[LatentRow, ChannelStats]:
        """Row and statistics of one variant; `others`: ids of those before it."""
        if clip.dtype != (held := held_type(self._config.dtype)):
            raise BuildError(
                f"clip {clip.id} is {clip.dtype}, the job stores {self._config.dtype}"
                + (f", which is made from {held}" if held != self._config.dtype else ""),
                key=clip.sample.key,
                stage="write",
            )
        if clip.id in self._ids or clip.id in others:
            raise BuildError(
                f"clip id {clip.id} occurs twice", key=clip.sample.key, shard=self._shard_id, stage="write"
            )
        stats = self._measure(clip, clip.latent_CTHW, "latent")
        if clip.logvar_CTHW is not None:
            self._measure(clip, clip.logvar_CTHW, "log-variance")  # checked only: statistics are of latents
        if clip.cond_CTHW is not None:
            self._measure(clip, clip.cond_CTHW, "i2v_cond")
        for name, values in clip.members.items():
            self._measure(clip, values, name)
        paired = bool(clip.members) or not self._unpaired
        store = (*self._config.store, *(self._members if paired else ()))
        options: dict[str, Any] = {"moments": self._config.moments, "store": store, "storage": self._storage}
        row = latent_row(clip, self._fingerprint, self._metadata["spec"], **options)
        if self._config.format == "parquet" and row.latent.num_bytes > MAX_VALUE_BYTES:
            raise BuildError(
                f"latent of {row.latent.num_bytes} bytes, a Parquet value holds {MAX_VALUE_BYTES}: "
                "use --format tar, or tile the video",
                key=clip.sample.key,
                stage="write",
            )
        if self._config.dtype == INT8:
            stats = measure_stored(row.latent, key=clip.sample.key, clip=clip.plan.index)
        return row, stats

    def copy(self, row: LatentRow) -> None:
        """Takes a row of a finished file as it is; rows of a row group are sorted by `row.order`. Statistics do not cover it: its values
        are not read here, and the hash of its tensors has to be that of the finished file.

        Raises:
            BuildError: an id that was used before in this shard.
            StorageUnavailable, LatheError: as `add`.
        """
        if row.id in self._ids:
            raise BuildError(f"clip id {row.id} occurs twice", shard=self._shard_id, stage="write")
        self._ids.add(row.id)
        self._take([row])

    def finish(self) -> tuple[tuple[WrittenFile, ...], ChannelStats | None]:
        """Closes and checks open files, and waits for all uploads. Returns files in the order they were closed, and statistics; both are
        empty without clips.
        """
        for kind in sorted(self._open):
            self._write_group(kind)
            self._close_file(kind)
        self._uploads.finish()
        self._finished = True
        return tuple(self._files), self._stats if self._stats.n else None

    def check_uploads(self) -> None:
        """Raises the error of a failed upload. `add` and `finish` do so too."""
        self._uploads.check()

    @property
    def sent_bytes(self) -> int:
        """Bytes of finished files sent to the store so far."""
        return self._uploads.sent_bytes

    def stop(self) -> None:
        """Makes `add` and `finish` raise if they wait for uploads in another thread. `abort` must follow."""
        self._uploads.stop()

    def abort(self) -> None:
        """Deletes every spooled and uploaded file of this attempt; also after `finish`, if another attempt's receipt was first.

        Raises:
            LatheError: the store cannot delete; can be called again.
        """
        for opened in self._open.values():
            if opened.builder is not None:
                opened.builder.discard()
            if opened.path.name:  # also if the builder could not be made
                opened.path.unlink(missing_ok=True)
                opened.index_path.unlink(missing_ok=True)
        self._open.clear()
        self._uploads.abort()
        self._files.clear()
        self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self._finished:
            self.abort()

    def _measure(self, clip: LatentClip, array_CTHW: np.ndarray, name: str) -> ChannelStats:
        limit = min(self._config.max_abs, LARGEST_HALF) if self._config.dtype == INT8 else self._config.max_abs
        return measure(array_CTHW, clip.dtype, limit, name=name, key=clip.sample.key, clip=clip.plan.index)

    def _take(self, rows: list[LatentRow]) -> None:
        kind = FileKind(rows[0].scalars["bucket"], any(name in rows[0].tensors for name in self._members))
        opened = self._open.setdefault(kind, OpenFile())
        num_bytes = sum(row.num_bytes for row in rows)
        if opened.waiting and opened.waiting_bytes + num_bytes > self._config.row_group_bytes:
            self._write_group(kind)
        opened.waiting += rows
        opened.waiting_bytes += num_bytes
        if opened.waiting_bytes >= self._config.row_group_bytes:
            self._write_group(kind)
        most = max(OPEN_BYTES, 4 * self._config.row_group_bytes)
        while sum(other.waiting_bytes for other in self._open.values()) > most:
            self._write_group(max(self._open, key=lambda other: self._open[other].waiting_bytes))

    def _write_group(self, kind: FileKind) -> None:
        opened = self._open[kind]
        if not opened.waiting:
            return
        with self._spooling():
            if opened.builder is None:
                builder = BUILDERS[self._config.format]
                opened.seq, self._seq = self._seq, self._seq + 1
                opened.path = self._spool_dir / f"{self._stem(opened.seq)}{builder.suffix}"
                opened.builder = builder(opened.path, self._file_metadata(kind), **self._columns(kind))
            opened.builder.append(sorted(opened.waiting, key=lambda row: row.order))
        opened.fps |= {row.scalars["fps"] for row in opened.waiting}
        self._progress(opened.waiting_bytes)
        opened.waiting, opened.waiting_bytes = [], 0
        if opened.builder.num_bytes >= self._config.file_bytes:
            self._close_file(kind)

    def _columns(self, kind: FileKind) -> dict[str, Any]:
        """What a file stores, as options of its builder."""
        store = (*self._config.store, *(self._members if kind.paired else ()))
        without = self._members if self._unpaired and not kind.paired else ()
        return {"moments": self._config.moments, "store": store, "without": without}

    def _close_file(self, kind: FileKind) -> None:
        opened = self._open[kind]
        if opened.builder is None:
            return
        written = self._finish_file(kind, opened, opened.builder)
        opened.builder = None
        self._uploads.put(FinishedFile(opened.path, opened.index_path, written))
        self._files.append(written)

    def _finish_file(self, kind: FileKind, opened: OpenFile, builder: DataFileBuilder) -> WrittenFile:
        """Closes, reads back and indexes a file. Data file and index are in the spool folder afterwards."""
        key = self._layout.data_key(self._fingerprint, kind.bucket, self._stem(opened.seq), builder.suffix)
        index_key = self._layout.index_key(key)
        with self._spooling():
            rows = builder.close()
            sha256, num_bytes = _read_back(opened.path, rows, self._progress)
            write_index(opened.index_path, rows, self._index_metadata(key, sha256, num_bytes))
            index_sha256, index_bytes = _read_back(opened.index_path, [], self._progress)
        frames = sum(row.num_frames for row in rows)
        columns: dict[str, set[Any]] = {
            "id": {row.id for row in rows},
            "fps": opened.fps,
            "num_frames": {row.num_frames for row in rows},
            **{name: {kind.paired} for name in self._members if self._unpaired},
        }
        ranges = {column: [min(values), max(values)] for column, values in columns.items()}
        opened.fps = set()
        return WrittenFile(
            key, index_key, kind.bucket, num_bytes, index_bytes, len(rows), sha256, index_sha256, frames, ranges
        )

    @contextmanager
    def _spooling(self) -> Iterator[None]:
        """Turns errors of the local disk into `StorageUnavailable`: another attempt, perhaps on another machine, may succeed."""
        try:
            yield
        except OSError as error:
            raise StorageUnavailable(
                f"spool folder {self._spool_dir} cannot be written: {error.strerror or error}; it needs space for a file of "
                f"{self._config.file_bytes} bytes per bucket and {FINISHED_FILES} more (write.file_bytes; TMPDIR moves it)",
                shard=self._shard_id,
                stage="write",
            ) from error

    def _stem(self, seq: int) -> str:
        return f"{self._shard_id[:16]}-{self._attempt}-{seq:05d}"

    def _file_metadata(self, kind: FileKind) -> dict[str, Any]:
        """Metadata of a data file, as in docs/formats.md. Independent of the attempt: equal rows give equal files."""
        spec = self._metadata["spec"]
        recommended = {name: spec.get(name) for name in ("scale", "shift", "mean", "std")}
        columns = self._columns(kind)
        return {
            **self._metadata,
            "format": "latentset",
            "format_version": self._layout.version,
            "container": self._config.format,
            "bucket": kind.bucket,
            "shard_id": self._shard_id,
            "fingerprint": self._fingerprint,
            "latent": {
                "posterior": "moments" if self._config.moments else "mean",
                "dtype": self._config.dtype,
                "layout": "CTHW",
                "byte_order": "little",
                **({} if self._config.compression == "none" else {"compression": self._config.compression}),
                **{name: sorted(columns[name]) for name in ("store", "without") if columns[name]},
            },
            "normalisation": {"applied": False, **recommended},
        }

    def _index_metadata(self, key: str, sha256: str, num_bytes: int) -> dict[str, Any]:
        data = {"key": key, "num_bytes": num_bytes, "sha256": sha256}
        return {
            "format": "latentset-index",
            "format_version": self._layout.version,
            "fingerprint": self._fingerprint,
            "data": data,
        }


def _read_back(path: Path, rows: list[IndexRow], progress: Callable[[int], None]) -> tuple[str, int]:
    """SHA-256 and size of the file on disk, after checking the hash of every tensor in it.

    Raises:
        BuildError: a tensor is not at its offset (a failing disk, or a container that writes another layout).
    """
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=False)
    with path.open("rb") as file:
        while piece := file.read(READ_BACK_BYTES):
            checker.feed(piece)
            progress(len(piece))
    sha256 = checker.finish()
    for problem in checker.problems:
        raise BuildError(
            f"{path.name} differs from what was written at {problem.id}: found {problem.found}, "
            f"expected {problem.expected}. Nothing was uploaded; check the spool disk",
            stage="write",
        )
    return sha256, checker.num_bytes
