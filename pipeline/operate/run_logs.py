"""Run logs of the builds of an output, read back: `_runs/{build}/0001.jsonl` and so on, written by `engine/driver/run_log.py`.

Takes a store, gives events as dictionaries. A log may end anywhere: its build may have been killed, or the store may have been away.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.format.layout import Layout
    from pipeline.storage import Store

STARTED = ("build", "ts", "host", "pid", "network", "fingerprint", "shards", "shards_before", "num_inputs")


def run_logs(store: Store, layout: Layout, build: str = "") -> dict[str, list[str]]:
    """Keys of the parts of each log, in order, by name of the build, oldest first; one LIST. `build`: only names that begin so."""
    found: dict[str, list[tuple[int, str]]] = {}
    for info in store.list(f"{layout.runs}{build}"):
        if info.size and (name := layout.run_log_name(info.key)) is not None:
            found.setdefault(name[0], []).append((name[1], info.key))
    return {build: [key for _, key in sorted(parts)] for build, parts in sorted(found.items())}


def events(store: Store, keys: list[str]) -> Iterator[dict[str, Any]]:
    """Events of one log. Lines that cannot be read are passed over: on a mount, a killed build may leave half of one."""
    for key in keys:
        try:
            lines = store.read(key).splitlines()
        except NotFound:
            continue
        for line in lines:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict) and isinstance(found.get("event"), str):
                yield found


def last_run(store: Store, layout: Layout, running: set[str]) -> dict[str, Any] | None:
    """The newest run that is over: facts of its start, and its end or None. None: no build has left a log. `running`: not these builds."""
    logs = [(build, keys) for build, keys in run_logs(store, layout).items() if build not in running]
    if not logs:
        return None
    build, keys = logs[-1]
    first = next(events(store, keys[:1]), {})
    ended = None
    last_ts = first.get("ts")
    for found in events(store, keys[-1:]):
        last_ts = found.get("ts")
        if found["event"] == "ended":
            ended = found
    return {
        "build": build,
        "started": {name: first.get(name) for name in STARTED},
        "ended": None
        if ended is None
        else {name: ended.get(name) for name in ("ts", "outcome", "reason", "open_shards")},
        "report": None if ended is None else ended.get("report"),
        "last_event": last_ts,
    }
