"""`Takedown`: one record of `_takedowns/`, its JSON, and hashes in place of the names when the bytes are gone. No I/O.

A record names sources (all versions and clips of a URI), samples (a key of a source), or single rows by id, each with its source. When no
stored file holds such a row any more, `without_names` replaces the names by hashes: the record still hides, and still says who took it
down, when and why.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.format.columns import storable
from pipeline.ledger.summary import URI_BYTES, uri_id
from pipeline.records import split_id

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT_VERSIONS = (1, 2)
"""Version 1 has neither `by`, `hashed`, `deleted` nor `names_removed`."""
NAME_BYTES = 16
ROW = {"id", "source_uri"}


@dataclass(frozen=True, slots=True)
class TakenRow:
    """One row by its id, and its source as spelled in rows."""

    id: str
    source_uri: str


@dataclass(frozen=True, slots=True)
class HashedNames:
    """Names of a record as hex digests: `uri_id` of each source, `sample_digest` and `row_digest` after that of their source."""

    sources: tuple[str, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()
    rows: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Takedown:
    """One record. `sources` and `samples` as spelled in receipts."""

    key: str
    created: str  # UTC, ISO 8601
    reason: str
    sources: tuple[str, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()  # (uri, key)
    rows: tuple[TakenRow, ...] = ()
    by: str = ""  # who asked for it
    hashed: HashedNames = HashedNames()  # in place of names that were removed
    deleted: tuple[str, ...] = ()  # keys of data files that were deleted because takedowns hide all their rows
    names_removed: str | None = None  # when names were replaced by hashes: UTC, ISO 8601

    def to_json(self) -> bytes:
        """Canonical JSON bytes, without the key."""
        values = {name: value for name, value in asdict(self).items() if name != "key"}
        return json.dumps({"format_version": FORMAT_VERSIONS[-1], **values}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, key: str, data: bytes) -> Takedown:
        """Inverse of `to_json`; also reads version 1.

        Raises:
            ValueError, KeyError, TypeError: not a takedown, or one of another format version.
        """
        raw: Any = json.loads(data)
        if not isinstance(raw, dict) or not all(
            isinstance(raw.get(name), list) for name in ("sources", "samples", "rows")
        ):
            raise ValueError("expected a JSON object with the lists sources, samples and rows")
        if raw["format_version"] not in FORMAT_VERSIONS:
            raise ValueError(f"format version {raw['format_version']!r}, this Lathe reads 1 and 2")
        samples, rows = raw["samples"], raw["rows"]
        if not _are_texts([raw["created"], raw["reason"], *raw["sources"]]):
            raise ValueError("created, reason and sources have to be strings")
        if not _are_pairs(samples):
            raise ValueError("samples have to be pairs of strings, the URI of the source and the key")
        if not all(isinstance(row, dict) and set(row) == ROW and _are_texts(row.values()) for row in rows):
            raise ValueError("rows have to be objects with the strings id and source_uri")
        pairs = tuple((uri, name) for uri, name in samples)
        found = tuple(TakenRow(**row) for row in rows)
        made = cls(key, raw["created"], raw["reason"], tuple(raw["sources"]), pairs, found)
        return made if raw["format_version"] == 1 else replace(made, **_second_version(raw))

    def uri_ids(self) -> set[bytes]:
        """`uri_id` of every source that the record names, also of samples and rows."""
        named = {*self.sources, *(uri for uri, _ in self.samples), *(row.source_uri for row in self.rows)}
        hashed = {*self.hashed.sources, *(uri for uri, _ in (*self.hashed.samples, *self.hashed.rows))}
        return {*map(uri_id, named), *map(bytes.fromhex, hashed)}

    def without_names(self, when: str) -> Takedown:
        """The same record with hashes in place of names. It hides the same rows."""
        names = HashedNames(
            tuple(uri_id(uri).hex() for uri in self.sources),
            tuple((uri_id(uri).hex(), sample_digest(uri, name)) for uri, name in self.samples),
            tuple((uri_id(row.source_uri).hex(), row_digest(row.id)) for row in self.rows),
        )
        return replace(self, sources=(), samples=(), rows=(), hashed=names, names_removed=when)


def sample_digest(uri: str, name: str) -> str:
    """Hex BLAKE2b-128 of a sample: the URI of its source and its key, each as in rows."""
    return hashlib.blake2b(f"{storable(uri)}\0{storable(name)}".encode(), digest_size=NAME_BYTES).hexdigest()


def row_digest(name: str) -> str:
    """Hex BLAKE2b-128 of the id of a row, the same for all variants of its clip."""
    return hashlib.blake2b(split_id(name)[0].encode(), digest_size=NAME_BYTES).hexdigest()


def _second_version(raw: dict[str, Any]) -> dict[str, Any]:
    hashed, removed = raw["hashed"], raw["names_removed"]
    if not isinstance(hashed, dict) or set(hashed) != {"sources", "samples", "rows"}:
        raise ValueError("hashed has to be an object with the lists sources, samples and rows")
    if not all(_are_digests([uri], URI_BYTES) for uri in hashed["sources"]) or not all(
        _are_pairs(hashed[name]) and all(_are_digests([uri], URI_BYTES) for uri, _ in hashed[name])
        for name in ("samples", "rows")
    ):
        raise ValueError("hashed names have to be hex digests, those of samples and rows after that of their source")
    if not isinstance(raw["deleted"], list) or not _are_texts([raw["by"], *raw["deleted"]]):
        raise ValueError("by and deleted have to be strings")
    if removed is not None and not isinstance(removed, str):
        raise ValueError("names_removed has to be a time or null")
    pairs = {name: tuple((uri, digest) for uri, digest in hashed[name]) for name in ("samples", "rows")}
    names = HashedNames(tuple(hashed["sources"]), **pairs)
    return {"by": raw["by"], "hashed": names, "deleted": tuple(raw["deleted"]), "names_removed": removed}


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _are_pairs(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(item, list) and len(item) == 2 and _are_texts(item) for item in values
    )


def _are_digests(values: Iterable[Any], num_bytes: int) -> bool:
    try:
        return all(isinstance(value, str) and len(bytes.fromhex(value)) == num_bytes for value in values)
    except ValueError:
        return False
