"""Tensors of one version of a sidecar set, by key. Memory: 24 bytes a key, and the indexes of files read last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import OutputError
from pipeline.format.tensors import payload_hash
from pipeline.sidecars.description import DTYPES, read_set
from pipeline.sidecars.file_index import KEYS, FileIndex, read_index_table, unpacked_keys
from pipeline.sidecars.names import key_of, split_version
from pipeline.sidecars.versions import SetVersions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pipeline.sidecars.file_index import Place
    from pipeline.storage import Store

INDEX_BYTES = 256 * 1024 * 1024


class Position(NamedTuple):
    """A row of a version: number of its file, its place in it."""

    file: int
    row: int


class SidecarReader:
    """One version of a set. `described`: what its tensors are; `number`: of the version; `identity`: name, number and fingerprint as text.

    Safe for several threads.
    """

    def __init__(self, store: Store, name: str) -> None:
        """Opens `t5` (the newest version) or `t5@3`.

        Raises:
            ConfigError: not the name of a set.
            InputError: no such set or version.
            OutputError: an object of the set that cannot be read.
        """
        self.name, number = split_version(name)
        self._store = store
        self.described = read_set(store, self.name)
        versions = SetVersions(store, self.name)
        self.version = versions.read(number)
        self.number = self.version.number
        self.identity = f"{self.name}@{self.number}:{self.described.fingerprint[:8]}"
        table = versions.files(self.version)
        self._keys_of_files = table.select(["key", "index_key", "index_sha256"])
        self._sort(table["keys"].to_pylist(), table["hidden"].to_pylist())
        self._indexes: OrderedDict[int, FileIndex] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def _sort(self, keys: list[bytes], hidden: list[list[int]]) -> None:
        parts, files, rows = [np.zeros(0, KEYS)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, (packed, gone) in enumerate(zip(keys, hidden, strict=True)):
            found = unpacked_keys(packed)
            kept = np.delete(np.arange(len(found), dtype=np.int32), gone)
            parts.append(found[kept])
            files.append(np.full(len(kept), number, np.int32))
            rows.append(kept)
        joined = np.concatenate(parts)
        order = np.argsort(joined, kind="stable")
        self._sorted, self._files, self._rows = joined[order], np.concatenate(files)[order], np.concatenate(rows)[order]

    def __len__(self) -> int:
        return len(self._sorted)

    def has(self, keys: Sequence[bytes]) -> np.ndarray:
        """Which keys the version has, bool."""
        return self._at(keys) >= 0

    def find(self, keys: Sequence[bytes]) -> list[Position | None]:
        """Where the rows of these keys are; None for those that the version does not have."""
        return [
            None if at < 0 else Position(int(self._files[at]), int(self._rows[at])) for at in self._at(keys).tolist()
        ]

    def positions(self) -> Iterator[Position]:
        """Where each row of the version is, file by file."""
        for file in range(self._keys_of_files.num_rows):
            for row in np.sort(self._rows[self._files == file]).tolist():
                yield Position(file, row)

    def _at(self, keys: Sequence[bytes]) -> np.ndarray:
        wanted = np.array(keys, KEYS)
        if not len(self._sorted) or not len(wanted):
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, at, -1)

    def place(self, position: Position, tensor: str) -> Place:
        """Where a tensor of a row lies in its file. Reads the index of the file if it is not in memory."""
        return self._index(position.file).place(tensor, position.row)

    def data_key(self, file: int) -> str:
        """Key of a data file."""
        return str(self._keys_of_files["key"][file].as_py())

    def load(self, files: Iterable[int]) -> None:
        """Reads indexes of files that are not in memory. Raises as `read_index_table`."""
        for file in files:
            self._index(file)

    def held(self, file: int) -> bool:
        """Whether the index of a file is in memory."""
        return file in self._indexes

    def tensors(self, text: str) -> dict[str, np.ndarray] | None:
        """Tensors by name of a caption, or of an id; None if the version does not have it. bfloat16 as its bits, uint16.

        Raises:
            OutputError: bytes that are not the recorded ones.
        """
        (position,) = self.find([key_of(text)])
        if position is None:
            return None
        return {name: self.tensor(position, name) for name in self.described.tensors}

    def tensor(self, position: Position, name: str) -> np.ndarray:
        """One tensor of a row, as `tensors`."""
        place = self.place(position, name)
        data = self._store.read_range(self.data_key(position.file), place.offset, place.length)
        self.check(data, position, name)
        return np.frombuffer(data, DTYPES[self.described.tensors[name].dtype]).reshape(place.shape)

    def check(self, data: bytes | memoryview, position: Position, name: str) -> None:
        """Raises OutputError if the bytes of a tensor are not the recorded ones."""
        place = self.place(position, name)
        if len(data) != place.length or payload_hash(data) != place.hash.hex():
            key = self.data_key(position.file)
            raise OutputError(
                f"{key} bytes {place.offset} to {place.offset + place.length}: {name} of sidecar set {self.name} is damaged; see "
                "`lathe sidecar verify`",
                uri=self._store.uri(key),
            )

    def _index(self, file: int) -> FileIndex:
        with self._lock:
            if (held := self._indexes.get(file)) is not None:
                self._indexes.move_to_end(file)
                return held
        row = self._keys_of_files.slice(file, 1).to_pylist()[0]
        table = self._store.patiently(lambda: read_index_table(self._store, row["index_key"], row["index_sha256"]))
        made = FileIndex(table, self.described.tensors)
        with self._lock:
            if file not in self._indexes:
                self._indexes[file] = made
                self._bytes += made.num_bytes
                while self._bytes > INDEX_BYTES and len(self._indexes) > 1:
                    self._bytes -= self._indexes.popitem(last=False)[1].num_bytes
        return made
