"""How far a build has come, from its output alone: usable from any machine while it runs, and after it died.

Enters: a store. Leaves: a JSON-ready dict of receipts added up, and the running build's own last word (`progress.json`)
if there is one.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.audit.tally import by_frequency, tally
from pipeline.errors import NotFound, OutputError
from pipeline.receipts import Ledger
from pipeline.records import Counts

if TYPE_CHECKING:
    from pipeline.storage import Store

PROGRESS_KEY = "progress.json"
"""Written by the engine now and then; a heartbeat, never a truth."""


def status(store: Store, *, workers: int = 8) -> dict[str, Any]:
    """What is done: shards, samples in/encoded/rejected, clips, frames, bytes, rejects by reason, last commit,
    heartbeat.

    Raises:
        OutputError: no latent set there, or a receipt that cannot be read.
    """
    ledger = Ledger(store)
    latent_set = ledger.latent_set()
    tallies = tally(store, workers)
    counts = sum((item.counts for item in tallies.values()), Counts())
    reasons: dict[str, int] = {}
    for item in tallies.values():
        for reason, number in item.rejects.items():
            reasons[reason] = reasons.get(reason, 0) + number
    return {
        "output": store.root,
        "name": latent_set.name,
        "uuid": latent_set.uuid,
        "fingerprints": {fingerprint: item.shards for fingerprint, item in tallies.items()},
        "shards": sum(item.shards for item in tallies.values()),
        **asdict(counts),
        "files": sum(item.files for item in tallies.values()),
        "bytes": sum(item.bytes for item in tallies.values()),
        "rejects": by_frequency(reasons),
        "last_commit": max((item.last_commit for item in tallies.values() if item.last_commit), default=None),
        "progress": _heartbeat(store),
    }


def _heartbeat(store: Store) -> dict[str, Any] | None:
    try:
        data = store.read(PROGRESS_KEY)
    except NotFound:
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        raise OutputError(f"{PROGRESS_KEY} is not JSON: {error}", uri=store.uri(PROGRESS_KEY)) from None
    return found if isinstance(found, dict) else {"value": found}
