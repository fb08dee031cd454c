"""Outcome of a finished shard, as the worker reports it to the driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.records import Counts, SourceObject, Timings


@dataclass(frozen=True, slots=True)
class ShardResult:
    """Totals of a finished shard. Its size does not depend on the shard's."""

    shard_id: str  # of the shard as it was handed out; the receipt has another where `refused` is not empty
    ours: bool  # an attempt of this build committed it, perhaps not the one that reports
    counts: Counts
    added: Counts  # see `Receipt.added`
    timings: Timings
    num_bytes: int
    rejects: dict[str, int]  # by reason
    files: int
    warnings: dict[str, int] = field(default_factory=dict)  # see `Receipt.warnings`
    step_sizes: dict[str, int] = field(default_factory=dict)  # chosen by its encoder: chunks a step, by shape of chunk
    # Plain files that could not be read, each with its reason. The receipt does not cover them; the next run tries them again.
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # failures without consequences, one line each
    left: tuple[SourceObject, ...] = ()  # plain files after the end of a group that became too long: another shard
    # Plain files whose reading failed while others went on: each becomes a shard of its own.
    aside: tuple[SourceObject, ...] = ()
