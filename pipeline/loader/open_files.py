"""Open data files of a dataset, and the limit of all of them in a process (`ulimit -n`)."""

from __future__ import annotations

import resource
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, ClassVar, TypeVar

from pipeline.errors import AccessError, StorageUnavailable
from pipeline.process.fork_locks import fork_lock
from pipeline.storage.local_errors import TOO_MANY_OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pipeline.storage.range_reader import RangeReader

MOST, LEAST = 128, 4  # of one dataset; a process may often have 1024
Result = TypeVar("Result")


class OpenFiles:
    """Readers of the files of one dataset by number, those used last. Safe for several threads.

    All datasets of a process together keep open at most half of the files that it may have, fewer once the limit was met. A reader that
    is let go closes its file when the last thread that reads from it has done so.
    """

    _living: ClassVar[weakref.WeakSet[OpenFiles]] = weakref.WeakSet()
    _most: ClassVar[int] = MOST

    def __init__(self) -> None:
        self._held: OrderedDict[int, RangeReader] = OrderedDict()
        self._lock = fork_lock()
        self._living.add(self)

    def held_of(self, numbers: Iterable[int]) -> dict[int, RangeReader]:
        """Readers of those of the files that are open."""
        held = self._held
        with self._lock:
            found = {number: held[number] for number in numbers if number in held}
            for number in found:
                held.move_to_end(number)
        return found

    def get(self, number: int, opened: Callable[[], RangeReader]) -> RangeReader:
        """The reader of a file, made by `opened` if it is not here. Raises as `opened`."""
        if found := self.held_of((number,)):
            return found[number]
        made = with_files_closed(opened)
        most = self._share()
        with self._lock:
            held = self._held.setdefault(number, made)
            while len(self._held) > most:
                self._held.popitem(last=False)
            return held

    def read_into(
        self, number: int, opened: Callable[[], RangeReader], start: int, buffers: Sequence[memoryview]
    ) -> int:
        """`RangeReader.read_into` of a file, which is let go if the store fails: NFS may not know the open file any more (ESTALE)."""
        try:
            return self.get(number, opened).read_into(start, buffers)
        except StorageUnavailable:
            with self._lock:
                self._held.pop(number, None)
            raise

    def clear(self) -> None:
        """Lets all files go. Later reads open them again."""
        with self._lock:
            self._held.clear()

    def __len__(self) -> int:
        return len(self._held)

    @classmethod
    def make_space(cls) -> None:
        """Lets the files of all datasets go, and keeps half as many of each from now on."""
        living = list(cls._living)
        cls._most = max(LEAST, min(cls._most, max(map(len, living), default=0)) // 2)
        for one in living:
            one.clear()

    def _share(self) -> int:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        share = MOST if allowed == resource.RLIM_INFINITY else allowed // 2 // max(1, len(self._living))
        return max(LEAST, min(self._most, share))


def with_files_closed(call: Callable[[], Result]) -> Result:
    """The result of `call`, which opens a file; made again without the open files of datasets if there are too many. Raises as `call`."""
    try:
        return call()
    except AccessError as error:
        if getattr(error.__cause__, "errno", None) not in TOO_MANY_OPEN:
            raise
    OpenFiles.make_space()
    return call()
