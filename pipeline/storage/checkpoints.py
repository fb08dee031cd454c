"""Local cache of model checkpoints in object storage, by URI and ETag: a replaced checkpoint is another file.

The folder is `LATHE_CACHE`, else the platform's cache folder.
"""

from __future__ import annotations

import fcntl
import os
import re
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import StorageConfig
from pipeline.errors import CheckpointError, NotFound
from pipeline.records import SourceObject, stable_hash
from pipeline.storage import open_source, stat_uri

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 8 * 1024 * 1024


def fetch(uri: str, config: StorageConfig | None = None) -> str:
    """Path of a local copy of the current object at `uri`. Each call asks the store for its ETag; the object is downloaded once.

    Processes that need the same checkpoint at the same time wait for the first of them; a killed download leaves no partial file.

    Raises:
        FileNotFoundError: no such object.
        CheckpointError: the cache folder cannot be written.
        AccessError: the bucket, the credentials or the endpoint are refused.
        StorageUnavailable: the store failed after all tries.
    """
    config = config or StorageConfig()
    try:
        info = stat_uri(uri, config)
    except NotFound:
        raise FileNotFoundError(f"{uri} does not exist; check the key") from None
    name = re.sub(r"[^A-Za-z0-9._-]", "_", uri.rpartition("/")[2])
    folder = cache_folder() / "checkpoints" / stable_hash([uri, info.etag, info.size])
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(folder / ".lock"):
            if not (path.is_file() and path.stat().st_size == info.size):
                _download(SourceObject(uri, info.size, info.etag), path, config)
    except OSError as error:
        raise CheckpointError(
            f"cannot cache {uri} in {folder}: {error.strerror}; set LATHE_CACHE to a folder with {info.size} bytes free",
            uri=uri,
        ) from error
    return str(path)


def cache_folder() -> Path:
    """`LATHE_CACHE`, else `~/Library/Caches/lathe` on macOS, else `$XDG_CACHE_HOME/lathe` or `~/.cache/lathe`."""
    if chosen := os.environ.get("LATHE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lathe"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lathe"


def _download(source: SourceObject, path: Path, config: StorageConfig) -> None:
    scratch = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with open_source(source, config) as stream, open(scratch, "xb") as file:
            while block := stream.read(BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Holds the lock file; the system releases it if the process dies."""
    with open(lock, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
