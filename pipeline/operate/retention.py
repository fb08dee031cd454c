"""Which snapshots stay: the newest, the newest N, and those younger than D days. Takes a store, returns `Retention` with what they name.

Age is that of the record in the store. A retained snapshot that cannot be read stops `lathe gc`: what it names is not known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.errors import OutputError
from pipeline.format.layout import SNAPSHOTS, snapshot_number
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import NONE
from pipeline.operate.taken_files import TakenFiles

if TYPE_CHECKING:
    from pipeline.ledger.snapshots import Snapshot
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.storage import ObjectInfo, Store

DAY_S = 86400.0


@dataclass(slots=True)
class Retention:
    """Numbers of snapshots, ascending; keys of all that retained ones name: data files, indexes, tables."""

    newest: Snapshot | None = None
    retained: list[int] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)  # of `retired`, those of `--forget`
    empty: list[ObjectInfo] = field(default_factory=list)  # records of zero bytes, left by kills
    named: set[str] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)  # retained ones that a newer snapshot passed over, with the error


def retention(
    store: Store, now: float, *, keep_snapshots: int, keep_days: float, forget: Takedowns = NONE
) -> Retention:
    """Which snapshots stay, and what they name.

    Args:
        store: the output.
        now: present time by the clock of the store, seconds since 1970.
        keep_snapshots: how many of the newest stay, at least 1.
        keep_days: days for which others stay.
        forget: older snapshots do not stay if a file of theirs holds rows that these hide, and the newest does not name the file, or if
            the newest passed over them and it is not known which files they name.

    Raises:
        OutputError: a retained snapshot that cannot be read and that no newer one passed over.
    """
    found, snapshots = Retention(), Snapshots(store)
    records: dict[int, ObjectInfo] = {}
    for info in store.list(SNAPSHOTS, recursive=False):
        number = snapshot_number(info.key)
        if number is not None and info.size:
            records[number] = info
        elif number is not None:
            found.empty.append(info)
    if not records:
        return found
    order = sorted(records, reverse=True)
    found.newest = snapshots.read(order[0])
    stay = [
        number
        for place, number in enumerate(order)
        if place < max(keep_snapshots, 1) or now - records[number].modified < keep_days * DAY_S
    ]
    if forget:
        files = TakenFiles(store, forget)
        newest = {file.key for file, _ in files.of_snapshot(order[0])}
        found.forgotten = [number for number in sorted(stay[1:]) if _holds(files, number, newest, found.newest)]
    found.retained = sorted(set(stay) - set(found.forgotten))
    found.retired = sorted(set(order) - set(found.retained))
    for number in found.retained:
        try:
            _add_names(snapshots, number, found.named)
        except OutputError as error:
            if number not in found.newest.passed_over:
                raise OutputError(
                    f"nothing was deleted: {error.message}. Which files this snapshot names is not known", uri=error.uri
                ) from None
            found.damaged.append(error.message)
    return found


def _add_names(snapshots: Snapshots, number: int, names: set[str]) -> None:
    snapshot = snapshots.read(number)
    names.update(table.key for table in snapshot.tables.values())
    for batch in snapshots.batches(snapshot, "files", ["key", "index_key"]):
        names.update(batch["key"].to_pylist())
        names.update(batch["index_key"].to_pylist())


def _holds(files: TakenFiles, number: int, newest: set[str], record: Snapshot) -> bool:
    """Whether a snapshot names a file with hidden rows that is not among `newest`. `record`: of the newest snapshot."""
    try:
        return any(file.key not in newest for file, _ in files.of_snapshot(number))
    except OutputError:
        if number in record.passed_over:
            return True
        raise
