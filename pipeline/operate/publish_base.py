"""What the next snapshot of an output starts from: the newest snapshot, or the newest whole one if others are damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import OutputError
from pipeline.ledger.manifest import read_choices

if TYPE_CHECKING:
    from pipeline.ledger.snapshots import Snapshot, Snapshots
    from pipeline.ledger.versions import Choices


@dataclass(frozen=True, slots=True)
class Base:
    """Parent and number of the next snapshot. `choices`: earlier choices of versions of inputs; None: those of the parent."""

    parent: Snapshot | None
    number: int
    choices: Choices | None = None
    damaged: bool = False  # newer snapshots than the parent are damaged
    notices: list[str] = field(default_factory=list)


def base_to_rebuild(snapshots: Snapshots) -> Base:
    """Passes over damaged snapshots: receipts that only they cover are read again. Their choices are kept if they can be read.

    Raises:
        OutputError: a record of another format version.
    """
    parent, number, errors = snapshots.newest_whole()
    notices = [f"passed over a damaged snapshot: {error.message}" for error in errors]
    if not errors:
        return Base(parent, number)
    newest = snapshots.numbers()[-1]
    try:
        choices = read_choices(snapshots.table(snapshots.read(newest), "choices"))
        return Base(parent, number, choices, damaged=True, notices=notices)
    except OutputError:
        lost = f"which inputs snapshot {newest} dropped is not known: publish with the inputs and --removed drop to drop them again"
        return Base(parent, number, damaged=True, notices=[*notices, lost])
