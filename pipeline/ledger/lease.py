"""Lease of an output: one process at a time does what is named, such as a nightly build. Objects `_leases/{name}/{n}.json`.

The object with the highest number is the lease. Numbers only grow: a process takes the lease by creating the next number, so the object of
a holder is written by that holder alone, and no conditional replace is needed. A thread renews the object; whether it is still renewed is
judged by times of the store, so that clocks of machines do not matter. Stores that do not decide races of create-only puts (Swift, servers
that ignore conditions) keep the last of several objects: so after a pause the object is read back, and the process that finds its own
token holds the lease. Two holders at once cost work, never rows: receipts and snapshots decide for themselves.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from pipeline.errors import LatheError, LeaseHeld, LeaseLost, NotFound, OutputError
from pipeline.format.layout import LEASES, lease_key, lease_number
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from types import TracebackType

    from pipeline.storage import Store

# Of gc, compact and undo: gc must not delete what a compaction has written and not published yet, nor what an undo shows again.
MAINTENANCE = "maintenance"
TTL_S = 120.0  # without renewal, after which another process may take over
SETTLE_S = 2.0  # before a remote store is asked who won: longer than a small write takes
TRIES = 5  # when others create the next number first
CLOSE_S = 10.0  # for the release to reach the store


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """Contents of a lease object. Times are UTC, ISO 8601, by the clock of the holder: for people, nothing is decided by them."""

    name: str
    token: str
    command: str
    user: str
    host: str
    pid: int
    started: str
    expires: str
    ttl_s: float
    released: bool = False

    def to_json(self) -> bytes:
        """JSON bytes."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> LeaseRecord:
        """Inverse of `to_json`.

        Raises:
            ValueError, TypeError: not a lease.
        """
        raw: Any = json.loads(data)
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
        found = cls(**raw)
        if not isinstance(found.ttl_s, (int, float)):
            raise ValueError(f"ttl_s has to be a number, got {found.ttl_s!r}")
        return found


@dataclass(frozen=True, slots=True)
class _Found:
    """The newest object of a lease, as the store lists it."""

    number: int
    modified: float  # seconds since 1970, by the store
    record: LeaseRecord


