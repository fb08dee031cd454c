"""Check of the files of a candidate: all exist with their sizes; new ones end as they should, and belong to their index and receipt.

Reads the index and some kilobytes of each new file. A data file that was cut off and padded, or whose footer was overwritten, has its
size. `lathe verify` reads every byte.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from bisect import bisect_left, bisect_right
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import NotFound
from pipeline.format.codec import is_plain
from pipeline.format.index import INDEX_SCHEMA, METADATA_KEY
from pipeline.format.tensors import STORAGE_TYPES
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import packed_stats, read_batches, release_memory, sort_order
from pipeline.ledger.snapshots import Check
from pipeline.storage import is_remote
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store

NAMED = 3  # offenders named in a message
LISTED_AT_ONCE = 8192  # objects compared with the manifest in one step
WORKERS = 16  # where each read waits for a network
READ = ["key", "bytes", "sha256", "index_key", "index_sha256", "file_rows", "hidden", "shard_id"]
TAIL_BYTES = 32 * 1024  # one request reads most footers
PARQUET_END = 8  # length of the footer, magic
MAGIC = b"PAR1"
TAR_END = 1024  # two blocks of zeros
TAR_HEAD = 64 * 1024  # read before the first latent of a tar; its member of metadata is some kilobytes


class _Found(NamedTuple):
    """What was found in a new file and its index. `values`: of latents of rows that count; None: not known."""

    shard_id: str
    problem: str | None = None
    values: int | None = None


def files_check(store: Store, candidate: Candidate, workers: int | None = None) -> Check:
    """Every data file and index exists with its size and is named once, by one LIST per top folder.

    Of receipts that the parent does not cover, each Parquet footer, tar start and tar end is read, and each index is hashed and compared
    with the receipt: its rows, the data file it was written for, the number of values that statistics cover.
    """
    workers = workers or (WORKERS if is_remote(store.root) else 1)
    missing, wrong, twice = _listed(store, candidate.files)
    known_bad = {*missing, *(key for key, _ in wrong)}
    read, damaged = 0, []
    values: dict[str, int | None] = {}  # by shard
    for found in mapped_ahead(lambda row: _damage(store, row, known_bad), _fresh(candidate), workers, "files"):
        read += 1
        if found.problem is not None:
            damaged.append(found.problem)
        before = values.get(found.shard_id, 0)
        values[found.shard_id] = None if before is None or found.values is None else before + found.values
    damaged += _other_statistics(candidate, values)
    return _check(missing, wrong, twice, damaged, 2 * candidate.files.num_rows, 2 * read)


def _check(
    missing: list[str], wrong: list[tuple[str, str]], twice: list[str], damaged: list[str], files: int, read: int
) -> Check:
    found = (
        [f"{quantity(len(missing), 'file is', 'files are')} missing, such as {', '.join(missing[:NAMED])}"]
        if missing
        else []
    )
    if wrong:
        found.append(
            f"{quantity(len(wrong), 'file has', 'files have')} another size, such as {', '.join(text for _, text in wrong[:NAMED])}"
        )
    if twice:
        found.append(
            f"{quantity(len(twice), 'file is', 'files are')} named by two receipts, such as {', '.join(twice[:NAMED])}"
        )
    if damaged:
        found.append(
            f"{quantity(len(damaged), 'file is', 'files are')} damaged, such as {', '.join(damaged[:NAMED])}; "
            "`lathe verify` reads every byte"
        )
    numbers = {
        "files": files,
        "missing": len(missing),
        "other_size": len(wrong),
        "named_twice": len(twice),
        "read": read,
        "damaged": len(damaged),
    }
    return Check("files", not found, "; ".join(found), numbers)


def _other_statistics(candidate: Candidate, values: dict[str, int | None]) -> list[str]:
    """Receipts whose statistics are not of as many values as their indexes have."""
    found = []
    for fingerprint in candidate.receipts["fingerprint"].unique().to_pylist() if values else []:
        for shards, stats in packed_stats(candidate.receipts_path, fingerprint):
            covered = stats[:, 0] * ((stats.shape[1] - 1) // 4)  # values of a channel, channels
            for shard, number in zip(shards, covered.tolist(), strict=True):
                if (expected := values.get(shard)) is not None and number != expected:
                    found.append(
                        f"receipt of shard {shard} (statistics of {number:.0f} values, its indexes say {expected})"
                    )
    return found


def _listed(store: Store, files: pa.Table) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Keys that the store does not list, those that it lists with another size (key, words), and those that are named twice."""
    missing: list[str] = []
    twice: list[str] = []
    wrong: list[tuple[str, str]] = []
    for key, size in (("key", "bytes"), ("index_key", "index_bytes")):
        names, sizes = files[key], files[size].to_numpy()
        if (order := sort_order(names)) is not None:
            names, sizes = names.take(order), sizes[order.to_numpy()]
        twice += pc.unique(names[1:].filter(pc.equal(names[1:], names[:-1]))).to_pylist()
        there = np.zeros(len(names), bool)
        folders = pc.unique(pc.list_element(pc.split_pattern(names, "/"), 0)).to_pylist()
        for prefix in sorted(f"{name}/" for name in folders):
            listed = store.list(prefix)
            while infos := list(islice(listed, LISTED_AT_ONCE)):
                places = _places([info.key for info in infos], names)
                there[places[places >= 0]] = True
                for info, place in zip(infos, places.tolist(), strict=True):
                    if place >= 0 and sizes[place] != info.size:
                        wrong.append((info.key, f"{info.key} ({info.size} bytes, expected {sizes[place]})"))
            release_memory()
        absent = names.filter(pa.array(~there))
        if len(absent):  # of a key that is named twice, the second is not absent
            missing += absent.filter(pc.invert(pc.is_in(absent, names.filter(pa.array(there))))).to_pylist()
    return missing, wrong, twice


