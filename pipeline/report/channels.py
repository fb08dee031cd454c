"""Values of stored latents per channel of a snapshot, beside the network's constants and the parent snapshot.

Mean, standard deviation, least and greatest are exact, from the records; histograms are from about `MOST_CLIPS` latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.ledger.totals import describe_stats
from pipeline.operate.statistics import statistics
from pipeline.report.values import Channels

if TYPE_CHECKING:
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.storage import Store

MOST_CLIPS = 256
FEWEST_A_BUCKET = 2


def channels_of(store: Store, snapshot: Snapshot, parent: Snapshot | None) -> tuple[Channels, ...]:
    """One entry for each fingerprint that has statistics; none if no row counts.

    Raises:
        InputError: a latent that is not the one that was written.
        OutputError: an index that cannot be read.
    """
    if not any(item.stats is not None for item in snapshot.fingerprints.values()):
        return ()
    a_bucket = max(FEWEST_A_BUCKET, MOST_CLIPS // max(1, len(snapshot.buckets)))
    found = statistics(store, snapshot.number, clips=a_bucket)["fingerprints"]
    before = {} if parent is None else parent.fingerprints
    return tuple(
        Channels(
            fingerprint=name,
            network=item["network"],
            exact=item["exact"],
            parent=describe_stats(before[name].stats) if name in before else None,
            constants=item["constants"],
            normalised=item["normalised_by_constants"],
            clips=item["sample"]["clips"] if item["sample"] else 0,
            edges=tuple(map(tuple, item["bin_edges"])),
            histograms=tuple(map(tuple, item["sample"]["histogram"])) if item["sample"] else (),
        )
        for name, item in found.items()
    )
