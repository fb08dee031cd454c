"""What is known of an input that no receipt names: retired receipts, run logs of builds, heartbeats, open work of the newest snapshot.

Takes its URI, gives a `state` with the facts it follows from, or None where nothing knows the input.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pipeline.corpus import media_kind
from pipeline.corpus.kinds import is_hidden, is_text, reason, suffix
from pipeline.format.columns import storable
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import Ledger, read_retired, retired_keys
from pipeline.ledger.snapshots import Snapshots
from pipeline.operate.run_logs import events, run_logs
from pipeline.operate.status import heartbeats
from pipeline.storage import is_remote, local_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.storage import Store

LOOKED = 4  # newest builds whose logs are read
WORKERS = 16  # threads on a remote store
STATES = {
    "assigned": "running",
    "retried": "waiting",
    "handed_back": "waiting",
    "copy_failed": "running",
    "given_up": "given_up",
    "done": "done",  # and the receipt is gone
}


def open_input(store: Store, uri: str, *, there: bool | None) -> dict[str, Any] | None:
    """What is known, JSON-ready; None: nothing.

    - `state`: running, waiting, given_up, pending, open, passed_over, retired
    - `builds`: what each of the newest says; `named`: its log has this URI, not only those around it
    - `open_in`: number of the snapshot that records it as open
    - `note`: why it is passed over
    - `retired`: keys of receipts

    Args:
        store: the output.
        uri: of the input.
        there: whether the input exists; None: not known.
    """
    layout = Ledger(store).layout
    live = {str(found.get("build")) for found in heartbeats(store, layout.progress)}
    logs = run_logs(store, layout)
    builds = []
    for build in sorted(logs, reverse=True)[:LOOKED]:
        if (latest := _in_build(events(store, logs[build]), uri)) is not None:
            builds.append({"build": build, "live": build in live, **latest})
    snapshots, open_in = Snapshots(store), None
    if (snapshot := snapshots.latest()) is not None and storable(uri) in snapshots.open_shards(snapshot):
        open_in = snapshot.number
    state, retired = _state(builds), _retired(store, uri)
    facts = {"builds": builds, "open_in": open_in, "note": None, "retired": retired}
    if retired and state == "open" and open_in is None:
        return {**facts, "state": "retired"}
    if open_in is None and not any(build["named"] for build in builds):
        if not builds or (there is False and all(build["state"] == "pending" for build in builds)):
            return None
        if (note := _passed_over(uri)) is not None:
            return {**facts, "state": "passed_over", "note": note}
    return {**facts, "state": state}


def _retired(store: Store, uri: str) -> list[str]:
    """Keys of receipts of the input that `lathe gc` retired. Reads all retired ones."""
    keys = retired_keys(store)
    workers = WORKERS if is_remote(store.root) else 1
    receipts = mapped_ahead(lambda key: read_retired(store, key), keys, workers, "retired")
    named = {uri, storable(uri)}
    return [
        key
        for key, receipt in zip(keys, receipts, strict=True)
        if any(source.uri in named or storable(source.uri) in named for source in receipt.shard.objects)
    ]


def _passed_over(uri: str) -> str | None:
    """Why a file in a folder of inputs is not encoded; None for a tar or video."""
    name = uri.rpartition("/")[2]
    if is_hidden(name):
        return "hidden files are not encoded"
    if media_kind(name) is not None:
        return None
    return "it is read with the video of the same name" if is_text(name) else reason(suffix(name))


def _state(builds: list[dict[str, Any]]) -> str:
    for build in builds:  # newest first
        if build["state"] in ("running", "waiting", "pending") and not build["live"]:
            continue  # it ended before it got there
        return "open" if build["state"] == "done" else str(build["state"])
    return "open"


def _in_build(found: Iterable[dict[str, Any]], uri: str) -> dict[str, Any] | None:
    """What the log of one build says of an input: the last event of a shard that holds it, else whether its inputs include it."""
    shards: dict[str, bool] = {}  # that may hold it: whether they name it
    last: dict[str, Any] | None = None
    listed: dict[str, Any] | None = None
    latest: dict[str, Any] | None = None
    for event in found:
        if event["event"] == "started" and _among(uri, event.get("inputs", ()), str(event.get("folder", ""))):
            listed = {"state": "pending", "since": event.get("ts"), "named": False}
        if event["event"] == "assigned" and (named := _named(uri, event)) is not None:
            shards[str(event.get("shard_id"))] = named
            last = event
        shard = str(event.get("shard_id"))
        if shard in shards and event["event"] in STATES:
            if event["event"] == "done" and not shards[shard]:
                latest = None  # its receipt would name the input: it was not in the group
                continue
            facts: dict[str, Any] = {name: event[name] for name in ("shard", "shard_id", "reason") if name in event}
            worker = event.get("worker") or (last or {}).get("worker")
            state = STATES[str(event["event"])]
            latest = {"state": state, "since": event.get("ts"), "named": shards[shard], "worker": worker, **facts}
    return latest or listed


def _named(uri: str, event: dict[str, Any]) -> bool | None:
    """Whether a shard names the input; None if it cannot hold it: a group of plain files is consecutive in the order of URIs."""
    first, last = str(event.get("uri")), str(event.get("last_uri"))
    if uri in (first, last):
        return True
    return False if event.get("objects", 1) > 1 and first <= uri <= last else None


def _among(uri: str, inputs: Sequence[str], folder: str) -> bool:
    """Whether an input of a job, run in `folder`, names the URI or a folder that holds it. Patterns and lists are not expanded."""
    for text in inputs:
        name = text if is_remote(text) else os.path.join(folder, local_path(text))
        if uri == name or uri.startswith(f"{name.rstrip('/')}/"):
            return True
    return False