def _places(keys: list[str], names: pa.ChunkedArray) -> np.ndarray:
    """Positions of keys in sorted `names`, -1 where they are not. Looks only at names between the first and last key: a hash table of
    all, for every few thousand keys, takes minutes.
    """

    def name(position: int) -> str:
        return str(names[position].as_py())

    low = bisect_left(range(len(names)), min(keys), key=name)
    high = bisect_right(range(len(names)), max(keys), key=name)
    found = pc.index_in(pa.array(keys), pa.array(names.slice(low, high - low).to_pylist(), pa.string()))
    return np.asarray(pc.fill_null(pc.add(found, low), -1).to_numpy())


def _fresh(candidate: Candidate) -> Iterator[dict[str, Any]]:
    """Manifest rows of files whose receipts the parent does not cover."""
    for batch in read_batches(candidate.files_path, READ):
        yield from batch.filter(pc.is_in(batch["shard_id"], candidate.fresh)).to_pylist()


def _damage(store: Store, row: dict[str, Any], known_bad: set[str]) -> _Found:
    """Compares a data file and its index with the manifest, unless their names are in `known_bad`."""
    shard, index, values = row["shard_id"], None, None
    try:
        if row["index_key"] not in known_bad:
            data = store.read(row["index_key"])
            index, words = _index(row, data)
            if index is None:
                return _Found(shard, f"{row['index_key']} ({words})")
            values = _values(index, row["hidden"])
        if row["key"] not in known_bad:
            problem = _damaged_end(store, row["key"], row["bytes"], row["file_rows"])
            if problem is None and row["key"].endswith(".tar") and index is not None:
                problem = _other_start(store, row["key"], index)
            if problem is not None:
                return _Found(shard, f"{row['key']} ({problem})", values)
    except NotFound as error:
        return _Found(shard, f"{error} (deleted meanwhile)")
    return _Found(shard, None, values)


