"""Collection of a report: everything that is known of one snapshot, from its record, receipts, indexes and a few latents.

Takes a store and the number of a snapshot. Gives a `Report`, and the pictures that it names as WebP bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.report.channels import channels_of
from pipeline.report.history import builds_of, changes_of, networks_of, parent_of
from pipeline.report.left_out import left_out
from pipeline.report.pictures import Pictures, decode_clips
from pipeline.report.row_sample import sample_rows, seconds_of
from pipeline.report.values import Decoded, Report

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.storage import Store

NOTHING_DECODED = Decoded(None, (), 0, 0, (), {}, None)


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a report has. `clips`: how many are decoded and measured; with 0, torch is not loaded. `against`: a snapshot to compare with.

    `checkpoint`: present place of the weights. `device`: `auto`, `cpu`, `cuda` or `cuda:N`.
    """

    clips: int = 24
    against: int | None = None
    checkpoint: str | None = None
    device: str = "auto"


def collect(
    store: Store, number: int | None, storage: StorageConfig, options: ReportOptions | None = None
) -> tuple[Report, Pictures]:
    """The report of a snapshot (the newest without a number), and its pictures by name.

    Raises:
        ConfigError: a number of clips below 0.
        InputError: no such snapshot, or nothing is published; a file that is not the one that was written.
        OutputError: not a latent set, or a record, receipt or index that cannot be read.
    """
    options = options or ReportOptions()
    if options.clips < 0:
        raise ConfigError(f"--clips: expected at least 0, got {options.clips}")
    latent_set = Ledger(store).latent_set()
    snapshots = Snapshots(store)
    snapshot = snapshots.get(number)
    if options.against is not None:
        snapshots.read(options.against)  # before anything slow
    takedowns = read_takedowns(store)
    parent, notices = parent_of(store, snapshot)
    files = snapshots.table(snapshot, "files")
    missing, cost, more = left_out(store, snapshot, takedowns, parent)
    notices += more
    rows = sample_rows(store, files, takedowns)
    seconds, exact = seconds_of(files, rows)
    if missing.newer_takedowns:
        notices.append(
            f"{missing.newer_takedowns} takedowns were recorded since this snapshot: what they hide is not shown here, "
            "counts are those of the record"
        )
    decoded, pictures = NOTHING_DECODED, Pictures()
    if options.clips and rows.total:
        decoded, pictures, more = decode_clips(
            store, snapshot.number, storage, options.clips, options.checkpoint, options.device
        )
        notices += more
    report = Report(
        output=store.root,
        name=latent_set.name,
        snapshot=snapshot.number,
        created=snapshot.created,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        lathe=version("lathe"),
        counts=snapshot.counts,
        seconds=seconds,
        seconds_exact=exact,
        buckets=snapshot.buckets,
        networks=networks_of(store, snapshot, files),
        checks=tuple(
            {"name": item.name, "ok": item.ok, "judged": item.judged, "message": item.message, "numbers": item.numbers}
            for item in snapshot.checks
        ),
        builds=builds_of(store, snapshot, parent),
        cost=cost,
        left_out=missing,
        rows=rows,
        channels=channels_of(store, snapshot, parent),
        decoded=decoded,
        changes=changes_of(store, snapshot, parent, options.against),
        notices=tuple(notices),
    )
    return report, pictures