class Lease:
    """Context manager that holds the lease `name` of an output. Entering takes it, leaving releases it, whatever the reason.

    `check()` belongs before each step that must not be done by two processes: it raises `LeaseLost` if another process took over.
    `settle_s`: pause before the store is asked who won; by default 2 s on remote stores, none in a folder, where `link` decides.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        command: str,
        *,
        ttl_s: float = TTL_S,
        settle_s: float | None = None,
    ) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._settle_s = settle_s if settle_s is not None else SETTLE_S if is_remote(store.root) else 0.0
        self._record = _record(name, command, ttl_s)
        self._number = 0
        self._confirmed = 0.0  # time.monotonic() before the last renewal that succeeded
        self._lost: LeaseLost | None = None
        self._renewing = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def key(self) -> str:
        """Key of the lease object that this process wrote."""
        return lease_key(self._record.name, self._number)

    def __enter__(self) -> Lease:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self) -> None:
        """Takes the lease and starts to renew it.

        Raises:
            LeaseHeld: another process holds it, or was first.
            OutputError: a lease object that cannot be read.
        """
        for _ in range(TRIES):
            before = newest(self._store, self._record.name)
            if before is not None and not self._is_free(before):
                raise self._held(before.record)
            self._number = before.number + 1 if before is not None else 1
            self._confirmed = time.monotonic()
            try:
                if self._store.put_if_absent(self.key, self._encoded()) and self._won(before):
                    self._delete_older()
                    break
            except BaseException:  # a signal as well: no thread would renew the object
                self._withdraw()
                raise
        else:
            raise LeaseHeld(
                f"the lease {self._record.name!r} of {self._store.root} could not be taken: {TRIES} times another process was "
                "first; run again later"
            )
        # A daemon thread: a store that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Returns if this process still holds the lease. Asks the store only if the last renewal is older than the lease's duration.

        Raises:
            LeaseLost: another process took it over, or its object was removed.
            StorageUnavailable: it lapsed, and the store cannot be asked.
        """
        if self._lost is None and time.monotonic() - self._confirmed > self._ttl_s:
            self._renew()
        self.check_known()

    def check_known(self) -> None:
        """As `check`, without asking the store: for loops that must not wait."""
        if self._lost is not None:
            raise LeaseLost(self._lost.message)

    def release(self) -> None:
        """Stops renewing and marks the object as released, unless the lease was lost. Returns after `CLOSE_S` at the latest: where the
        store does not answer, the lease expires.
        """
        self._closing.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    # --- taking -------------------------------------------------------------------------------------------------------

    def _is_free(self, found: _Found) -> bool:
        if found.record.released:
            return True
        now = store_time(self._store, f"{LEASES}{self._record.name}/{self._record.token}.time")
        return now - found.modified > found.record.ttl_s

    def _won(self, before: _Found | None) -> bool:
        """Whether the object just created is the lease.

        Raises:
            LeaseHeld: the holder before, which had not renewed it in time, renewed it meanwhile.
        """
        if self._settle_s:
            time.sleep(self._settle_s)
        if not self._is_ours():
            return False
        if before is not None and not before.record.released and self._was_renewed(before):
            raise self._held(before.record)
        if self._is_overtaken():
            self._withdraw()
            return False
        return True

    def _was_renewed(self, before: _Found) -> bool:
        if _listed(self._store, self._record.name).get(before.number) in (None, before.modified):
            return False
        record = LeaseRecord.from_json(self._store.read(lease_key(self._record.name, before.number)))
        return not record.released

    def _withdraw(self) -> None:
        with suppress(LatheError):
            if self._is_ours():
                self._store.delete(self.key)

    def _held(self, record: LeaseRecord) -> LeaseHeld:
        return LeaseHeld(
            f"{record.command} of {record.user} on {record.host} (process {record.pid}) holds the lease {record.name!r} of "
            f"{self._store.root} since {record.started}; nothing was started. It is free when that run ends, or "
            f"{record.ttl_s:g} s after it was killed. If no run holds it: delete {LEASES}{record.name}/",
            record=asdict(record),
        )

    def _delete_older(self) -> None:
        for number in _listed(self._store, self._record.name):
            if number < self._number:
                self._store.delete(lease_key(self._record.name, number))

    # --- holding ------------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        while not self._closing.wait(self._ttl_s / 4) and self._lost is None:
            with suppress(LatheError):  # a store that is away: others cannot take over meanwhile either
                self._renew()
        if self._lost is None:
            with suppress(LatheError), self._renewing:
                if self._is_ours():
                    self._store.write(self.key, replace(self._record, released=True).to_json())

    def _renew(self) -> None:
        """Sets `_confirmed` or `_lost`. Writes before it looks for a higher number: a process that takes over does it in the other order,
        so one of the two sees the other.
        """
        with self._renewing:
            if self._closing.is_set() or self._lost is not None:
                return
            began = time.monotonic()
            if self._is_ours():
                self._store.write(self.key, self._encoded())
                if not self._is_overtaken():
                    self._confirmed = began
                    return
            found = newest(self._store, self._record.name)
            by = "it was removed"
            if found is not None and found.record.token != self._record.token:
                by = f"{found.record.command} on {found.record.host} (process {found.record.pid}) took it over"
            self._lost = LeaseLost(
                f"the lease {self._record.name!r} of {self._store.root} was lost: {by}; what is committed stays, and the "
                "other run goes on from it"
            )

    def _encoded(self) -> bytes:
        return replace(self._record, expires=_utc(timedelta(seconds=self._ttl_s))).to_json()

    def _is_ours(self) -> bool:
        try:
            return LeaseRecord.from_json(self._store.read(self.key)).token == self._record.token
        except (NotFound, ValueError, TypeError):
            return False

    def _is_overtaken(self) -> bool:
        return max(_listed(self._store, self._record.name), default=0) > self._number


def newest(store: Store, name: str) -> _Found | None:
    """The lease object that counts; None if there is none.

    Raises:
        OutputError: it cannot be read.
    """
    while listed := _listed(store, name):
        number = max(listed)
        key = lease_key(name, number)
        try:
            return _Found(number, listed[number], LeaseRecord.from_json(store.read(key)))
        except NotFound:  # its holder was second, or a newer one deleted it
            continue
        except (ValueError, TypeError) as error:
            raise OutputError(
                f"{key} cannot be read as a lease: {error}; remove it if no run holds it", uri=store.uri(key)
            ) from None
    return None


def store_time(store: Store, key: str) -> float:
    """Present time by the clock of the store, in seconds since 1970: that of the scratch object `key`, which is written and deleted."""
    store.write(key, b"")
    try:
        return store.stat(key).modified
    finally:
        store.delete(key)


def _listed(store: Store, name: str) -> dict[int, float]:
    """Times of the lease objects, by number."""
    found = ((lease_number(info.key), info.modified) for info in store.list(f"{LEASES}{name}/"))
    return {number: modified for number, modified in found if number is not None}


def _record(name: str, command: str, ttl_s: float) -> LeaseRecord:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = f"user {os.getuid()}"
    now = _utc(timedelta())
    return LeaseRecord(name, secrets.token_hex(8), command, user, socket.gethostname(), os.getpid(), now, now, ttl_s)


def _utc(later: timedelta) -> str:
    return (datetime.now(UTC) + later).isoformat(timespec="seconds")