def _index(row: dict[str, Any], data: bytes) -> tuple[pq.ParquetFile | None, str]:
    """The opened index, or None and what is wrong with it."""
    found = hashlib.sha256(data).hexdigest()
    if found != row["index_sha256"]:
        return None, f"sha256 {found[:16]}…, expected {row['index_sha256'][:16]}…"
    try:
        index = pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        return None, f"it cannot be read as Parquet: {error}"
    footer = index.metadata
    if footer.num_rows != row["file_rows"]:
        return None, f"it has {footer.num_rows} rows, expected {row['file_rows']}"
    more, odd = divmod(footer.num_columns - len(INDEX_SCHEMA.names), 3)  # of what else is stored
    if more < 0 or odd or not footer.num_row_groups or _leaf(footer, "dtype", 0) is None:
        return (
            None,
            f"it has the columns {index.schema_arrow.names}, expected {INDEX_SCHEMA.names} and those of what `write.store` adds",
        )
    expected = {"key": row["key"], "num_bytes": row["bytes"], "sha256": row["sha256"]}
    if json.dumps(expected, sort_keys=True).encode() in data:  # as `write_index` writes it; parsing takes longer
        return index, ""
    try:
        about = json.loads((footer.metadata or {}).get(METADATA_KEY, b"null"))["data"]
    except (ValueError, KeyError, TypeError):
        about = None
    return (index, "") if about == expected else (None, f"it was written for {about}, expected {expected}")


def _leaf(footer: pq.FileMetaData, name: str, group: int) -> Any:
    """Metadata of a column of an index in one row group; None if there is another column in its place."""
    found = footer.row_group(group).column(INDEX_SCHEMA.get_field_index(name))
    return found if found.path_in_schema == name else None


def _values(index: pq.ParquetFile, hidden: list[int]) -> int:
    """Number of values of the latents of rows that count. Reads no row if all latents have one size."""
    names = ["latent_length", "dtype"]
    footer, groups = index.metadata, range(index.metadata.num_row_groups)
    columns = [[_leaf(footer, name, group).statistics for group in groups] for name in names]
    if all(found is not None and found.has_min_max for column in columns for found in column):
        lengths, dtypes = ({each for found in column for each in (found.min, found.max)} for column in columns)
        if len(lengths) == len(dtypes) == 1 and all(map(is_plain, dtypes)):
            return (footer.num_rows - len(hidden)) * (lengths.pop() // STORAGE_TYPES[dtypes.pop()].num_bytes)
    shapes = index.read(columns=["shape"], use_threads=False)["shape"].combine_chunks()
    sizes = shapes.flatten().to_numpy().reshape(len(shapes), -1).prod(axis=1)
    return int(np.delete(sizes, hidden).sum())


def _other_start(store: Store, key: str, index: pq.ParquetFile) -> str | None:
    """Reads what is before the first latent of a tar: it is in a member that is named by the first row."""
    rows = index.read_row_group(0, columns=["id", "latent_offset"], use_threads=False).slice(0, 1).to_pylist()
    first, latent_offset = rows[0]["id"], rows[0]["latent_offset"]
    head = store.read_range(key, 0, min(latent_offset, TAR_HEAD))
    place, name = 0, ""
    try:
        while place < len(head):
            member = tarfile.TarInfo.frombuf(head[place : place + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            place += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
            name = member.name
    except tarfile.HeaderError as error:
        return f"it does not start as a tar does: {error}"
    if latent_offset > TAR_HEAD or name.startswith(f"{first}."):
        return None
    return f"its first latent is in {name}, expected one of row {first}"


def _damaged_end(store: Store, key: str, size: int, rows: int) -> str | None:
    if key.endswith(".tar"):
        end = store.read_range(key, max(0, size - TAR_END), TAR_END)
        return None if end == bytes(TAR_END) else "it does not end with two blocks of zeros, as a tar does"
    tail = store.read_range(key, max(0, size - TAIL_BYTES), TAIL_BYTES)
    if tail[-len(MAGIC) :] != MAGIC:
        return f"it ends with {tail[-len(MAGIC) :]!r}, expected {MAGIC!r}"
    footer = int.from_bytes(tail[-PARQUET_END : -len(MAGIC)], "little") + PARQUET_END
    if footer > len(tail):
        tail = store.read_range(key, max(0, size - footer), footer)
    try:
        found = pq.ParquetFile(pa.BufferReader(tail)).metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        return f"its footer cannot be read: {error}"
    return None if found == rows else f"its footer says {found} rows, expected {rows}"
