"""How far a build has come, from its output alone: usable from any machine while it runs, and after it died.

Enters: a store. Leaves: a JSON-ready dict of receipts added up, and the running build's own last word
(`progress/{build}.json`) if there is one.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound, OutputError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.totals import by_frequency, tally
from pipeline.records import Counts

if TYPE_CHECKING:
    from pipeline.storage import Store

PROGRESS_PREFIX = "progress/"
"""One object a running build, see `engine.heartbeat`; never a truth."""
MISSED = 3  # intervals without news before a build counts as dead


def status(store: Store, *, workers: int = 8) -> dict[str, Any]:
    """What is done: shards, samples in/encoded/rejected, clips, frames, bytes, rejects by reason, warnings, last commit,
    heartbeat.

    Raises:
        OutputError: no latent set there, or a receipt that cannot be read.
    """
    ledger = Ledger(store)
    latent_set = ledger.latent_set()
    tallies = tally(store, workers)
    counts = sum((item.counts for item in tallies.values()), Counts())
    reasons: Counter[str] = Counter()
    warnings: Counter[str] = Counter()
    for item in tallies.values():
        reasons.update(item.rejects)
        warnings.update(item.warnings)
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
        "warnings": by_frequency(warnings),
        "last_commit": max((item.last_commit for item in tallies.values() if item.last_commit), default=None),
        "progress": heartbeat(store),
    }


def heartbeat(store: Store) -> dict[str, Any] | None:
    """The build started last of those that live: whose object was renewed within three of its intervals."""
    live = []
    for info in store.list(PROGRESS_PREFIX):
        try:
            found = json.loads(store.read(info.key))
            if time.time() - found["updated"] < MISSED * found["every_s"]:
                live.append(found)
        except NotFound:  # it ended meanwhile
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{info.key} is not a heartbeat: {error}", uri=store.uri(info.key)) from None
    return max(live, key=lambda found: str(found.get("started")), default=None)
