"""Checks of one data file with its index, for `lathe verify`: sizes, hashes, counts, offsets, footer.

Takes what a receipt or manifest says of the file; appends what differs to a `Checked`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import InputError, NotFound, SourceChanged
from pipeline.format.codec import stored_length
from pipeline.format.index import read_footer, read_index
from pipeline.format.tensors import SpanChecker
from pipeline.ledger.takedowns import may_be_deleted
from pipeline.records import split_id
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.format.index import IndexRow
    from pipeline.ledger.overlaps import CountedReceipt
    from pipeline.ledger.takedowns import Takedowns
    from pipeline.records import WrittenFile
    from pipeline.storage import ObjectInfo, Store

    Visible = Callable[[list[IndexRow]], list[IndexRow]]

PIECE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference between found and expected."""

    file: str
    found: str
    expected: str


class FilePart(NamedTuple):
    """What is known of the receipt of a file. `visible` gives the rows that count, of all."""

    visible: Visible
    fingerprint: str
    shard_id: str
    takedowns: Takedowns
    variants: tuple[str, ...]  # of each clip


@dataclass(slots=True)
class Checked:
    """Result of checking one shard. `rows` and `frames` are those that count."""

    part: CountedReceipt | None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    rows: int = 0
    frames: int = 0
    ids: list[tuple[str, np.ndarray]] = field(default_factory=list)  # (index key, uint64 hash of each id)
    bytes_read: int = 0
    deleted: int = 0  # files that are gone and may be: all sources of their receipt are taken down

    def count(self, index_key: str, rows: list[IndexRow]) -> None:
        """Adds rows that count."""
        self.rows += len(rows)
        self.frames += sum(row.num_frames for row in rows)
        self.ids.append((index_key, np.array([_id_hash(row.id) for row in rows], np.uint64)))


def check_file(store: Store, item: WrittenFile, part: FilePart, deep: bool, checked: Checked) -> None:
    """Compares a data file and its index with what is recorded of them; `deep`: every byte. Results go to `checked`."""
    infos: dict[str, ObjectInfo] = {}
    for key, size in ((item.key, item.num_bytes), (item.index_key, item.index_bytes)):
        try:
            infos[key] = store.stat(key)
        except NotFound:
            if may_be_deleted(store, part.takedowns, part.shard_id, key):
                checked.deleted += 1
            else:
                checked.problems.append(Problem(key, "no such file", f"{size} bytes"))
            continue
        if infos[key].size != size:
            checked.problems.append(Problem(key, f"{infos[key].size} bytes", f"{size} bytes"))
    rows = _check_index(store, item, part.visible, checked) if item.index_key in infos else []
    if (misplaced := misplaced_variant(rows, part.variants)) is not None:
        checked.problems.append(Problem(item.index_key, *misplaced))
    if item.key not in infos:
        return
    if deep:
        _check_bytes(store, item, infos[item.key], rows, checked)
    if item.key.endswith(".parquet"):
        _check_footer(store, item, infos[item.key], part.fingerprint, checked)


def _check_index(store: Store, item: WrittenFile, visible: Visible, checked: Checked) -> list[IndexRow]:
    data = store.read(item.index_key)
    checked.bytes_read += len(data)
    if (found := hashlib.sha256(data).hexdigest()) != item.index_sha256:
        checked.problems.append(Problem(item.index_key, f"sha256 {found}", f"sha256 {item.index_sha256}"))
        return []
    try:
        rows, metadata = read_index(data)
    except (ValueError, OSError) as error:
        checked.problems.append(Problem(item.index_key, str(error), "a side index"))
        return []
    facts = {
        "rows": (len(rows), item.rows),
        "frames": (sum(row.num_frames for row in rows), item.frames),
        "buckets": ({row.bucket for row in rows}, {item.bucket}),
        "data file": (metadata.get("data"), {"key": item.key, "num_bytes": item.num_bytes, "sha256": item.sha256}),
    }
    for name, (got, expected) in facts.items():
        if got != expected:
            checked.problems.append(Problem(item.index_key, f"{name}: {got}", f"{expected}"))
    for position, row in enumerate(rows):
        length = stored_length(row.dtype, row.shape) or row.latent_length  # of compressed ones the bytes are checked
        if (got := (row.row, row.latent_length)) != (expected := (position, length)):
            where = f"{item.index_key}#{row.id}"
            checked.problems.append(Problem(where, f"row and bytes {got}", f"{expected} from its position and shape"))
    checked.count(item.index_key, visible(rows))
    return rows


def _check_bytes(store: Store, item: WrittenFile, info: ObjectInfo, rows: list[IndexRow], checked: Checked) -> None:
    checker = SpanChecker((span for row in rows for span in row.spans()), finite=True)
    try:
        with store.open_stream(item.key, size=info.size, etag=info.etag) as stream:
            while piece := stream.read(PIECE_BYTES):
                checker.feed(piece)
    except SourceChanged as error:
        checked.problems.append(Problem(item.key, error.message, "a file that does not change"))
        return
    checked.bytes_read += checker.num_bytes
    if (found := checker.finish()) != item.sha256:
        checked.problems.append(Problem(item.key, f"sha256 {found}", f"sha256 {item.sha256}"))
    checked.problems += [Problem(f"{item.key}#{bad.id}", bad.found, bad.expected) for bad in checker.problems]


def _check_footer(store: Store, item: WrittenFile, info: ObjectInfo, fingerprint: str, checked: Checked) -> None:
    try:
        footer, metadata = read_footer(RangedFile(store, item.key, info.size), item.key)
    except InputError as error:
        checked.problems.append(Problem(item.key, error.message, "a Parquet file"))
        return
    if footer.num_rows != item.rows:
        checked.problems.append(Problem(item.key, f"{footer.num_rows} rows", f"{item.rows} rows"))
    if (found := (metadata or {}).get("fingerprint")) != fingerprint:
        checked.problems.append(Problem(item.key, f"fingerprint {found}", f"fingerprint {fingerprint}"))


def _id_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def misplaced_variant(rows: list[IndexRow], variants: tuple[str, ...]) -> tuple[str, str] | None:
    """What was found and expected at the first row that is out of place, None if there is none: the variants of each clip are neighbours,
    complete, and in the order of `variants`. The loader relies on it.
    """
    step = len(variants)
    if step == 1:
        return None
    clip = ""
    for position, row in enumerate(rows):
        stem, variant = split_id(row.id)
        clip = stem if position % step == 0 else clip
        if (stem, variant) != (clip, expected := variants[position % step]):
            return (
                f"row {position} is variant {variant} of {stem}",
                f"{expected} of {clip}: rows in groups of {', '.join(variants)}",
            )
    if len(rows) % step:
        return f"{len(rows)} rows", f"{step} for each clip: {', '.join(variants)}"
    return None
