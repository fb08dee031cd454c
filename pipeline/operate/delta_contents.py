"""Contents of the Delta log as they are in the store: which versions, from which snapshots and takedowns, and whether Lathe wrote them.

Takes a store, returns `LogContents`. Reads the names, the first line of each version and the footer of each checkpoint. Objects that
Lathe replaces meanwhile are read again, so that a publisher does not take the work of another for that of a foreign program.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import NotFound, OutputError, SourceChanged
from pipeline.format.layout import DELTA_LOG
from pipeline.operate.delta_actions import CHECKPOINT_METADATA, ENGINE
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.storage import ObjectInfo, Store

LAST_CHECKPOINT = "_last_checkpoint"
NAME = re.compile(r"(?P<version>\d{20})(?P<kind>\.json|\.checkpoint\.parquet)")
HEAD_BYTES = 64 * 1024  # read of a version to get its first line
READ_AGAIN = 5  # times, an object that is replaced while it is read
WORKERS = 8


def version_key(version: int) -> str:
    """Key of a version."""
    return f"{DELTA_LOG}{version:020}.json"


def checkpoint_key(version: int) -> str:
    """Key of the checkpoint of a version."""
    return f"{DELTA_LOG}{version:020}.checkpoint.parquet"


class Origin(NamedTuple):
    """What a version or checkpoint was made from."""

    view: int  # version of the way the log is made
    takedowns: str  # digest of the takedowns that it applies
    record: str  # digest of the record of the snapshot; "" if no snapshot has this number


@dataclass(frozen=True, slots=True)
class Head:
    """First line of a version."""

    origin: Origin | None  # None: cut off, or made by an earlier state of Lathe; to be written again
    checkpoint: bool = False  # whether the version has one
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogContents:
    """A log that only Lathe has written to."""

    heads: dict[int, Head]
    checkpoints: dict[int, Origin]
    last_checkpoint: tuple[int, Origin] | None

    def is_current(self, version: int, origin: Origin) -> bool:
        """Whether the version is whole and was made from this."""
        head = self.heads.get(version)
        if head is None or head.origin != origin:
            return False
        return not head.checkpoint or self.checkpoints.get(version) == origin

    def is_tidy(self) -> bool:
        """Whether checkpoints are those that versions have, and the last one is named."""
        expected = {version for version, head in self.heads.items() if head.checkpoint}
        if set(self.checkpoints) != expected:
            return False
        last = max(expected, default=None)
        return self.last_checkpoint == (None if last is None else (last, self.checkpoints[last]))


class LogReader:
    """Reader of one log. Remembers what it has read of objects that have not changed since."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[str, str], Any] = {}

    def read(self) -> LogContents:
        """The log as it is now.

        Raises:
            OutputError: another program wrote to it.
        """
        found: dict[str, dict[int, ObjectInfo]] = {".json": {}, ".checkpoint.parquet": {}}
        last = None
        for info in self._store.list(DELTA_LOG):
            match = NAME.fullmatch(info.key.removeprefix(DELTA_LOG))
            if match is not None:
                found[match["kind"]][int(match["version"])] = info
            elif info.key == DELTA_LOG + LAST_CHECKPOINT:
                last = info
            else:
                raise self._foreign(info.key)
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="delta") as pool:
            heads = pool.map(partial(self._get, read=self._head), found[".json"].values())
            heads_by_version = dict(zip(found[".json"], heads, strict=True))
            origins = pool.map(partial(self._get, read=self._origin), found[".checkpoint.parquet"].values())
            origins_by_version = dict(zip(found[".checkpoint.parquet"], origins, strict=True))
        return LogContents(
            {version: head for version, head in heads_by_version.items() if head is not None},
            {version: origin for version, origin in origins_by_version.items() if origin is not None},
            None if last is None else self._get(last, read=self._last),
        )

    def _get(self, info: ObjectInfo, read: Callable[[ObjectInfo], Any]) -> Any:
        """`read(info)`, or again if the object was replaced meanwhile. None if it is gone."""
        for _ in range(READ_AGAIN):
            name = info.key, info.etag
            if name in self._known:
                return self._known[name]
            try:
                found = self._known[name] = read(info)
                return found
            except NotFound:
                return None
            except (OutputError, SourceChanged) as error:
                try:
                    now = self._store.stat(info.key)
                except NotFound:
                    return None
                if now.etag == info.etag and isinstance(error, OutputError):
                    raise
                info = now
        raise SourceChanged(f"{info.key} is replaced again and again; publish again", uri=self._store.uri(info.key))

    def _head(self, info: ObjectInfo) -> Head:
        if not info.size:  # a kill on a mount without hard links
            return Head(None)
        data = self._store.read_range(info.key, 0, min(HEAD_BYTES, info.size), etag=info.etag)
        if b"\n" not in data and info.size > len(data):  # thousands of fingerprints
            data = self._store.read_range(info.key, 0, info.size, etag=info.etag)
        line = data.partition(b"\n")[0]
        try:
            facts = json.loads(line)["commitInfo"]
            if not str(facts["engineInfo"]).startswith(ENGINE):
                raise self._foreign(info.key)
            expected = len(line) + 1 + int(facts.get("bytes", info.size))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self._foreign(info.key) from None
        if "bytes" in facts and info.size > expected:
            raise self._foreign(info.key)
        origin = _origin(facts) if info.size == expected else None
        return Head(origin, bool(facts.get("checkpoint")), dict(facts.get("leftOut") or {}))

    def _origin(self, info: ObjectInfo) -> Origin:
        try:
            file = pa.PythonFile(RangedFile(self._store, info.key, info.size), mode="r")
            facts = json.loads((pq.read_schema(file).metadata or {})[CHECKPOINT_METADATA])
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            raise self._foreign(info.key) from None
        return _origin(facts) or Origin(0, "", "")

    def _last(self, info: ObjectInfo) -> tuple[int, Origin]:
        try:
            facts = json.loads(self._store.read(info.key))
            if not str(facts["tags"]["engineInfo"]).startswith(ENGINE):
                raise self._foreign(info.key)
            return int(facts["version"]), _origin(facts["tags"]) or Origin(0, "", "")
        except (ValueError, KeyError, TypeError):
            raise self._foreign(info.key) from None

    def _foreign(self, key: str) -> OutputError:
        return OutputError(
            f"{key} was not written by Lathe: only Lathe may write this log. To keep foreign changes, copy the data; "
            f"to rebuild the log, delete {self._store.uri(DELTA_LOG)} and publish again, or use --no-delta",
            uri=self._store.uri(key),
        )


def _origin(facts: dict[str, Any]) -> Origin | None:
    """What a version says it was made from; None if it does not say."""
    try:
        return Origin(int(facts["view"]), str(facts["takedowns"]), str(facts["record"]))
    except (ValueError, KeyError, TypeError):
        return None
