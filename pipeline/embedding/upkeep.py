"""What sidecar sets an output has, and a check of every byte of one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError, NotFound
from pipeline.sidecars.description import read_set, set_names
from pipeline.sidecars.names import split_version
from pipeline.sidecars.versions import SetVersions

if TYPE_CHECKING:
    from pipeline.storage import Store

PIECE_BYTES = 8 * 1024 * 1024
NAMED = 100  # damaged files that are named


def list_sets(store: Store) -> list[dict[str, Any]]:
    """Every set: its tensors, settings, versions, and the newest version's counts, JSON-ready.

    Raises:
        OutputError: an object of a set that cannot be read.
    """
    found = []
    for name in set_names(store):
        described, versions = read_set(store, name), SetVersions(store, name)
        newest = versions.latest()
        found.append(
            {
                "name": name,
                "key": described.key,
                "tensors": {tensor: str(kind) for tensor, kind in described.tensors.items()},
                "fingerprint": described.fingerprint,
                "parts": described.parts,
                "created": described.created,
                "versions": versions.numbers(),
                "newest": None if newest is None else asdict(newest),
            }
        )
    return found


def verify_set(store: Store, name: str) -> dict[str, Any]:
    """Reads every file of a version (`t5`, `t5@3`) and compares hashes of files and indexes. JSON-ready; `damaged` names what differs.

    Raises:
        InputError: no such set or version.
        OutputError: an object of the set that cannot be read.
    """
    plain, number = split_version(name)
    versions = SetVersions(store, plain)
    version = versions.read(number)
    if version.fingerprint != (wanted := read_set(store, plain).fingerprint):
        raise InputError(
            f"version {version.number} of {plain} has the fingerprint {version.fingerprint}, the set {wanted}"
        )
    damaged: list[str] = []
    size = 0
    for row in versions.files(version).select(["key", "bytes", "sha256", "index_key", "index_sha256"]).to_pylist():
        size += row["bytes"]
        for key, sha256 in ((row["key"], row["sha256"]), (row["index_key"], row["index_sha256"])):
            if (problem := _problem(store, key, sha256)) is not None:
                damaged.append(f"{store.uri(key)} {problem}")
    return {
        "name": plain,
        "version": version.number,
        "files": version.files,
        "rows": version.rows,
        "bytes": size,
        "num_damaged": len(damaged),
        "damaged": damaged[:NAMED],
    }


def _problem(store: Store, key: str, sha256: str) -> str | None:
    """What is wrong with an object, or None."""
    try:
        info = store.stat(key)
        with store.open_stream(key, size=info.size, etag=info.etag) as stream:
            digest = hashlib.sha256()
            while piece := stream.read(PIECE_BYTES):
                digest.update(piece)
    except NotFound:
        return "is missing"
    return None if digest.hexdigest() == sha256 else f"has sha256 {digest.hexdigest()}, expected {sha256}"
