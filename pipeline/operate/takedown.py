"""Takedowns by name (`lathe takedown`): record, undo, list. Rows are hidden from the moment the record is written.

Takes a store and names as users write them, returns JSON-ready dicts. The Delta log is rewritten after the record: readers of it know no
takedowns. If the process is killed in between, `lathe verify` says so, and the next takedown or `lathe publish` rewrites it.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import InputError, LatheError, NotFound, OutputError
from pipeline.format.columns import storable
from pipeline.format.layout import TAKEDOWNS, undo_key
from pipeline.ledger.lease import MAINTENANCE, Lease
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.row_search import FoundRow
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedown_record import Takedown
from pipeline.ledger.takedowns import (
    WORKERS,
    Takedowns,
    listed_takedowns,
    read_record,
    read_takedowns,
    record_takedown,
    record_undo,
)
from pipeline.operate.delta_log import DeltaLog
from pipeline.operate.takedown_names import Named, TakenNames, resolve, spelled
from pipeline.operate.taken_files import TakenFiles
from pipeline.sidecars.description import set_names
from pipeline.storage import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from pipeline.operate.taken_files import TakenFile
    from pipeline.storage import Store

Name = TypeVar("Name")

NEAR = 3  # records like one that does not exist


def take_down(
    store: Store,
    names: Sequence[str],
    *,
    reason: str,
    by: str,
    allow_unknown: bool = False,
    dry_run: bool = False,
    comments: Collection[str] = (),
) -> dict[str, Any]:
    """Records one takedown of everything that `names` stand for and rewrites the Delta log. Of `comments`, names that begin with # in a
    list, those that stand for nothing are skipped.

    Returns `record` (its key; None with `dry_run`, or if all is hidden already), `sources`, `samples`, `rows`, `already` (names that
    earlier takedowns hide), `unknown`, `skipped` (comments), `snapshots` (rows that each would show otherwise, by number), `stored` (rows
    and files that keep the bytes), `delta` (None: there is no log), `delta_error`, `notices`, `sidecars` (names of all sets, which keep
    tensors of the rows).

    Raises:
        InputError: unknown or ambiguous names; nothing was recorded.
        OutputError: not an output, or a takedown that cannot be read.
    """
    Ledger(store).latent_set()
    earlier = read_takedowns(store)
    named = resolve(store, names, earlier, allow_unknown=allow_unknown, comments=comments)
    already = [*_take_out(named, earlier), *named.taken]
    made = Takedown("", "", reason, tuple(named.sources), tuple(named.samples), tuple(named.rows), by)
    if not dry_run and len(named):
        made = record_takedown(store, reason, sources=named.sources, samples=named.samples, rows=named.rows, by=by)
    found: dict[str, Any] = {
        "record": made.key or None,
        "dry_run": dry_run,
        "reason": reason,
        "by": by,
        "sources": list(made.sources),
        "samples": [list(sample) for sample in made.samples],
        "rows": [row.id for row in made.rows],
        "already": already,
        "unknown": named.unknown,
        "skipped": named.skipped,
    }
    view = {"delta": None, "delta_error": None} if dry_run else _delta(store)
    return {**found, **view, **_hidden(store, Takedowns([made]), earlier), "sidecars": set_names(store)}


def _take_out(named: Named, earlier: Takedowns) -> list[str]:
    """Takes names out that earlier takedowns hide. Returns them."""
    sources, named.sources = _parted(named.sources, earlier.takes)
    samples, named.samples = _parted(named.samples, lambda sample: earlier.hides(FoundRow("", *sample)))
    rows, named.rows = _parted(named.rows, lambda row: earlier.hides(FoundRow(row.id, row.source_uri, "")))
    return [*sources, *(f"{uri}#{key}" for uri, key in samples), *(row.id for row in rows)]


def _parted(items: list[Name], taken: Callable[[Name], bool]) -> tuple[list[Name], list[Name]]:
    """Items that are taken, and the others."""
    marks = [taken(item) for item in items]
    return list(compress(items, marks)), [item for item, mark in zip(items, marks, strict=True) if not mark]


def _delta(store: Store) -> dict[str, Any]:
    """Rewrites the Delta log, if there is one: `delta`, and `delta_error` if it was not rewritten."""
    try:
        view = DeltaLog(store).refresh()
    except LatheError as error:
        return {"delta": None, "delta_error": str(error)}
    return {"delta": None if view is None else view.to_dict(), "delta_error": None}


def _hidden(store: Store, takedowns: Takedowns, earlier: Takedowns) -> dict[str, Any]:
    """Rows that `takedowns` hide and `earlier` ones do not: by snapshot, and in stored files. What cannot be counted is a notice:
    the record hides the rows all the same.
    """
    snapshots: dict[int, int] = {}
    stored: list[TakenFile] = []
    notices = []
    try:
        files = TakenFiles(store, takedowns, earlier)
        for number in Snapshots(store).numbers():
            try:
                snapshots[number] = files.rows_of_snapshot(number)
            except LatheError as error:
                if number not in Snapshots(store).numbers():  # gc let it go since they were listed
                    continue
                notices.append(f"rows of snapshot {number} are not counted: {error}")
        stored = list(files.stored())
    except LatheError as error:
        notices.append(f"files that keep the bytes are not counted: {error}")
    return {
        "snapshots": snapshots,
        "stored": {"rows": sum(len(file.taken or ()) for file in stored), "files": len(stored)},
        "notices": notices,
    }


# --- undo -------------------------------------------------------------------------------------------------------------


def undo(store: Store, name: str, *, reason: str, by: str) -> dict[str, Any]:
    """Undoes a takedown: the record `name`, or what records say of a source, `URI#KEY`, sample key or row id. Other names of such a record
    stay hidden, by a record of their own.

    Returns `undone` (keys of records), `again` (records of the names that stay), `snapshots` (rows that each shows again), `delta`,
    `delta_error`, `notices`.

    Raises:
        InputError: no such record; the message has those like it.
        OutputError: the bytes are gone. Nothing was undone.
        LeaseHeld: a `lathe gc` or `lathe compact` runs.
    """
    Ledger(store).latent_set()
    with Lease(store, MAINTENANCE, "lathe takedown --undo"):
        records = read_takedowns(store).records
        meant = TakenNames(store, records).meant(name)
        parts = [part for record in records if (part := _part(record, name, meant)) is not None]
        if not parts:
            raise _no_record(store, records, name)
        for gone, _ in parts:
            _check_bytes(store, gone)
        again = []
        for gone, rest in parts:
            if rest.uri_ids():
                again.append(_record_again(store, rest))
            record_undo(store, gone.key, reason, by)
        shown = _hidden(store, Takedowns(gone for gone, _ in parts), read_takedowns(store))
        return {"undone": [gone.key for gone, _ in parts], "again": again, **_delta(store), **shown}


def _record_again(store: Store, rest: Takedown) -> str:
    made = record_takedown(
        store,
        rest.reason,
        sources=rest.sources,
        samples=rest.samples,
        rows=rest.rows,
        by=rest.by,
        deleted=rest.deleted,
    )
    return made.key


def _part(record: Takedown, name: str, meant: Sequence[FoundRow]) -> tuple[Takedown, Takedown] | None:
    """What `name` means of a record, and the rest of it; None if it means nothing of it. Both have the key of the record. The rest
    keeps the files that were deleted: if the part can be undone, they hold other rows. `meant`: samples and rows of that name.
    """
    nothing = Takedown(record.key, record.created, record.reason, by=record.by)
    short = record.key.removeprefix(TAKEDOWNS)
    if name in (record.key, short, short.removesuffix(".json")):
        return record, nothing
    if record.names_removed is not None:
        return (record, nothing) if _is_hashed(record, name, meant) else None
    pairs = {(uri, key) for found, uri, key in meant if not found}
    sources = {uri for uri in record.sources if uri in (name, spelled(name))}
    samples = {(uri, key) for uri, key in record.samples if (storable(uri), storable(key)) in pairs}
    rows = {row for row in record.rows if row.id == name}
    if not sources and not samples and not rows:
        return None
    gone = replace(nothing, sources=tuple(sources), samples=tuple(samples), rows=tuple(rows))
    rest = replace(
        record,
        sources=tuple(uri for uri in record.sources if uri not in sources),
        samples=tuple(sample for sample in record.samples if sample not in samples),
        rows=tuple(row for row in record.rows if row not in rows),
    )
    return gone, rest


def _is_hashed(record: Takedown, name: str, meant: Sequence[FoundRow]) -> bool:
    """Whether a record without names has the hash of this one."""
    alone = Takedowns([replace(record, hashed=replace(record.hashed, sources=()))])
    return Takedowns([record]).takes(spelled(name)) or any(map(alone.hides, meant))


def _no_record(store: Store, records: Sequence[Takedown], name: str) -> InputError:
    there = [record.key for record in records]
    there += [each for record in records for each in _names(record)]
    near = difflib.get_close_matches(name, there, NEAR)
    known = f"; there is {', '.join(near)}" if near else ""
    return InputError(
        f"no takedown of {store.root} is called or names {name!r}{known}. `lathe takedown {store.root} --list` shows all"
    )


def _names(record: Takedown) -> Iterator[str]:
    yield from record.sources
    yield from (f"{uri}#{key}" for uri, key in record.samples)
    yield from (row.id for row in record.rows)


def _check_bytes(store: Store, record: Takedown) -> None:
    """Raises OutputError if a file with rows of this record is gone, so that readers would miss it."""
    why = None
    if record.names_removed is not None:
        why = f"its bytes are gone, and its names were removed {record.names_removed}"
    elif (gone := next(iter(record.deleted), None) or TakenFiles(store, Takedowns([record])).lost()) is not None:
        why = f"bytes of its rows are gone: {gone} is deleted"
    if why is not None:
        one = ". A name of it whose bytes are there can be undone: --undo NAME" if len([*_names(record)]) > 1 else ""
        raise OutputError(
            f"{record.key} cannot be undone: {why}. The takedown stays; to have the videos again, encode them under other URIs or into "
            f"another output{one}"
        )


# --- list -------------------------------------------------------------------------------------------------------------


def history(store: Store) -> list[dict[str, Any]]:
    """Every record, in order of time: `record`, `created`, `by`, `reason`, `sources`, `samples`, `rows`, `hashed`, `names_removed`,
    `deleted` (number of files), `undone` (None, or `created`, `by`, `reason`).

    Raises:
        OutputError: a record that cannot be read.
    """
    Ledger(store).latent_set()
    listed, undone = listed_takedowns(store)
    found = []
    for record in mapped_ahead(
        partial(read_record, store), listed, WORKERS if is_remote(store.root) else 1, "takedowns"
    ):
        hashed = record.hashed
        found.append(
            {
                "record": record.key,
                "created": record.created,
                "by": record.by,
                "reason": record.reason,
                "sources": list(record.sources),
                "samples": [list(sample) for sample in record.samples],
                "rows": [row.id for row in record.rows],
                "hashed": [*hashed.sources, *(digest for _, digest in (*hashed.samples, *hashed.rows))],
                "names_removed": record.names_removed,
                "deleted": len(record.deleted),
                "undone": _undo_of(store, record.key) if record.key in undone else None,
            }
        )
    return found


def _undo_of(store: Store, record: str) -> dict[str, str]:
    try:
        raw = json.loads(store.read(undo_key(record)))
        return {name: str(raw[name]) for name in ("created", "by", "reason")}
    except (NotFound, ValueError, KeyError, TypeError):  # it undoes all the same
        return {"created": "", "by": "", "reason": ""}
