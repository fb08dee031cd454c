"""Rows of annotation tables about the objects of a shard, as one value that travels with the shard to its reader.

A row is `uri, key, text`: the object, the sample in it (empty for a plain video), and its columns as a JSON object. A record is these as
ASCII bytes without line breaks.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FAST = 1  # level of zlib: rows are packed while encoders wait for shards


class AnnotationRow(NamedTuple):
    """A row about one sample."""

    uri: str
    key: str
    text: bytes  # a JSON object


def record_start(uri: str) -> bytes:
    """The bytes with which every record about this object begins."""
    return json.dumps(uri).encode() + b"\0"


def record(row: AnnotationRow) -> bytes:
    """The row as a record."""
    return record_start(row.uri) + json.dumps(row.key).encode() + b"\0" + row.text


def packed(records: Iterable[bytes]) -> bytes:
    """Records as `Shard.rows`; empty if there is none."""
    joined = b"\n".join(records)
    return zlib.compress(joined, FAST) if joined else b""


def unpacked(rows: bytes) -> Iterator[AnnotationRow]:
    """The rows of `Shard.rows`."""
    for line in zlib.decompress(rows).split(b"\n") if rows else ():
        uri, key, text = line.split(b"\0", 2)
        yield AnnotationRow(json.loads(uri), json.loads(key), text)
