"""Addresses of outputs as users write them: `OUTPUT`, or `OUTPUT@N` for its snapshot N.

Names may hold `@` themselves. One rule for all commands: what ends in `@` and digits is a snapshot to commands that read, unless a folder
of that very name exists; if both do, it is an error that names both. Commands that write to an output refuse such a name. A name that
ends in `/` is always a folder.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, InputError, LatheError, StorageUnavailable
from pipeline.format.layout import SET_KEYS
from pipeline.ledger.snapshots import split_number
from pipeline.storage import open_store

if TYPE_CHECKING:
    from pipeline.config import StorageConfig
    from pipeline.storage import Store

_NO_NUMBER = re.compile(r"(?P<output>.+)@(?P<word>[^@/]*)")


def open_output(address: str, config: StorageConfig) -> tuple[Store, int | None]:
    """Store and snapshot number of `OUTPUT[@N]`; no number: None.

    Raises:
        InputError: a folder and a snapshot of this name, or no number after `@`.
    """
    root, number = split_number(address)
    if number is not None:
        if not _holds_objects(address, config):
            return open_store(root, config), number
        if _is_output(root, config):
            raise InputError(
                f"{address} is a folder, and {root} is an output that may have a snapshot {number}; write {address}/ for the "
                f"folder, {root.rstrip('/')}/@{number} for the snapshot"
            )
        return open_store(address, config), None
    match = _NO_NUMBER.fullmatch(address)
    if match is not None and not _holds_objects(address, config) and _is_output(match["output"], config):
        raise InputError(
            f"{address}: expected the number of a snapshot after @, got {match['word']!r}; without @N the newest is taken. "
            f"`lathe snapshots {match['output']}` lists them"
        )
    return open_store(address, config), None


def check_whole_output(address: str) -> str:
    """Returns `address` if it may name an output that is written to.

    Raises:
        ConfigError: it ends in `@` and digits.
    """
    root, number = split_number(address)
    if number is not None:
        raise ConfigError(
            f"{address}: this command writes to a whole output, and @{number} names a snapshot of {root}; write {root} for the "
            f"output, or {address}/ for a folder of that name"
        )
    return address


def _holds_objects(address: str, config: StorageConfig) -> bool:
    try:
        return next(open_store(address, config).list(""), None) is not None
    except StorageUnavailable:
        raise
    except LatheError:  # not the name of a bucket, or nothing that may be listed
        return False


def _is_output(address: str, config: StorageConfig) -> bool:
    try:
        store = open_store(address, config)
        return any(store.exists(key) for key in SET_KEYS)
    except StorageUnavailable:
        raise
    except LatheError:
        return False
