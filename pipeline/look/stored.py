"""Stored clips of an output in the order of a preview, with their latents and scalar columns.

Takes an output. Gives `StoredClip`s in a fixed order, the bytes of a latent (checked against their hash), and a clip's facts. Reads only
receipts, side indexes, byte ranges of latents and the columns of a row, never a whole data file.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.format.codec import decoded, is_plain
from pipeline.format.columns import SCALARS
from pipeline.format.index import read_index
from pipeline.format.stored import I2V_COND
from pipeline.format.tensors import payload_hash
from pipeline.ledger.counted import shown
from pipeline.ledger.overlaps import CountedReceipt, Overlaps
from pipeline.ledger.receipts import Ledger, precedence
from pipeline.ledger.snapshots import Snapshots, published_copies
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate.inspect import HEAD_BYTES, inspect_path
from pipeline.records import variant_names
from pipeline.storage.ranged_file import RangedFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pipeline.config import StorageConfig
    from pipeline.format.index import IndexRow
    from pipeline.ledger.copies import Copies, Copy
    from pipeline.records import Receipt, WrittenFile
    from pipeline.storage import Store

MOST_RECEIPTS = 64  # read of an output, evenly spread
TAR_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True, slots=True)
class StoredClip:
    """One row of an output: the receipt of its shard, its data file, its place in that file."""

    receipt: Receipt
    file: WrittenFile
    row: IndexRow


@dataclass(frozen=True, slots=True)
class Chosen:
    """Receipts of one network, the newest of them, and the number of other networks in the output."""

    receipts: tuple[CountedReceipt, ...]
    newest: Receipt
    other_networks: int


def choose(store: Store, number: int | None = None) -> Chosen:
    """Receipts with clips of the network that committed last; of a large output at most `MOST_RECEIPTS`, evenly spread. With `number`
    only those of that snapshot.

    Raises:
        OutputError: the output is not a latent set, or has another format version.
        InputError: no shard is finished, or none has a clip; no snapshot `number`.
    """
    ledger = Ledger(store)
    ledger.latent_set()
    if number is not None:
        return _chosen(_of_snapshot(store, ledger, number), f"snapshot {number} of {store.root}")
    summaries = Summaries(store).all()
    if not summaries:
        raise InputError(f"{store.root} has no finished shard yet; run `lathe encode` until `lathe status` shows one")
    overlaps = Overlaps(summaries, read_takedowns(store), published_copies(store))
    keys = sorted(item.key for item in summaries if item.clips)
    spread = [keys[i * len(keys) // MOST_RECEIPTS] for i in range(MOST_RECEIPTS)] if keys else []
    read = ledger.read_all([key] for key in (keys if len(keys) <= MOST_RECEIPTS else spread))
    found = [overlaps.counted(receipt) for receipt in read if receipt is not None]
    return _chosen(found, f"{store.root} ({len(summaries)} shards done)")


def _of_snapshot(store: Store, ledger: Ledger, number: int) -> list[CountedReceipt]:
    """Receipts of files that a snapshot names, evenly spread, with the rows that it hides."""
    snapshots = Snapshots(store)
    table = snapshots.table(snapshots.read(number), "files", ["shard_id", "key", "hidden"])
    copies = published_copies(store, number)
    shards = sorted({*table["shard_id"].to_pylist(), *_with_copies_in(copies, set(table["key"].to_pylist()))})
    if copies:  # compacted files have ids of their own
        shards = sorted(set(shards) - {file["shard_id"] for file in copies.files.values()})
    if len(shards) > MOST_RECEIPTS:
        shards = [shards[i * len(shards) // MOST_RECEIPTS] for i in range(MOST_RECEIPTS)]
    compacted = {copy.file.key for shard in shards for found in copies.of(shard).values() for copy in found}
    copied: dict[str, frozenset[int]] = {}
    positions: dict[str, dict[str, frozenset[int]]] = {shard: {} for shard in shards}
    for row in table.to_pylist():
        if row["shard_id"] in positions:
            positions[row["shard_id"]][row["key"]] = frozenset(row["hidden"])
        elif row["key"] in compacted:
            copied[row["key"]] = frozenset(row["hidden"])
    takedowns = read_takedowns(store)
    found = [(shard, ledger.read(shard)) for shard in shards]
    return [
        CountedReceipt(receipt, takedowns=takedowns, positions=positions[shard] | copied, copies=copies)
        for shard, receipt in found
        if receipt is not None
    ]


def _with_copies_in(copies: Copies, keys: set[str]) -> list[str]:
    """Shards with rows in these compacted files. The copies of a snapshot of one fingerprint are those of all."""
    named = [text for text in copies.table["file"].unique().to_pylist() if json.loads(text)["key"] in keys]
    mine = pc.and_(pc.is_in(copies.table["file"], pa.array(named, pa.string())), pc.greater(copies.table["rows"], 0))
    shards: list[str] = copies.table["shard_id"].filter(mine).to_pylist()
    return shards


def _chosen(found: list[CountedReceipt], where: str) -> Chosen:
    filled = [part for part in found if part.receipt.files and not part.superseded]
    if not filled:
        raise InputError(f"{where} holds no clip; see `lathe status`")
    newest = max((part.receipt for part in filled), key=precedence)
    networks = {_network_key(part.receipt) for part in filled}
    same = tuple(part for part in filled if _network_key(part.receipt) == _network_key(newest))
    return Chosen(same, newest, len(networks) - 1)


def _network_key(receipt: Receipt) -> str:
    return json.dumps(receipt.fingerprint_parts["encoder"], sort_keys=True)


def in_turns(store: Store, receipts: Sequence[CountedReceipt]) -> Iterator[StoredClip]:
    """Every clip of `receipts` once: buckets in turn, within a bucket files in turn, within a file videos in turn.

    The order depends on the output only. An index is read when its first clip is due.
    """
    by_bucket: dict[str, list[Iterator[StoredClip]]] = {}
    for part in sorted(receipts, key=lambda item: (item.receipt.shard.name, item.receipt.shard_id)):
        for file, copy in _places(part):
            files = by_bucket.setdefault(file.bucket, [])
            files.append(_of_file(store, part, file, copy, len(files)))
    yield from _round_robin(_round_robin(files) for _, files in sorted(by_bucket.items()))


def _places(part: CountedReceipt) -> Iterator[tuple[WrittenFile, Copy | None]]:
    """Files that have rows of a receipt: those that it names, or compacted ones with the copies in them."""
    copies = part.copies.of(part.receipt.shard_id)
    for file in part.receipt.files:
        for copy in copies.get(file.key, ()):
            if copy.rows and (part.positions is None or copy.file.key in part.positions):
                yield copy.file, copy
        if file.key not in copies and part.positions is None:
            yield file, None
        if part.positions is not None and file.key in part.positions:
            yield file, None


def _round_robin(queues: Iterable[Iterator[StoredClip]]) -> Iterator[StoredClip]:
    """One item of each queue in turn, until all are empty."""
    waiting = list(queues)
    while waiting:
        still = []
        for queue in waiting:
            if (item := next(queue, None)) is not None:
                yield item
                still.append(queue)
        waiting = still


def _of_file(
    store: Store, part: CountedReceipt, file: WrittenFile, copy: Copy | None, number: int
) -> Iterator[StoredClip]:
    """The first clip of each video in file order (the cheapest order to read from a tar), then the second ones, and so on. Each file and
    each video in it begins with the variant after that of the one before, so that a few clips are of all variants.
    """
    try:
        rows, _ = read_index(store.read(file.index_key))
    except ValueError as error:
        raise InputError(
            f"{store.uri(file.index_key)} cannot be read as a side index: {error}; see `lathe verify`"
        ) from None
    videos: dict[str, list[int]] = {}
    hidden = part.positions[file.key] if part.positions is not None else frozenset()
    for row in (row for row in shown(part, rows if copy is None else copy.of(rows)) if row.row not in hidden):
        videos.setdefault(row.source_hash, []).append(row.row)
    variants = len(variant_names(part.receipt.fingerprint_parts))
    turns = []
    for start, positions in enumerate(videos.values(), number):
        first = start % variants
        turns += [(turn, position) for turn, position in enumerate(positions[first:] + positions[:first])]
    for _, position in sorted(turns):
        yield StoredClip(part.receipt, file, rows[position])


def encoder_of(store: Store, parts: Sequence[CountedReceipt], storage: StorageConfig) -> dict[str, Any]:
    """Description of the network in a data file of the newest of these receipts: name, configuration, hash and place of the weights.

    Raises:
        InputError: the file is missing or was not written by Lathe.
    """
    ordered = sorted(parts, key=lambda part: precedence(part.receipt), reverse=True)
    file = next((file for part in ordered for file, _ in _places(part)), None)
    if file is None:
        raise InputError(f"{store.root} holds no clip of these receipts; see `lathe status`")
    encoder: dict[str, Any] = inspect_path(store.uri(file.key), storage)["metadata"]["encoder"]
    return encoder


def latent_bytes(store: Store, clip: StoredClip) -> bytes:
    """Values of the stored mean as bytes: `C t h w` of the `value_type` of the row's `dtype`, little-endian in C order.

    Raises:
        InputError: their hash is not the recorded one.
    """
    row = clip.row
    return _tensor_bytes(store, clip, "latent", row.latent_offset, row.latent_length, row.latent_hash)


def logvar_bytes(store: Store, clip: StoredClip) -> bytes | None:
    """Bytes of the stored log-variance, as `latent_bytes`; None without moments."""
    row = clip.row
    if row.logvar_offset is None or row.logvar_length is None or row.logvar_hash is None:
        return None
    return _tensor_bytes(store, clip, "log-variance", row.logvar_offset, row.logvar_length, row.logvar_hash)


def cond_bytes(store: Store, clip: StoredClip) -> bytes | None:
    """Bytes of the stored `i2v_cond`, as `latent_bytes`; None without."""
    place = next((place for place in clip.row.others if place.name == I2V_COND), None)
    return None if place is None else _tensor_bytes(store, clip, I2V_COND, place.offset, place.length, place.hash)


def _tensor_bytes(store: Store, clip: StoredClip, what: str, offset: int, length: int, expected: str) -> bytes:
    data = store.read_range(clip.file.key, offset, length)
    if (found := payload_hash(data)) != expected:
        raise InputError(
            f"{store.uri(clip.file.key)}: the {what} of {clip.row.id} is damaged: its hash is {found}, expected {expected}; "
            "`lathe verify` lists all damaged ones"
        )
    return data if is_plain(clip.row.dtype) else decoded(data, clip.row.dtype, clip.row.shape).tobytes()


def facts(store: Store, clip: StoredClip) -> dict[str, Any]:
    """`row_facts` of a clip."""
    return row_facts(store, clip.file.key, clip.row)


def row_facts(store: Store, key: str, row: IndexRow) -> dict[str, Any]:
    """Scalar columns of a row by name (docs/formats.md), from the Parquet row or the tar's JSON member. `key`: of its data file.

    Raises:
        InputError: the file does not match its index.
    """
    size = store.stat(key).size
    read = _tar_facts if key.endswith(".tar") else _parquet_facts
    try:
        found = read(RangedFile(store, key, size), row)
    except (pa.ArrowException, tarfile.ReadError, ValueError) as error:
        raise InputError(f"{store.uri(key)} cannot be read: {error}; see `lathe verify`") from None
    if found is None or found["id"] != row.id:
        raise InputError(f"{store.uri(key)} has no row {row.id} where its index says; see `lathe verify`")
    return found


def _parquet_facts(file: RangedFile, row: IndexRow) -> dict[str, Any] | None:
    opened = pq.ParquetFile(pa.PythonFile(file, mode="r"))
    position = row.row
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        if position < count:
            values: dict[str, Any] = opened.read_row_group(group, ["id", *SCALARS]).slice(position, 1).to_pylist()[0]
            return values
        position -= count
    return None


def _tar_facts(file: RangedFile, row: IndexRow) -> dict[str, Any] | None:
    """The JSON member is the first or second after the last tensor of the clip; reading starts there."""
    end = max(span.offset + span.length for span in row.spans())
    buffered = io.BufferedReader(file, HEAD_BYTES)
    buffered.seek(-(-end // TAR_BLOCK) * TAR_BLOCK)
    with tarfile.open(fileobj=buffered, mode="r:") as archive:
        for _ in range(2):
            member = archive.next()
            if member is not None and member.name == f"{row.id}.json":
                content = archive.extractfile(member)
                values: dict[str, Any] | None = None if content is None else json.load(content)
                return values
    return None
