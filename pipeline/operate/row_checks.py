"""Checks of the rows that the indexes of an output list: ids that occur twice, variants of a clip that are not together."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from pipeline.format.index import read_index
from pipeline.format.layout import DATA
from pipeline.records import split_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.format.index import IndexRow
    from pipeline.storage import Store

LISTED_IDS = 20  # repeated ids that are listed; the rest are counted


def id_hashes(rows: Sequence[IndexRow]) -> np.ndarray:
    """Hash of each id, uint64."""
    digests = (hashlib.blake2b(row.id.encode(), digest_size=8).digest() for row in rows)
    return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)


def doubled_ids(store: Store, ids: list[tuple[str, np.ndarray]]) -> list[tuple[str, str, str]]:
    """Ids that occur twice, each with its index, what was found and what was expected. Candidates are found by hash; indexes with
    candidates are read again for the names. `ids`: keys of indexes, `id_hashes` of their rows.
    """
    if not ids:
        return []
    values, numbers = np.unique(np.concatenate([hashes for _, hashes in ids]), return_counts=True)
    suspects = values[numbers > 1]
    if not suspects.size:
        return []
    where: dict[str, list[str]] = {}
    for index_key, hashes in ids:
        if np.isin(hashes, suspects).any():
            for row in read_index(store.read(index_key))[0]:
                where.setdefault(row.id, []).append(index_key)
    doubled = {name: keys for name, keys in where.items() if len(keys) > 1}
    listed = [(keys[0], f"id {name} also in {keys[1]}", "each id once") for name, keys in doubled.items()]
    if (rest := len(listed) - LISTED_IDS) > 0:
        listed[LISTED_IDS:] = [(DATA, f"{rest} more ids that occur twice", "each id once")]
    return listed


def misplaced_variant(rows: Sequence[IndexRow], variants: tuple[str, ...]) -> tuple[str, str] | None:
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
