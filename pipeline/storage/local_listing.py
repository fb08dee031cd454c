"""Listing of a local folder: its files in key order, and entries that are not files, with the reason.

Links are followed, except to a folder above. An entry that cannot be read is skipped if the caller takes `Unlisted` entries (for a corpus);
otherwise the listing fails (an output must be listed completely).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from pipeline.storage import ObjectInfo, Unlisted
from pipeline.storage.local_errors import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Entry = str | os.DirEntry[str]  # name of a file, or an entry of any kind
SCRATCH = ".lathe-tmp-"  # begins the names of files that are being written
# Errors of broken links (also of links to themselves), and of files that were deleted since they were listed.
DANGLING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
REFUSED = DANGLING | {errno.EACCES, errno.EPERM}


class Listing:
    """Listing of the keys below `root` that start with `prefix`. `unlisted` is called for each entry that is not listed."""

    def __init__(self, root: str, prefix: str, recursive: bool, unlisted: Callable[[Unlisted], None] | None) -> None:
        self._root = root
        self._prefix = prefix
        self._recursive = recursive
        self._unlisted = unlisted
        self._sized = True

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """Files below `folder` in key order. Folders may be nested as deep as paths are long."""
        open_folders = [self._entries(folder, ())]
        while open_folders:
            for item in open_folders[-1]:
                if not isinstance(item, ObjectInfo):
                    open_folders.append(self._entries(*item))
                    break
                yield item
            else:
                open_folders.pop()

    def keys(self, folder: str) -> Iterator[str]:
        """Keys of the files below `folder` in key order; asks the system only about links."""
        self._sized = False
        return (info.key for info in self.walk(folder))

    def _entries(
        self, folder: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[ObjectInfo | tuple[str, tuple[tuple[int, int], ...]]]:
        """Files and subfolders of one folder in key order; a subfolder with the (device, inode) of all folders above it."""
        path = os.path.join(self._root, folder) if folder else self._root
        with translated(path):
            try:
                here = os.stat(path)
                entries = [entry.name if _is_plain(entry) else entry for entry in os.scandir(path)]
                folders = {entry.name for entry in entries if not isinstance(entry, str) and self._is_folder(entry)}
                # A folder sorts like its keys: "a-b" < "a/b" < "a0".
                entries.sort(key=lambda entry: f"{_name(entry)}/" if _name(entry) in folders else _name(entry))
            except (FileNotFoundError, NotADirectoryError):
                if above:
                    self._report(folder, "folder", "deleted while it was listed")
                return
            except OSError as error:
                if not above or self._unlisted is None or error.errno not in REFUSED:
                    raise
                self._report(folder, "folder", f"cannot be read: {error.strerror}")
                return
        if (identity := (here.st_dev, here.st_ino)) in above:
            self._report(folder, "folder", "the same as one above it, by a link")
            return
        entries.reverse()
        while entries:
            entry = entries.pop()
            name = _name(entry)
            key = f"{folder}/{name}" if folder else name
            if name in folders:
                if self._recursive and (f"{key}/".startswith(self._prefix) or self._prefix.startswith(f"{key}/")):
                    yield key, (*above, identity)
            elif key.startswith(self._prefix) and not name.startswith(SCRATCH):
                info = self._info(key, entry, os.path.join(path, name))
                if info is not None:
                    yield info

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:  # entering `translated` for each of 100,000 entries takes a second
            return entry.is_dir()
        except OSError as error:
            if error.errno not in (DANGLING if self._unlisted is None else REFUSED):
                with translated(entry.path):
                    raise
            return False

    def _info(self, key: str, entry: _Entry, path: str) -> ObjectInfo | None:
        try:
            if isinstance(entry, str) or entry.is_file():
                if not self._sized:
                    return ObjectInfo(key, -1, "", 0.0)
                return info_of(key, os.stat(path) if isinstance(entry, str) else entry.stat())
        except OSError as error:
            if error.errno not in (DANGLING if self._unlisted is None else REFUSED):
                with translated(path):
                    raise
            if error.errno not in DANGLING:
                self._report(key, "file", f"cannot be read: {error.strerror}")
                return None
        if self._unlisted is not None:
            self._report(key, *(described(path) or ("file", "deleted while it was listed")))
        return None

    def _report(self, key: str, what: str, why: str) -> None:
        if self._unlisted is not None:
            self._unlisted(Unlisted(key, what, why))


def _is_plain(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file and not a link, as far as the folder says. Its name is kept alone: an entry takes 340 bytes."""
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:  # a file system whose folders do not say, and a file that may not be looked at
        return False


def _name(entry: _Entry) -> str:
    return entry if isinstance(entry, str) else entry.name


def described(path: str) -> tuple[str, str] | None:
    """Kind of an entry that is not a file or folder, and why it is not read: `("fifo", "not a file")`. None if there is no entry."""
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR}:
            return None
        return "file", f"cannot be read: {error.strerror}"
    try:
        found = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "link", "leads back to itself"
        if error.errno in DANGLING:
            return "link", "leads to nothing"
        return ("link" if stat.S_ISLNK(mode) else "file"), f"cannot be read: {error.strerror}"
    kinds = {stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    what = kinds.get(stat.S_IFMT(found))
    return (what, "not a file") if what is not None else ("file", "changed while it was listed")


def info_of(key: str, found: os.stat_result) -> ObjectInfo:
    """Size, etag and time of one file."""
    return ObjectInfo(key, found.st_size, etag_of(found), found.st_mtime)


def etag_of(found: os.stat_result) -> str:
    """`mtime_ns-size`."""
    return f"{found.st_mtime_ns}-{found.st_size}"
