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
    damaged: tuple[int, ...] = ()  # snapshots that were found damaged now, ascending
    notices: list[str] = field(default_factory=list)

    @property
    def passed_over(self) -> tuple[int, ...]:
        """All snapshots that are known to be damaged."""
        known = () if self.parent is None else self.parent.passed_over
        return tuple(sorted({*known, *self.damaged}))

    @property
    def repairs(self) -> bool:
        """Whether a new snapshot is needed because of damaged ones that the parent does not know of."""
        return self.parent is None or not set(self.damaged) <= set(self.parent.passed_over)


def base_to_rebuild(snapshots: Snapshots) -> Base:
    """Passes over damaged snapshots: receipts that only they cover are read again. Their choices are kept if they can be read.

    Raises:
        OutputError: a record of another format version.
    """
    parent, number, errors = snapshots.newest_whole()
    damaged = tuple(sorted(errors))
    notices = [f"passed over a damaged snapshot: {errors[each].message.split(';')[0]}" for each in reversed(damaged)]
    if not damaged or (parent is not None and parent.number > damaged[-1]):
        return Base(parent, number, damaged=damaged, notices=notices)
    newest = damaged[-1]
    try:
        choices = read_choices(snapshots.table(snapshots.read(newest), "choices"))
        return Base(parent, number, choices, damaged, notices)
    except OutputError:
        lost = f"which inputs snapshot {newest} dropped is not known: publish with the inputs and --removed drop to drop them again"
        return Base(parent, number, damaged=damaged, notices=[*notices, lost])
