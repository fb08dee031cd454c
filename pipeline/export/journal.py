"""State of an export's directory: what it was made of (`_lathe_export.json`) and which files hold which rows (`_lathe_export/`).

`_lathe_export.json` is created only in an empty directory and replaced atomically. Each part has a record `_lathe_export/parts/NAME.json`,
written before its files appear and marked done after: files of an unfinished part are named in a record, so a killed export is undone.
Files are written in `_lathe_export/writing/` under names no trainer looks for, flushed, then renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

MANIFEST = "_lathe_export.json"
STATE = "_lathe_export"
FORMAT = "lathe-export"
FORMAT_VERSION = 1
FLUSHES = 8  # at a time
_TEMPORARY = f".{MANIFEST}."


@dataclass(slots=True)
class Part:
    """Rows written together. `rows`: [id, version, paths of its own, entry of the index]; `shared`: the file that all of them share."""

    name: str
    folder: str
    rows: list[list[Any]]
    shared: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # bytes by path, once done
    done: bool = False

    @property
    def paths(self) -> list[str]:
        """All files of the part."""
        own = [path for row in self.rows for path in row[2]]
        return [*own, self.shared] if self.shared else own


class Journal:
    """The directory of an export, open for one writer. Use as a context manager."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        """Opens or creates the export in `directory`. `identity`: what every export into it must share, JSON-ready.

        Raises:
            OutputError: the directory holds something else or an export with another identity, or is being written.
        """
        self.directory = directory
        self._parts_folder = directory / STATE / "parts"
        self._writing = directory / STATE / "writing"
        try:
            self._refuse_others()
            self._parts_folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(directory / STATE / "lock", "w")  # noqa: SIM115 - held until `__exit__`
            try:
                self._take(identity)
            except BaseException:
                self._lock.close()
                raise
        except OSError as error:
            raise OutputError(f"{directory} cannot be written: {error.strerror or error}") from None

    def _refuse_others(self) -> None:
        if not self.directory.exists() or (self.directory / MANIFEST).exists():
            return
        found = sorted(name for name in os.listdir(self.directory) if name != STATE and not name.startswith(_TEMPORARY))
        if found:
            raise OutputError(
                f"{self.directory} holds {found[0]!r} and is not an export of Lathe (it has no {MANIFEST}); give an empty or new folder"
            )

    def _take(self, identity: dict[str, Any]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.directory} is being written by another export; wait until it has ended") from None
        for left in self.directory.glob(f"{_TEMPORARY}*"):
            left.unlink()
        path = self.directory / MANIFEST
        if not path.exists():
            self._replace(
                path, {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": identity, "complete": None}
            )
        self.manifest = self._read(path, json.loads(json.dumps(identity)))
        shutil.rmtree(self._writing, ignore_errors=True)
        self._writing.mkdir(parents=True)
        self._number = max((int(found.stem) for found in self._parts_folder.glob("[0-9]*.json")), default=0)

    def _read(self, path: Path, identity: dict[str, Any]) -> dict[str, Any]:
        try:
            manifest = json.loads(path.read_bytes())
            version, made_of = manifest["format_version"], manifest["identity"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path} is not the manifest of an export; give an empty or new folder") from None
        if version != FORMAT_VERSION:
            raise OutputError(
                f"{path} has format version {version!r}, this Lathe writes {FORMAT_VERSION}; give a new folder"
            )
        if made_of != identity:
            names = [name for name in {**made_of, **identity} if made_of.get(name) != identity.get(name)]
            differences = "; ".join(
                f"{name}: {made_of.get(name)!r} there, {identity.get(name)!r} now" for name in names
            )
            raise OutputError(f"{self.directory} holds an export that differs in {differences}; give another folder")
        return dict(manifest)

    def _replace(self, path: Path, values: Any) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        write_flushed(temporary, json.dumps(values, indent=1, sort_keys=True).encode())
        os.replace(temporary, path)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._writing, ignore_errors=True)
        self._lock.close()

    # ---- parts ----------------------------------------------------------------------------------------------------

    def parts(self) -> Iterator[Part]:
        """Records of all parts, in order of their names."""
        for path in sorted(self._parts_folder.glob("*.json")):
            try:
                yield Part(**json.loads(path.read_bytes()))
            except (ValueError, TypeError):
                raise OutputError(f"{path} is not a record of an export; give a new folder") from None

    def next_name(self) -> str:
        """Name of a new part."""
        self._number += 1
        return f"{self._number:06d}"

    def staged(self, path: str) -> Path:
        """Where the file `path` of a part is to be written."""
        return self._writing / f"{path.replace('/', '--')}.part"

    def begin(self, part: Part) -> None:
        """Records a part before its first file."""
        self._replace(self._parts_folder / f"{part.name}.json", asdict(part))

    def commit(self, part: Part) -> None:
        """Moves the written files of a part into place and marks it done."""
        paths = part.paths
        with ThreadPoolExecutor(
            FLUSHES
        ) as pool:  # a flush of a small file takes milliseconds; together they take as long as one
            sizes = list(pool.map(_flush, map(self.staged, paths)))
        for path, size in zip(paths, sizes, strict=True):
            self._place(self.staged(path), path)
            part.sizes[path] = size
        part.done = True
        self.begin(part)

    def put(self, path: str, data: bytes) -> None:
        """Writes a small file at its place, atomically."""
        write_flushed(self.staged(path), data)
        self._place(self.staged(path), path)

    def _place(self, written: Path, path: str) -> None:
        target = self.directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(written, target)

    def whole(self, part: Part) -> bool:
        """Whether the files of a part are there, with the sizes they had."""
        if not part.done:
            return False
        try:
            return all((self.directory / path).stat().st_size == size for path, size in part.sizes.items())
        except OSError:
            return False

    def drop(self, part: Part) -> None:
        """Removes a part: its files, then its record."""
        for path in part.paths:
            self.remove(path)
        (self._parts_folder / f"{part.name}.json").unlink(missing_ok=True)

    def remove(self, path: str) -> None:
        """Removes a file, and the folders that it leaves empty."""
        target = self.directory / path
        target.unlink(missing_ok=True)
        for folder in target.parents:
            if folder == self.directory or (folder.exists() and any(folder.iterdir())):
                break
            if folder.exists():
                folder.rmdir()

    # ---- the whole ------------------------------------------------------------------------------------------------

    def unfinished(self) -> None:
        """Marks the export as incomplete, before anything in it changes."""
        self.manifest["complete"] = None
        self._replace(self.directory / MANIFEST, self.manifest)

    def complete(self, facts: dict[str, Any]) -> None:
        """Marks the export as complete. `facts`: what it holds, JSON-ready."""
        self.manifest["complete"] = facts
        self._replace(self.directory / MANIFEST, self.manifest)


def _flush(path: Path) -> int:
    """Flushes a written file to disk; gives its size."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def write_flushed(path: Path, data: bytes) -> None:
    """Writes a file and flushes it to disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
