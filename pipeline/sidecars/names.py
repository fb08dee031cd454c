"""Names of the objects of a sidecar set, and keys of its rows: plain functions, no I/O."""

from __future__ import annotations

import hashlib
import re

from pipeline.errors import ConfigError
from pipeline.format.layout import SIDECARS

KEY_BYTES = 16
BY_CAPTION, BY_ID = "caption_hash", "id"
"""What a row is found by; also the name of its column in data files."""
_SET = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_NUMBERED = re.compile(r"(?P<name>[^@]+)@(?P<number>[1-9][0-9]{0,17})")


def check_set_name(name: str) -> str:
    """Returns `name` if a set may have it.

    Raises:
        ConfigError: it does not match `[a-z0-9][a-z0-9_.-]*` of at most 64 characters, or ends as the object of another set does.
    """
    if not isinstance(name, str) or not _SET.fullmatch(name) or name.endswith(".json"):
        raise ConfigError(
            f"sidecar set {name!r}: expected a name of a-z, 0-9, '_', '-' and '.', at most 64 characters, not ending in .json"
        )
    return name


def split_version(text: str) -> tuple[str, int | None]:
    """`t5@3` -> (`t5`, 3); `t5` -> (`t5`, None).

    Raises:
        ConfigError: not the name of a set, or no number after `@`.
    """
    match = _NUMBERED.fullmatch(text) if isinstance(text, str) else None
    return (check_set_name(match["name"]), int(match["number"])) if match else (check_set_name(text), None)


def set_key(name: str) -> str:
    """Key of the set object."""
    return f"{SIDECARS}{name}.json"


def set_of_key(key: str) -> str | None:
    """Inverse of `set_key`; None if `key` is not the key of a set object."""
    match = re.fullmatch(rf"{SIDECARS}([^/]+)\.json", key)
    return None if match is None else match[1]


def data_prefix(name: str) -> str:
    """What the keys of all data files and indexes of a set begin with."""
    return f"{SIDECARS}{name}/data/"


def data_key(name: str, unit: str, attempt: str) -> str:
    """Key of the data file that an attempt at a unit writes: no two attempts share one."""
    return f"{data_prefix(name)}{unit[:16]}-{attempt}.sidecar"


def index_key(data: str) -> str:
    """Key of the index of a data file."""
    return f"{data.removesuffix('.sidecar')}.idx"


def receipts_prefix(name: str) -> str:
    """What the keys of all receipts of a set begin with."""
    return f"{SIDECARS}{name}/receipts/"


def receipt_key(name: str, unit: str, attempt: str | None = None) -> str:
    """Key of the receipt of a unit; with `attempt`, its key on stores that cannot refuse a second writer."""
    return f"{receipts_prefix(name)}{unit}{'' if attempt is None else f'--{attempt}'}.json"


def unit_of_receipt(name: str, key: str) -> str | None:
    """Unit of a receipt's key; None if `key` is not one."""
    match = re.fullmatch(rf"{re.escape(receipts_prefix(name))}([0-9a-f]{{32}})(?:--[0-9a-f]+)?\.json", key)
    return None if match is None else match[1]


def versions_prefix(name: str) -> str:
    """What the keys of all versions of a set begin with."""
    return f"{SIDECARS}{name}/versions/"


def version_key(name: str, number: int) -> str:
    """Key of the record of a version."""
    return f"{versions_prefix(name)}{number}.json"


def version_of_key(name: str, key: str) -> int | None:
    """Inverse of `version_key`; None if `key` is not the key of a version."""
    match = re.fullmatch(rf"{re.escape(versions_prefix(name))}([1-9]\d*)\.json", key)
    return None if match is None else int(match[1])


def table_key(name: str, number: int, sha256: str) -> str:
    """Key of the table of files of a version."""
    return f"{versions_prefix(name)}{number}/files-{sha256[:16]}.idx"


def encodable(text: str) -> str:
    """`text` without halves of surrogate pairs, which UTF-8 does not have: each becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


def key_of(text: str) -> bytes:
    """Key of a row: BLAKE2b-128 of the UTF-8 bytes of a caption or of an id."""
    return hashlib.blake2b(encodable(text).encode(), digest_size=KEY_BYTES).digest()


def unit_of(fingerprint: str, keys: list[bytes]) -> str:
    """Id of a unit of work, 32 hex digits: its fingerprint and the keys of its rows, in any order."""
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for key in sorted(keys):
        digest.update(key)
    return digest.hexdigest()
