"""Set object of an output, `_latentset.json`: its name, id and format version."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pipeline.errors import NotFound, OutputError
from pipeline.format.layout import CURRENT, LAYOUTS, Layout

if TYPE_CHECKING:
    from pipeline.storage import Store


@dataclass(frozen=True, slots=True)
class LatentSet:
    """Contents of the set object, and the layout of the output."""

    name: str
    uuid: str
    created: str  # UTC, ISO 8601
    layout: Layout


def read_latent_set(store: Store) -> LatentSet | None:
    """Contents of the set object; None if the output has none.

    Raises:
        OutputError: an output of a newer format version, or a foreign object of that name.
    """
    for layout in sorted(LAYOUTS.values(), key=lambda item: -item.version):
        try:
            data = store.read(layout.set_key)
        except NotFound:
            continue
        raw = _parsed(data, layout, store)
        return LatentSet(str(raw.get("name")), str(raw.get("uuid")), str(raw.get("created")), layout)
    return None


def find_layout(store: Store) -> Layout:
    """Names of the objects of the output at `store`. An empty output gets the current version.

    Raises:
        OutputError: as `read_latent_set`.
    """
    if (found := read_latent_set(store)) is not None:
        return found.layout
    return layout_by_names(store)


def layout_by_names(store: Store) -> Layout:
    """As `find_layout`, from the names of objects alone: works also if the set object is damaged, foreign or lost."""
    newest_first = sorted(LAYOUTS.values(), key=lambda item: -item.version)
    for layout in newest_first:
        if store.exists(layout.set_key):
            return layout
    for layout in newest_first:
        if layout != CURRENT and any(layout.receipt_name(info.key) for info in store.list(layout.receipts)):
            return layout
    return CURRENT


def create_latent_set(store: Store, name: str) -> LatentSet:
    """Latent set of the output; created if there is none.

    Raises:
        OutputError: as `read_latent_set`.
    """
    if (found := read_latent_set(store)) is not None:
        return found
    layout = find_layout(store)
    made = {
        "format": "latentset",
        "format_version": layout.version,
        "name": name,
        "uuid": str(uuid.uuid4()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.put_if_absent(layout.set_key, json.dumps(made, indent=1).encode())
    if (found := read_latent_set(store)) is None:  # written here, or by another run before
        raise OutputError(f"{layout.set_key} was written and cannot be read back", uri=store.uri(layout.set_key))
    return found


def _parsed(data: bytes, layout: Layout, store: Store) -> dict[str, Any]:
    key, uri = layout.set_key, store.uri(layout.set_key)
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise OutputError(
            f"{key} is not JSON ({error}); expected the file Lathe writes. Choose another output", uri=uri
        ) from None
    if not isinstance(raw, dict) or raw.get("format") != "latentset":
        found = f"keys {sorted(raw)[:8]}" if isinstance(raw, dict) else type(raw).__name__
        raise OutputError(f"{key} is not Lathe's: found {found}. Choose another output", uri=uri)
    if raw.get("format_version") != layout.version:
        raise OutputError(
            f"the output holds format version {raw.get('format_version')!r}, "
            f"this Lathe reads {min(LAYOUTS)} to {max(LAYOUTS)}. Choose another output or the Lathe that made it",
            uri=uri,
        )
    return raw
