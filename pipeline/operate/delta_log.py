"""Delta Lake log of a published Parquet output, at `data/_delta_log/`: a view of its snapshots for DuckDB, Polars, Spark, Ray and others.

Version 0 is the empty table, version n is snapshot n. If `lathe gc` deleted snapshots, the log begins after the last of these, as a
checkpoint. The log is derived from snapshots: it may be deleted and rebuilt at any time. It is
below `data/`, with paths relative to that, so that a foreign VACUUM sees neither receipts nor indexes. A file with a row that does not
count is left out entirely, because readers without deletion vectors would show that row. After a takedown all versions are rewritten, so
that none names the file.

Any number of publishers may bring the log up to date at once. Each version records what it was made from (`Origin`), and `sync` ends only
with a pass that read the takedowns, then all versions, and found nothing to write. So a publisher that wrote from older takedowns than
another repairs its own writing before it returns; if it is killed before, the next `sync` finds the outdated version.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from pipeline.errors import InputError, OutputError
from pipeline.format.layout import DELTA_LOG, SNAPSHOTS, snapshot_number
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import NONE, read_takedowns
from pipeline.operate.delta_contents import WORKERS, LogReader, Origin
from pipeline.operate.delta_writing import LogWriter
from pipeline.units import quantity

if TYPE_CHECKING:
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.operate.delta_contents import LogContents
    from pipeline.storage import ObjectInfo, Store

VIEW = 3  # of the way the log is made; logs of other numbers are written anew
LACKS_TAKEDOWNS = (  # what `verify` finds and expects
    "a Delta view that was made from other takedowns: it may show rows that were taken down",
    "a view from all takedowns; `lathe publish` and the next `lathe takedown` rewrite it",
)
PASSES = 10  # of one `sync`, each because another publisher or a takedown came in between


@dataclass(frozen=True, slots=True)
class DeltaView:
    """State of the log: its newest version, and what of that snapshot it leaves out."""

    version: int
    hidden_files: int = 0  # Parquet files that also hold rows that do not count
    hidden_rows: int = 0  # rows of these that count
    tar_files: int = 0
    tar_rows: int = 0

    def notices(self) -> list[str]:
        """Notices for users if files are left out."""
        found = []
        if self.hidden_files:
            found.append(
                f"the Delta view of snapshot {self.version} lacks {quantity(self.hidden_rows, 'row')} of "
                f"{quantity(self.hidden_files, 'file')} with rows that do not count"
            )
        if self.tar_files:
            found.append(
                f"the Delta view of snapshot {self.version} lacks {quantity(self.tar_rows, 'row')} of "
                f"{quantity(self.tar_files, 'tar file')}: a Delta table holds only Parquet"
            )
        return found

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return asdict(self)


class DeltaLog:
    """Delta log of one output."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reader = LogReader(store)
        self._digests: dict[tuple[str, str], str] = {}
        self.known_takedowns: Takedowns = NONE  # need not be read again

    def check(self) -> None:
        """Checks that only Lathe wrote the log.

        Raises:
            OutputError: another program wrote to it.
        """
        self._reader.read()

    def sync(self) -> DeltaView | None:
        """Writes missing versions, or all of them if one is outdated. Returns None if there is no log and the newest snapshot has no
        Parquet file.

        Raises:
            OutputError: another program wrote to the log, or others keep changing what it is made from.
        """
        for _ in range(PASSES):
            numbers = Snapshots(self._store).numbers()
            try:
                current, view = self._pass()
            except (InputError, OutputError):
                if set(numbers) <= set(Snapshots(self._store).numbers()):
                    raise
                continue  # `lathe gc` deleted a snapshot meanwhile
            if current:
                return view
        raise OutputError(
            f"{self._store.uri(DELTA_LOG)} was not completed in {PASSES} passes, other publishers or takedowns came in between; "
            "publish again",
            uri=self._store.uri(DELTA_LOG),
        )

    def _pass(self) -> tuple[bool, DeltaView | None]:
        """Writes what is missing. Returns whether nothing was, and then the state of the log."""
        # In this order: a version that is found current has all takedowns read here; every version found has its record.
        takedowns = self._takedowns()
        contents = self._reader.read()
        origins = self._origins(takedowns)
        if not origins or (not contents.heads and not self._has_parquet(max(origins))):
            return True, None
        first = _first_to_write(contents, origins)
        if first is None:
            return True, DeltaView(max(origins), **contents.heads[max(origins)].left_out)
        outdated = contents if first == min(origins) and contents.heads else None
        LogWriter(self._store, origins, takedowns).write(first, outdated)
        return False, None

    def refresh(self) -> DeltaView | None:
        """`sync` if there is a log; outputs that are published without one get none. Raises as `sync`."""
        found = self._reader.read()
        return self.sync() if found.heads or found.checkpoints else None

    def lacks_takedowns(self) -> bool:
        """Whether a version was made without a takedown that is recorded now, so that it may show rows that were taken down."""
        takedowns = self._takedowns()
        if not takedowns:
            return False
        try:
            heads = self._reader.read().heads.values()
        except OutputError:  # another program wrote to it
            return True
        return any(head.origin is None or head.origin.takedowns != _mark(takedowns) for head in heads)

    def _takedowns(self) -> Takedowns:
        self.known_takedowns = read_takedowns(self._store, known=self.known_takedowns)
        return self.known_takedowns

    def _origins(self, takedowns: Takedowns) -> dict[int, Origin]:
        """What each version is to be made from, up to the newest snapshot; empty if nothing is published.

        Damaged snapshots that the newest passed over count as numbers without a snapshot. If `lathe gc` deleted snapshots, also between
        others that it kept, the versions begin after the last of them: a log has no gaps, and no version offers files of a snapshot that
        is gone or rows of another one.
        """
        mark, snapshots = _mark(takedowns), Snapshots(self._store)
        infos = {snapshot_number(info.key): info for info in self._store.list(SNAPSHOTS, recursive=False) if info.size}
        records = {number: info for number, info in infos.items() if number is not None}
        damaged = snapshots.read(max(records)).passed_over if records else ()
        records = {number: info for number, info in records.items() if number not in damaged}
        if not records:
            return {}
        after_gaps = [snapshots.read(number) for number in records if number - 1 not in records]
        start = max((item.number for item in after_gaps if item.parent not in (None, *infos)), default=0)
        shown = {number: info for number, info in records.items() if number >= start}
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="delta") as pool:
            digests = dict(zip(shown, pool.map(self._digest, shown.values()), strict=True))
        return {version: Origin(VIEW, mark, digests.get(version, "")) for version in range(start, max(records) + 1)}

    def _digest(self, info: ObjectInfo) -> str:
        name = info.key, info.etag
        if name not in self._digests:
            self._digests[name] = hashlib.blake2b(self._store.read(info.key), digest_size=8).hexdigest()
        return self._digests[name]

    def _has_parquet(self, number: int) -> bool:
        snapshots = Snapshots(self._store)
        keys = snapshots.table(snapshots.read(number), "files", ["key"])["key"]
        return bool(pc.any(pc.ends_with(keys, ".parquet")).as_py())


def _mark(takedowns: Takedowns) -> str:
    """`Origin.takedowns`."""
    keys = "\n".join(item.key for item in takedowns.records)
    return hashlib.blake2b(keys.encode(), digest_size=8).hexdigest()


def _first_to_write(contents: LogContents, origins: dict[int, Origin]) -> int | None:
    """The first version that is missing if all others are current; the first of all if one is not; None if there is nothing to do."""
    start, newest, heads = min(origins), max(origins), contents.heads
    first = next((version for version in origins if version not in heads), newest + 1)
    current = all(contents.is_current(version, origins[version]) for version in range(start, first))
    if start and start in heads:  # without versions before it, its files are in a checkpoint
        current = current and heads[start].checkpoint and min(heads) == start
    if not current or not contents.is_tidy() or max(heads, default=-1) >= first:
        return start
    return None if first > newest else first
