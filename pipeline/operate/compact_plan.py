"""Which data files of a snapshot `lathe compact` rewrites together: plain rows of the manifest in, groups out. No I/O.

Files of one group have one fingerprint, bucket and container, and rows all with or all without paired videos; they become one file. A file
is rewritten if it has rows that do not count, or if it is small and others of its kind are small too. "Small" is less than half of the
target: what is written once stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

Kind = tuple[str, str, str, bool]
"""Fingerprint, bucket, suffix of the container, whether the rows are without paired videos that others of their build have."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of `manifest.FILES` that become one file, by key."""

    fingerprint: str
    bucket: str
    suffix: str  # `.parquet` or `.tar`
    files: tuple[dict[str, Any], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""
        return sum(file["bytes"] for file in self.files)


def plan(
    files: Iterable[dict[str, Any]],
    target_bytes: int,
    *,
    merge: bool = True,
) -> list[Group]:
    """Groups of at most about `target_bytes` each, none of which would only copy one file.

    Args:
        files: rows of the manifest.
        target_bytes: size of the files that are written; one that is larger already and has rows that do not count stays larger.
        merge: whether small files of which all rows count are merged.
    """
    kinds: dict[Kind, list[dict[str, Any]]] = {}
    for file in files:
        drops = bool(file["hidden"])
        small = merge and not file["hidden"] and file["bytes"] < target_bytes / 2
        if drops or small:
            suffix = f".{file['key'].rpartition('.')[2]}"
            without = any(low is False for low, _ in json.loads(file["ranges"]).values())
            kinds.setdefault((file["fingerprint"], file["bucket"], suffix, without), []).append(file)
    return [Group(*kind[:3], tuple(part)) for kind in sorted(kinds) for part in _filled(kinds[kind], target_bytes)]


def _filled(files: list[dict[str, Any]], target_bytes: int) -> list[list[dict[str, Any]]]:
    """Large files first: the last of them takes small ones, and all later groups but one are at least half full."""
    ordered = sorted(files, key=lambda file: (_remaining(file) < target_bytes / 2, file["key"]))
    parts: list[list[dict[str, Any]]] = []
    held = 0.0
    for file in ordered:
        size = _remaining(file)
        if not parts or held + size > target_bytes:
            parts.append([])
            held = 0.0
        parts[-1].append(file)
        held += size
    return [part for part in parts if len(part) > 1 or part[0]["hidden"]]


def _remaining(file: dict[str, Any]) -> float:
    """About the bytes of the rows that count."""
    return float(file["bytes"] * file["rows"] / max(file["file_rows"], 1))
