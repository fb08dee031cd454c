"""Export of a snapshot into a directory: compares what is there with the rows of the snapshot, drops, adds, writes the indexes.

Takes `Rows` and a `Target`. Memory: some 200 bytes a row for the comparison, the rows of one part in each folder, one latent.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from pipeline.errors import BuildError, InputError, OutputError
from pipeline.export.journal import Journal, Part, write_flushed
from pipeline.export.target import Folder, Sample
from pipeline.export.values import converted
from pipeline.records import is_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pipeline.export.rows import Row, Rows
    from pipeline.export.target import Target

NAMED = 3  # rows that a message lists


@dataclass(slots=True)
class Report:
    """What an export did. Counts are of rows; `folders`: rows by folder; `numbers`: greatest values of `Target.numbers`."""

    target: str
    model: str
    directory: str
    snapshot: int
    rows: int = 0
    added: int = 0
    kept: int = 0
    removed: int = 0
    repaired: int = 0  # rows whose files were gone or had another size
    caches_removed: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(slots=True)
class _Comparison:
    """Rows of the directory against rows of the snapshot, by key."""

    part_of: dict[int, str] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    unusable: set[str] = field(default_factory=set)  # parts that are unfinished or damaged
    wanted: int = 0


def export(
    rows: Rows, target: Target, directory: Path, notices: list[str], progress: Callable[[int, int], None] | None = None
) -> Report:
    """Brings `directory` to the state of the snapshot: afterwards it holds its rows and no others.

    `progress` is called with rows written and rows to write. Run again after a kill, it goes on with what is missing.

    Raises:
        InputError: rows that the trainer could not read, or that have no text embedding; nothing was changed.
        OutputError: the directory holds something else, or cannot be written.
    """
    source = rows.source
    identity = _identity(rows, target, directory)
    notices = [*notices, *target.notices()]
    report = Report(target.name, target.model.name, str(directory), source.snapshot, notices=list(notices))
    with Journal(directory, identity) as journal:
        found = _load(journal, target, report)
        _compare(rows, target, found, report)
        _refuse_foreign(journal, target)
        report.removed = len(found.part_of) - len(found.kept)
        report.kept = len(found.kept)
        report.added = found.wanted - report.kept
        report.rows = found.wanted
        changed = bool(report.added or report.removed or found.unusable)
        if changed or journal.manifest["complete"] is None:
            journal.unfinished()
            report.caches_removed = _remove_caches(journal, target)
            _drop(journal, target, found)
            _write_missing(rows, target, journal, found, report, progress)
        _finish(target, journal, report)
        if changed or journal.manifest["complete"] != _facts(report):
            journal.complete(_facts(report))
    return report


def _identity(rows: Rows, target: Target, directory: Path) -> dict[str, Any]:
    """What all exports into one directory share. Other values would mix in one folder without a trace."""
    source = rows.source
    return {
        "target": target.name,
        "model": target.model.name,
        "source": source.uuid,
        "network": source.network,
        "constants": {name: source.spec.get(name) for name in ("mean", "std", "scale", "shift")},
        "where": source.where,
        "text": None if target.texts is None else target.texts.facts,
        "directory": str(directory.absolute()) if target.absolute else None,
        **target.settings(),
    }


def _facts(report: Report) -> dict[str, Any]:
    return {"snapshot": report.snapshot, "rows": report.rows}


def _key(row_id: str, version: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{row_id}\0{version}".encode(), digest_size=8).digest())


def _load(journal: Journal, target: Target, report: Report) -> _Comparison:
    found = _Comparison()
    for part in journal.parts():
        if journal.whole(part):
            for row in part.rows:
                found.part_of[_key(row[0], row[1])] = part.name
        else:
            found.unusable.add(part.name)
            report.repaired += len(part.rows) if part.done else 0
    return found


def _compare(rows: Rows, target: Target, found: _Comparison, report: Report) -> None:
    """Reads all rows once: checks them, and marks those that the directory has."""
    without: list[str] = []
    lacking = 0
    greatest: Counter[str] = Counter()
    for row in rows:
        target.check(row)
        if target.texts is not None and target.texts.position(row) is None:
            lacking += 1
            if len(without) < NAMED:
                without.append(f"{row.id} ({'no caption' if row.caption is None else repr(row.caption[:60])})")
        for name, value in target.numbers(row).items():
            greatest[name] = max(greatest[name], value)
        found.wanted += 1
        key = _key(row.id, row.version)
        if key in found.part_of:
            found.kept.add(key)
    if lacking and target.texts is not None:
        raise InputError(
            f"{target.texts.label} lacks {lacking} of {found.wanted} rows by {target.texts.key}: {', '.join(without)}"
            f"{' …' if lacking > len(without) else ''}. Add them, or leave the rows out with --where"
        )
    if not found.wanted:
        raise InputError(f"snapshot {rows.source.snapshot} of {rows.source.uri} has no row to export; see --where")
    report.numbers = dict(greatest)


def _refuse_foreign(journal: Journal, target: Target) -> None:
    """Files that the trainer would read and no part made."""
    if not target.shares_files:
        return
    known = {path for part in journal.parts() for path in part.paths}
    suffix = target.part_path("", "0")
    for path in journal.directory.rglob(f"*.{str(suffix).rpartition('.')[2]}"):
        if (name := path.relative_to(journal.directory).as_posix()) not in known:
            raise OutputError(
                f"{journal.directory} holds {name}, which no export made and the trainer would read; move it away"
            )


def _remove_caches(journal: Journal, target: Target) -> list[str]:
    removed = []
    for pattern in target.stale:
        for path in sorted(found for found in journal.directory.glob(pattern) if found.is_file()):
            name = path.relative_to(journal.directory).as_posix()
            journal.remove(name)
            removed.append(name)
    return removed


def _drop(journal: Journal, target: Target, found: _Comparison) -> None:
    """Removes rows that the snapshot does not have, and parts that are unfinished or damaged."""
    touched = {part for key, part in found.part_of.items() if key not in found.kept}
    for part in journal.parts():
        if part.name in found.unusable:
            journal.drop(part)
        elif part.name in touched:
            kept = [row for row in part.rows if _key(row[0], row[1]) in found.kept]
            if target.shares_files or not kept:
                journal.drop(part)
                found.kept.difference_update(_key(row[0], row[1]) for row in kept)
            else:
                _shrink(journal, target, part, kept)


def _shrink(journal: Journal, target: Target, part: Part, kept: list[list[Any]]) -> None:
    """Removes rows of a part whose rows have files of their own."""
    staying = {path for row in kept for path in row[2]}
    leaving = [path for row in part.rows for path in row[2] if path not in staying]
    if part.shared:
        journal.put(part.shared, data := target.part_index([row[3] for row in kept]))
        part.sizes[part.shared] = len(data)
    for path in leaving:
        journal.remove(path)
        part.sizes.pop(path, None)
    part.rows = kept
    journal.begin(part)


def _write_missing(
    rows: Rows,
    target: Target,
    journal: Journal,
    found: _Comparison,
    report: Report,
    progress: Callable[[int, int], None] | None,
) -> None:
    waiting: dict[str, list[Row]] = defaultdict(list)
    sizes: Counter[str] = Counter()
    written, total = 0, found.wanted - len(found.kept)

    def flush(folder: str) -> None:
        nonlocal written
        part_rows = waiting.pop(folder)
        sizes.pop(folder)
        _write_part(rows, target, journal, folder, part_rows)
        written += len(part_rows)
        if progress is not None:
            progress(written, total)

    for row in rows:
        if _key(row.id, row.version) in found.kept:
            continue
        folder = target.folder(row)
        waiting[folder].append(row)
        sizes[folder] += 4 * prod(row.shape) * (1 + len(target.others))
        if len(waiting[folder]) >= target.part_rows or sizes[folder] >= target.part_bytes:
            flush(folder)
    for folder in list(waiting):
        flush(folder)


def _write_part(rows: Rows, target: Target, journal: Journal, folder: str, part_rows: list[Row]) -> None:
    name = journal.next_name()
    facts = [[row.id, row.version, target.paths(row), target.entry(row, journal.directory)] for row in part_rows]
    part = Part(name, folder, facts, target.part_path(folder, name))
    try:
        journal.begin(part)
        target.write(_samples(rows, target, part_rows), part.shared, journal.staged)
        if part.shared and not target.shares_files:
            write_flushed(journal.staged(part.shared), target.part_index([row[3] for row in facts]))
        journal.commit(part)
    except OSError as error:
        raise BuildError(
            f"{journal.directory} cannot be written: {error.strerror or error}; the same command goes on"
        ) from None


def _samples(rows: Rows, target: Target, part_rows: list[Row]) -> Iterator[Sample]:
    spec = rows.source.spec if target.model.normalize else None
    cond_spec = rows.source.spec if target.normalizes_conditions else None
    for row, stored in zip(part_rows, rows.latents(part_rows, target.others), strict=True):
        texts = {} if target.texts is None else target.texts.tensors(row)
        latent = converted(stored.mean, target.dtype, spec, row.id)
        cond = None if stored.cond is None else converted(stored.cond, target.dtype, cond_spec, row.id)
        members = {
            name: converted(values, target.dtype, None if is_mask(name) else spec, row.id)
            for name, values in stored.members.items()
        }
        yield Sample(row, latent, stored.logvar, texts, cond, stored.first_frame, members)


def _finish(target: Target, journal: Journal, report: Report) -> None:
    counts: Counter[str] = Counter()
    files: dict[str, list[str]] = defaultdict(list)
    for part in journal.parts():
        counts[part.folder] += len(part.rows)
        if part.shared:
            files[part.folder].append(part.shared)
    folders = [Folder(name, counts[name], tuple(files[name])) for name in sorted(counts)]
    report.folders = {folder.name: folder.rows for folder in folders}
    for path, data in target.finish(folders, journal.directory).items():
        place = journal.directory / path
        if data is None:
            journal.remove(path)
        elif not place.exists() or place.read_bytes() != data:
            journal.put(path, data)
