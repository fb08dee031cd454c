"""Builds and the store's clock, as `lathe gc` has to know them before it deletes. Takes a store, returns `Builds`, or refuses.

Ages are judged by the store's clock alone: an object that was just written has its present time. A heartbeat that is renewed is a running
build. One that stopped and did not end may still run and hold files that no receipt names yet.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound, OutputError
from pipeline.ledger.lease import store_time
from pipeline.operate.status import MISSED
from pipeline.storage import PROBE
from pipeline.units import duration

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.storage import ObjectInfo, Store

SILENT_S = 3600.0  # a heartbeat of this age is not read: no build renews one so rarely
MOST_SKEW_S = 300.0  # between the clocks of the store and of this machine


@dataclass(slots=True)
class Builds:
    """Running builds. `begun`: start of the oldest by the store's clock, seconds since 1970; files that are younger may be theirs."""

    running: list[str] = field(default_factory=list)
    begun: float | None = None
    ended: list[ObjectInfo] = field(default_factory=list)  # heartbeats that may be deleted
    unknown: list[str] = field(default_factory=list)  # names that the user gave and no heartbeat has


def store_clock(store: Store) -> float:
    """Present time by the clock of the store, seconds since 1970. Writes and deletes a scratch object.

    Raises:
        OutputError: it is off by more than five minutes from the clock of this machine.
    """
    found = store_time(store, f"{PROBE}{secrets.token_hex(8)}")
    if abs(off := found - time.time()) > MOST_SKEW_S:
        raise OutputError(
            f"nothing was deleted: the clock of {store.root} is {duration(abs(off))} {'ahead of' if off > 0 else 'behind'} that of this "
            "machine, so that the age of files is not known; correct the one that is wrong",
            uri=store.root,
        )
    return found


def look_at_builds(store: Store, prefix: str, now: float, grace_s: float, ended: Collection[str] = ()) -> Builds:
    """Reads all heartbeats.

    Args:
        store: the output.
        prefix: of heartbeats.
        now: present time by the store's clock.
        grace_s: age from which on a heartbeat that was not renewed is that of a build that ended.
        ended: names of builds that the user says have ended.

    Raises:
        OutputError: a build that cannot be seen to run and did not end; a heartbeat that cannot be read.
    """
    infos = list(store.list(prefix))
    names = {info.key.removeprefix(prefix).removesuffix(".json") for info in infos}
    found, unseen = Builds(unknown=[name for name in ended if name not in names]), []
    for info in infos:
        silent = now - info.modified
        name = info.key.removeprefix(prefix).removesuffix(".json")
        if name in ended or silent >= max(grace_s, SILENT_S):
            found.ended.append(info)
            continue
        facts = _read(store, info)
        if facts is None:
            continue
        if not facts.get("running", True):
            found.ended.append(info)
        elif silent < MISSED * float(facts["every_s"]):
            found.running.append(name)
            # The start is by the clock of the build's machine, and so is `updated`, which the store's time of the object corrects.
            begun = float(facts["started"]) + info.modified - float(facts.get("updated", info.modified))
            found.begun = min(begun, found.begun or begun)
        elif silent >= grace_s:
            found.ended.append(info)
        else:
            unseen.append((name, silent))
    if unseen:
        name, silent = unseen[0]
        more = f" (and {len(unseen) - 1} more)" if len(unseen) > 1 else ""
        raise OutputError(
            f"nothing was deleted: build {name}{more} has not been heard of for {duration(silent)} and did not say that it ended. If it "
            f"runs, let it end. If it was killed, say so: --ended {name}; otherwise it counts as ended after {duration(grace_s)} "
            "(--grace)",
            uri=store.root,
        )
    return found


def _read(store: Store, info: ObjectInfo) -> dict[str, Any] | None:
    """Contents of a heartbeat; None if it ended meanwhile."""
    try:
        facts = json.loads(store.read(info.key)) if info.size else {"every_s": 0.0, "started": info.modified}
        if not isinstance(facts, dict) or not isinstance(facts.get("every_s"), (int, float)):
            raise ValueError("it has no every_s")
        float(facts["started"])
        return facts
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"nothing was deleted: {info.key} is not a heartbeat: {error}; remove it if no build runs",
            uri=store.uri(info.key),
        ) from None
