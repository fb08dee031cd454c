"""Buffer that collects the latents of one clip, chunk by chunk, in memory that does not grow with the video.

Takes pieces `(C, t, h, w)` in the storage dtype. Gives one array `(C, T, h, w)` in C order: in memory while small, else mapped from an
unnamed temporary file, which is deleted with the array.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import numpy as np

from pipeline.process.scratch import local_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MEMORY_BYTES = 16 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 -> storage dtype; bfloat16 as uint16 bits, rounded to nearest even. Too large values become infinite, NaN stays NaN."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # CUDA's NaN is 0x7FFFFFFF: rounded like a number it would overflow to -0, a valid value.
        rounded[(bits & 0x7FFFFFFF) > 0x7F800000] = 0x7FC0
        return rounded
    with np.errstate(over="ignore"):  # the writer rejects infinities and names the clip
        return values.astype(np.dtype(dtype).newbyteorder("<"), copy=False)


class LatentSpool:
    """Append pieces, then `finish` once. Both raise `StorageUnavailable` if `folder` cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: np.ndarray | None = None  # most clips are one piece
        self._blocks: list[mmap.mmap] = []
        self._nbytes = 0
        self._frames = 0
        self._file: IO[bytes] | None = None

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            with local_disk(self._folder):
                yield
        except BaseException:
            if self._file is not None:
                with suppress(OSError):  # closing flushes
                    self._file.close()
            raise

    def append(self, piece_Cthw: np.ndarray) -> None:
        """Adds the next latent frames."""
        with self._on_disk():
            self._append(piece_Cthw)

    def _append(self, piece_Cthw: np.ndarray) -> None:
        # Time first: pieces are then contiguous in the file, whatever the video's length will be.
        piece_tChw = np.ascontiguousarray(piece_Cthw.swapaxes(0, 1))
        self._frames += piece_tChw.shape[0]
        self._nbytes += piece_tChw.nbytes
        if self._file is None and self._nbytes > MEMORY_BYTES:
            self._file = tempfile.TemporaryFile(dir=self._folder, prefix="latent-")  # noqa: SIM115 - closed by finish
            for earlier in self._held():
                self._file.write(earlier)
            self._blocks.clear()
            self._first = piece_tChw[:0]  # shape and dtype
        if self._file is not None:
            self._file.write(piece_tChw.data)
        elif self._first is None:
            self._first = piece_tChw
        else:
            self._hold(piece_tChw.data.cast("B"))

    def _hold(self, data: memoryview) -> None:
        # Not on the heap: small arrays that live for a whole video, between the large short-lived ones of the encode steps, prevent
        # malloc from reusing freed memory. Measured: a process then grows by 200 MB in ten minutes of video.
        while len(data):
            if not self._blocks or self._blocks[-1].tell() == BLOCK_BYTES:
                self._blocks.append(mmap.mmap(-1, BLOCK_BYTES))
            free = BLOCK_BYTES - self._blocks[-1].tell()
            self._blocks[-1].write(data[:free])
            data = data[free:]

    def _held(self) -> list[memoryview]:
        """Pieces in memory, in order."""
        first = [] if self._first is None else [self._first.data.cast("B")]
        return first + [memoryview(block)[: block.tell()] for block in self._blocks]

    def finish(self) -> np.ndarray:
        """The whole latent `(C, T, h, w)`, C-contiguous."""
        like = self._first
        if like is None:
            raise ValueError("finish() before any append()")
        _, channels, height, width = like.shape
        if self._file is None:
            whole = like if not self._blocks else np.frombuffer(b"".join(self._held()), like.dtype)
            return np.ascontiguousarray(whole.reshape(-1, channels, height, width).swapaxes(0, 1))
        with self._on_disk():
            return self._map(self._file, like)

    def _map(self, file: IO[bytes], like: np.ndarray) -> np.ndarray:
        _, channels, height, width = like.shape
        frame_bytes = channels * height * width * like.itemsize
        with tempfile.TemporaryFile(dir=self._folder, prefix="latent-") as target:
            # Reserved before it is mapped: on a full disk a write to a mapping is SIGBUS, which kills the process.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(target.fileno(), 0, frame_bytes * self._frames)
            latent_CTHW = np.memmap(target, like.dtype, "r+", shape=(channels, self._frames, height, width))
        step = max(1, MEMORY_BYTES // frame_bytes)
        file.seek(0)
        for start in range(0, self._frames, step):
            block = np.frombuffer(file.read(step * frame_bytes), like.dtype).reshape(-1, channels, height, width)
            latent_CTHW[:, start : start + len(block)] = block.swapaxes(0, 1)
            # Written pages are moved to the file and released, so that a long video needs no more memory than a short one.
            latent_CTHW.flush()
            latent_CTHW.base.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
        file.close()
        return latent_CTHW
