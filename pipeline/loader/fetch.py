"""Reads of tensors into given memory: one ranged read a tensor, neighbours in one file together, hashes checked.

Files stay open up to a number; a store that fails for a while is asked again (`Store.patiently`).
"""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

from pipeline.errors import InputError, StorageUnavailable
from pipeline.format.tensors import payload_hash
from pipeline.loader.open_files import OpenFiles
from pipeline.storage import Result
from pipeline.storage.range_reader import read_together

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.files import DataFiles
    from pipeline.storage import Store
    from pipeline.storage.range_reader import RangeReader

GAP_BYTES = 64 * 1024  # read and thrown away, rather than asked for in two reads
READ_BYTES = 32 * 1024 * 1024  # most bytes of one read of several tensors
OPEN_AT_ONCE = 16  # files that a thread keeps open while it reads from them


@dataclass(slots=True, eq=False)
class Wanted:
    """One tensor, `length` bytes from `offset`: number `tensor` in the index of a row of a file. `place`: number of the memory for it."""

    file: int
    offset: int
    length: int
    index: FileIndex
    row: int
    tensor: int
    place: int

    @classmethod
    def of(cls, file: int, index: FileIndex, row: int, tensor: int, place: int) -> Wanted:
        """What the index says of a tensor."""
        return cls(file, index.offset(row, tensor), index.length(row, tensor), index, row, tensor, place)

    @property
    def stop(self) -> int:
        """Offset after the last byte."""
        return self.offset + self.length


@dataclass(slots=True)
class Span:
    """Tensors of one file that are read at once, in the order of their offsets. `stop`: offset after the last byte."""

    file: int
    start: int
    stop: int
    members: list[Wanted]


def spans_of(wanted: Iterable[Wanted]) -> list[Span]:
    """Groups tensors that lie near each other in one file."""
    found: list[Span] = []
    last = None
    for item in sorted(wanted, key=attrgetter("file", "offset")):
        start, stop = item.offset, item.offset + item.length
        if (
            last is None
            or last.file != item.file
            or not 0 <= start - last.stop <= GAP_BYTES
            or stop - last.start > READ_BYTES
        ):
            last = Span(item.file, start, stop, [item])
            found.append(last)
        else:
            last.members.append(item)
            last.stop = stop
    return found


class Fetcher:
    """Reads spans of the data files of one dataset. Safe for several threads."""

    def __init__(self, store: Store, files: DataFiles) -> None:
        self._store, self._files = store, files
        self._open = OpenFiles()
        self._gap = threading.local()

    def read(
        self, spans: Sequence[Span], memory: Sequence[memoryview], stopped: Callable[[], bool] = lambda: False
    ) -> list[Wanted]:
        """Fills the memory of the members of all spans, `memory` by place. Returns those that the file is too short for.

        Raises:
            StorageUnavailable: the store failed for too long; names file and range.
            NotFound, AccessError: the file is missing or may not be read.
            CancelledError: `stopped()` before a span was read.
        """
        cut = []
        for at in range(0, len(spans), OPEN_AT_ONCE):
            part = spans[at : at + OPEN_AT_ONCE]
            if stopped():
                raise CancelledError
            held = self._open.held_of({span.file for span in part})
            reads = [
                (
                    held.get(span.file) or self._patiently(span, partial(self._opened, span.file)),
                    span.start,
                    self._buffers(span, memory),
                )
                for span in part
            ]
            for span, (_, start, buffers), done in zip(part, reads, read_together(reads), strict=True):
                if done:
                    continue
                if stopped():
                    raise CancelledError
                stop = start + self._patiently(span, partial(self._read_one, span.file, start, buffers))
                if stop < span.stop:
                    cut += [item for item in span.members if item.stop > stop]
        return cut

    def _patiently(self, span: Span, read: Callable[[], Result]) -> Result:
        """As `Store.patiently`; the error names file and range."""
        try:
            return self._store.patiently(read)
        except StorageUnavailable as error:
            where = self.describe(span.file, span.start, span.stop - span.start)
            raise StorageUnavailable(f"{where} could not be read: {error.message}", uri=error.uri) from error

    def _read_one(self, file: int, start: int, buffers: list[memoryview]) -> int:
        return self._open.read_into(file, lambda: self._reader(file), start, buffers)

    def describe(self, file: int, offset: int, length: int) -> str:
        """File and range as text."""
        return f"{self._store.uri(self._files.value('key', file))} bytes {offset} to {offset + length}"

    def damage(self, item: Wanted, view: memoryview) -> InputError | None:
        """The error if `view`, the bytes that were read, is not what is recorded."""
        if (found := payload_hash(view)) == (wanted := item.index.hash(item.row, item.tensor)):
            return None
        where = self.describe(item.file, item.offset, item.length)
        return InputError(
            f"{where}: the latent of {item.index.text('id', item.row)} is damaged: its hash is {found}, expected {wanted}; "
            "`lathe verify` lists all damaged ones"
        )

    def undecodable(self, item: Wanted, error: ValueError) -> InputError:
        """The error for bytes that are not a tensor as the file's metadata says."""
        where = self.describe(item.file, item.offset, item.length)
        name = item.index.text("id", item.row)
        return InputError(f"{where}: the latent of {name} is damaged: {error}; `lathe verify` lists all damaged ones")

    def cut(self, item: Wanted) -> InputError:
        """The error for a file that ends before the tensor does."""
        where = self.describe(item.file, item.offset, item.length)
        name = item.index.text("id", item.row)
        return InputError(f"{where}: the file ends before the latent of {name} does; see `lathe verify`")

    def close(self) -> None:
        """Lets all files go; reads under way end first, later ones open the files again."""
        self._open.clear()

    def _buffers(self, span: Span, memory: Sequence[memoryview]) -> list[memoryview]:
        """Memory of the members, and for what lies between them."""
        if len(span.members) == 1:
            return [memory[span.members[0].place]]
        found, at = [], span.start
        for item in span.members:
            if item.offset > at:
                found.append(self._scratch()[: item.offset - at])
            found.append(memory[item.place])
            at = item.stop
        return found

    def _scratch(self) -> memoryview:
        """Memory for bytes between tensors; one per thread, overwritten by each gap."""
        if not hasattr(self._gap, "view"):
            self._gap.view = memoryview(bytearray(GAP_BYTES))
        view: memoryview = self._gap.view
        return view

    def _opened(self, file: int) -> RangeReader:
        return self._open.get(file, lambda: self._reader(file))

    def _reader(self, file: int) -> RangeReader:
        return self._store.open_reader(self._files.value("key", file))
