"""What the next snapshot of an output starts from: the newest snapshot, or the newest whole one if others are damaged."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import OutputError
from pipeline.format.layout import DATA, SNAPSHOTS
from pipeline.ledger.copies import COPIES, Copies
from pipeline.ledger.manifest import from_parquet, read_choices

if TYPE_CHECKING:
    from pipeline.ledger.snapshots import Snapshot, Snapshots
    from pipeline.ledger.versions import Choices
    from pipeline.storage import Store

_COPIES = re.compile(rf"{SNAPSHOTS}([1-9]\d*)/copies-([0-9a-f]{{16}})\.idx")


@dataclass(frozen=True, slots=True)
class Base:
    """Parent and number of the next snapshot. `choices`: earlier choices of versions of inputs, `copies`: of rows; None: the parent's."""

    parent: Snapshot | None
    number: int
    choices: Choices | None = None
    copies: Copies | None = None
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


def base_to_rebuild(store: Store, snapshots: Snapshots) -> Base:
    """Passes over damaged snapshots: receipts that only they cover are read again. Their choices are kept if they can be read, and their
    copies where the files that receipts name are deleted.

    Raises:
        OutputError: a record of another format version.
    """
    parent, number, errors = snapshots.newest_whole()
    damaged = tuple(sorted(errors))
    notices = [f"passed over a damaged snapshot: {errors[each].message.split(';')[0]}" for each in reversed(damaged)]
    if not damaged or (parent is not None and parent.number > damaged[-1]):
        return Base(parent, number, damaged=damaged, notices=notices)
    copies = _copies_to_rebuild(store, snapshots, parent)
    newest = damaged[-1]
    try:
        choices = read_choices(snapshots.table(snapshots.read(newest), "choices"))
        return Base(parent, number, choices, copies, damaged, notices)
    except OutputError:
        lost = f"which inputs snapshot {newest} dropped is not known: publish with the inputs and --removed drop to drop them again"
        return Base(parent, number, copies=copies, damaged=damaged, notices=[*notices, lost])


def _copies_to_rebuild(store: Store, snapshots: Snapshots, parent: Snapshot | None) -> Copies:
    """Copies of the parent, and those of later tables whose origin is deleted: a receipt whose files are there needs no copy.

    The table of a snapshot whose record is lost counts too: it is whole if its hash is that of its name, and copies never change.
    """
    found = _by_origin(snapshots.table(parent, "copies")) if parent is not None else {}
    tables = [(int(match[1]), match) for info in store.list(SNAPSHOTS) if (match := _COPIES.fullmatch(info.key))]
    later = [match for number, match in sorted(tables, reverse=True) if parent is None or number > parent.number]
    there = set(store.keys(DATA)) if later else set()
    for match in later:
        data = store.read(match[0])
        if not hashlib.sha256(data).hexdigest().startswith(match[2]):
            continue
        for origin, rows in _by_origin(from_parquet(data)).items():
            whole = all(json.loads(row["file"])["key"] in there for row in rows if row["rows"])
            if origin not in found and origin not in there and whole:
                found[origin] = rows
    return Copies(pa.Table.from_pylist([row for rows in found.values() for row in rows], COPIES))


def _by_origin(copies: pa.Table) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in copies.to_pylist():
        found.setdefault(row["origin"], []).append(row)
    return found
