"""Statistics of stored latents per channel, over all and per bucket, and a scale and shift to normalise with (`lathe stats`).

Mean, standard deviation, smallest and largest are exact, over all rows of a snapshot, from its record. Histograms and the numbers per
bucket are from a sample of clips, evenly spread over the files, whose latents are read by byte range.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from pipeline.errors import InputError, NotFound, OutputError
from pipeline.format.tensors import stored_values
from pipeline.ledger.candidate import gather
from pipeline.ledger.manifest import merged_stats, packed_stats
from pipeline.ledger.part_statistics import read_latent
from pipeline.ledger.receipts import Ledger, stored_index
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.ledger.totals import describe_stats
from pipeline.operate.inspect import file_metadata
from pipeline.operate.publish_checks import normalised_by
from pipeline.process.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import ChannelStats
    from pipeline.storage import Store

BINS = 64
SPREAD = 5.0  # standard deviations of a histogram on each side of the mean; first and last bin hold all values beyond
CLIPS_A_FILE = 4
CONSTANTS = ("scale", "shift", "mean", "std")


class _Sampled:
    """Sums over the values of a sample, per channel."""

    def __init__(self, centre: np.ndarray, spread: np.ndarray) -> None:
        self.edges = np.stack(
            [
                np.linspace(mid - SPREAD * std, mid + SPREAD * std, BINS + 1)
                for mid, std in zip(centre, spread, strict=True)
            ]
        )
        channels = len(centre)
        self.clips, self.n = 0, 0
        self._sum, self._squares = np.zeros(channels), np.zeros(channels)
        self._low, self._high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.counts = np.zeros((channels, BINS), np.int64)
        self._centre, self._step = centre, 2 * SPREAD * spread / BINS

    def add(self, values_CN: np.ndarray) -> None:
        """Adds the float64 values of one clip."""
        shifted = values_CN - self._centre[:, None]
        self.clips, self.n = self.clips + 1, self.n + values_CN.shape[1]
        self._sum += shifted.sum(1)
        self._squares += (shifted**2).sum(1)
        self._low, self._high = np.minimum(self._low, values_CN.min(1)), np.maximum(self._high, values_CN.max(1))
        bins = np.clip(((values_CN - self.edges[:, :1]) / self._step[:, None]).astype(np.int64), 0, BINS - 1)
        for channel, found in enumerate(bins):
            self.counts[channel] += np.bincount(found, minlength=BINS)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        mean = self._sum / self.n
        variance = np.maximum(self._squares / self.n - mean**2, 0.0)
        return {
            "clips": self.clips,
            "values_per_channel": self.n,
            "mean": (mean + self._centre).tolist(),
            "std": np.sqrt(variance).tolist(),
            "min": self._low.tolist(),
            "max": self._high.tolist(),
            "histogram": self.counts.tolist(),
        }


def statistics(store: Store, number: int | None = None, *, clips: int = 256) -> dict[str, Any]:
    """Statistics by fingerprint, of a snapshot (the newest without a number) or, if nothing is published, of all receipts.

    Args:
        store: the output.
        number: of the snapshot.
        clips: number of clips to read per bucket.

    Raises:
        InputError: no such snapshot, no clip, or a latent that is not the one that was written.
        OutputError: not a latent set, or an index that cannot be read.
    """
    Ledger(store).latent_set()
    snapshots = Snapshots(store)
    snapshot = snapshots.read(number) if number is not None else snapshots.latest()
    if snapshot is not None:
        files = snapshots.table(snapshot, "files")
        stats = {name: item.stats for name, item in snapshot.fingerprints.items()}
    else:
        files, stats = _unpublished(store)
    takedowns = read_takedowns(store)
    found = {}
    for fingerprint in sorted(files["fingerprint"].unique().to_pylist()):
        exact = stats.get(fingerprint)
        mine = files.filter(pc.equal(files["fingerprint"], fingerprint))
        if exact is not None:
            found[fingerprint] = _described(store, mine, exact, takedowns, clips)
    if not found:
        raise InputError(f"{store.root} holds no clip whose statistics are known; see `lathe status`")
    return {
        "output": store.root,
        "snapshot": None if snapshot is None else snapshot.number,
        "newer_takedowns": 0 if snapshot is None else len(_newer(takedowns, snapshot)),
        "fingerprints": found,
    }


def _newer(takedowns: Takedowns, snapshot: Snapshot) -> set[str]:
    """Keys of takedowns that the snapshot did not apply, whether or not they name a row of it."""
    return {item.key for item in takedowns.records} - set(snapshot.takedowns)


def _unpublished(store: Store) -> tuple[pa.Table, dict[str, ChannelStats | None]]:
    with ScratchFolder() as folder:
        candidate = gather(store, None, folder)
        prints = candidate.receipts["fingerprint"].unique().to_pylist()
        if broken := candidate.receipts["problem"].drop_null().to_pylist():
            raise OutputError(
                f"{store.root}: {len(broken)} receipts are wrong, such as: {broken[0]}; see `lathe verify`"
            )
        parts = {name: packed_stats(candidate.receipts_path, name) for name in prints}
        return candidate.files, {name: merged_stats(values for _, values in found) for name, found in parts.items()}


def _described(store: Store, files: pa.Table, exact: ChannelStats, takedowns: Takedowns, clips: int) -> dict[str, Any]:
    there = next((key for key in files["key"].to_pylist() if store.exists(key)), None)  # others may be taken down
    spec = {} if there is None else file_metadata(store, there).get("spec", {})
    constants = {name: spec.get(name) for name in CONSTANTS}
    mean = np.array(exact.mean)
    std = np.sqrt(np.array(exact.m2) / exact.n)
    safe = np.where((std > 0) & np.isfinite(std), std, 1.0)
    centre = np.where(np.isfinite(mean), mean, 0.0)  # of histograms
    overall_mean = float(mean.mean())
    overall_std = math.sqrt(float((std**2).mean() + mean.var()))
    whole, buckets = _Sampled(centre, safe), {}
    for bucket in sorted(files["bucket"].unique().to_pylist()):
        part = _Sampled(centre, safe)
        for values_CN in _sample(store, files.filter(pc.equal(files["bucket"], bucket)), takedowns, clips):
            part.add(values_CN)
            whole.add(values_CN)
        if part.clips:
            buckets[bucket] = part.to_dict()
    normalised = normalised_by(exact, constants)
    return {
        "network": files["network"][0].as_py(),
        "rows": int(pc.sum(files["rows"]).as_py()),
        "exact": describe_stats(exact),
        "suggested": {
            "per_channel": {"shift": mean.tolist(), "scale": (1 / safe).tolist()},
            "one_for_all": {"shift": overall_mean, "scale": 1 / overall_std if overall_std else 1.0},
        },
        "constants": constants,
        "normalised_by_constants": None if normalised is None else {"mean": normalised[0], "std": normalised[1]},
        "sample": whole.to_dict() if whole.clips else None,
        "bin_edges": whole.edges.tolist(),
        "buckets": buckets,
    }


def _sample(store: Store, files: pa.Table, takedowns: Takedowns, clips: int) -> Iterator[np.ndarray]:
    """Latents of up to `clips` visible clips as float64 `(C, values)`: a few per file, from evenly spread files."""
    rows = files.select(["key", "index_key", "hidden"]).to_pylist()
    most = max(1, -(-clips // CLIPS_A_FILE))
    chosen = rows if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]
    a_file = max(CLIPS_A_FILE, -(-clips // len(chosen)))
    left = clips
    for row in chosen:
        hidden = set(row["hidden"])
        try:
            found = stored_index(store, row["index_key"])
        except NotFound:
            if not takedowns:
                raise
            continue  # files that were taken down may be deleted
        index = [item for item in found if item.row not in hidden and not takedowns.hides(item)]
        wanted = index if len(index) <= a_file else [index[i * len(index) // a_file] for i in range(a_file)]
        for item in wanted[:left]:
            data = read_latent(store, row["key"], item)
            yield stored_values(data, item.dtype, item.shape).reshape(item.shape[0], -1).astype(np.float64)
        left -= len(wanted[:left])
        if not left:
            return
