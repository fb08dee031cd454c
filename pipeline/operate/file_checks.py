"""Check of the files of a candidate: all exist with their sizes, and new ones end as they should. Reads some kilobytes of each new file.

A data file that was cut off and padded, or whose footer was overwritten, has its size. `lathe verify` reads every byte.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import NotFound
from pipeline.ledger.lookahead import mapped_ahead
from pipeline.ledger.manifest import read_batches, release_memory, sort_order
from pipeline.ledger.snapshots import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.ledger.candidate import Candidate
    from pipeline.storage import Store

NAMED = 3  # offenders named in a message
LISTED_AT_ONCE = 8192  # objects compared with the manifest in one step
WORKERS = 16
READ = ["key", "bytes", "index_key", "index_sha256", "file_rows", "shard_id"]
TAIL_BYTES = 32 * 1024  # one request reads most footers
PARQUET_END = 8  # length of the footer, magic
MAGIC = b"PAR1"
TAR_END = 1024  # two blocks of zeros


def files_check(store: Store, candidate: Candidate, workers: int = WORKERS) -> Check:
    """Every data file and index exists with its size, by one LIST per top folder; of receipts that the parent does not cover, each Parquet
    footer and tar end is read, and each index hashed.
    """
    missing, wrong = _listed(store, candidate.files)
    known_bad = {*missing, *(key for key, _ in wrong)}
    read, damaged = 0, []
    for problem in mapped_ahead(lambda row: _damage(store, row, known_bad), _fresh(candidate), workers, "files"):
        read += 1
        if problem is not None:
            damaged.append(problem)
    found = [f"{len(missing)} files are missing, such as {', '.join(missing[:NAMED])}"] if missing else []
    if wrong:
        found.append(f"{len(wrong)} files have another size, such as {', '.join(text for _, text in wrong[:NAMED])}")
    if damaged:
        found.append(
            f"{len(damaged)} files are damaged, such as {', '.join(damaged[:NAMED])}; `lathe verify` reads every byte"
        )
    numbers = {
        "files": 2 * candidate.files.num_rows,
        "missing": len(missing),
        "other_size": len(wrong),
        "read": 2 * read,
        "damaged": len(damaged),
    }
    return Check("files", not found, "; ".join(found), numbers)


def _listed(store: Store, files: pa.Table) -> tuple[list[str], list[tuple[str, str]]]:
    """Keys that the store does not list, and those that it lists with another size: key, words."""
    missing: list[str] = []
    wrong: list[tuple[str, str]] = []
    for key, size in (("key", "bytes"), ("index_key", "index_bytes")):
        names, sizes = files[key], files[size].to_numpy()
        if (order := sort_order(names)) is not None:
            names, sizes = names.take(order), sizes[order.to_numpy()]
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
    return missing, wrong


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


def _damage(store: Store, row: dict[str, Any], known_bad: set[str]) -> str | None:
    """What is wrong with a data file or its index; None if nothing is, or if their names are in `known_bad`."""
    try:
        if row["key"] not in known_bad:
            problem = _damaged_end(store, row["key"], row["bytes"], row["file_rows"])
            if problem is not None:
                return f"{row['key']} ({problem})"
        if row["index_key"] not in known_bad:
            found = hashlib.sha256(store.read(row["index_key"])).hexdigest()
            if found != row["index_sha256"]:
                return f"{row['index_key']} (sha256 {found[:16]}…, expected {row['index_sha256'][:16]}…)"
    except NotFound as error:
        return f"{error} (deleted meanwhile)"
    return None


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
