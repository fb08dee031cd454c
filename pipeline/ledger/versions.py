"""Versions of inputs that count in a published snapshot, chosen from summaries of receipts. No I/O, no clock.

An input is a URI within one fingerprint; a version of it is the receipt that owns its rows (`overlaps.Overlaps.owner`). The rule:

1. The version of the newest receipt of the URI. An `unchanged` receipt has the older version whose bytes it found again.
2. A different choice of an earlier snapshot stays, until a newer receipt names the URI.
3. With a listing of the inputs: the version that is listed, if a receipt has it. URIs that are not listed follow `drop_missing`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.ledger.summaries import source_id, uri_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from pipeline.ledger.overlaps import Overlaps
    from pipeline.ledger.summaries import ReceiptSummary
    from pipeline.records import SourceObject

Choice = str | None
"""Shard id of the receipt whose version counts; None: the input is dropped."""
Versions = dict[str, dict[bytes, Choice]]
"""By fingerprint, then by `uri_id`."""


@dataclass(slots=True)
class InputChanges:
    """Changes of inputs since the parent, counted by (fingerprint, URI)."""

    added: int = 0
    replaced: int = 0
    removed: int = 0


@dataclass(slots=True)
class Selection:
    """Versions that count, their differences from rule 1, and listed sources without a receipt."""

    versions: Versions
    choices: Versions  # entries of `versions` that rule 1 alone would not give
    changes: InputChanges
    open_sources: list[SourceObject] = field(default_factory=list)


def owned(overlaps: Overlaps, items: Iterable[ReceiptSummary]) -> Iterator[tuple[str, bytes, bytes, str]]:
    """(fingerprint, `source_id`, `uri_id`, shard id of the owner) of every source of these receipts, retries left out."""
    for item in items:
        if item.retry is not None:
            continue
        if item.same_as is None:
            for position, (source, uri) in enumerate(zip(item.source_ids(), item.uri_ids(), strict=True)):
                yield item.fingerprint, source, uri, overlaps.owner(item, position).shard_id
            continue
        places: dict[str, dict[bytes, int]] = {}
        for source, uri, target in zip(item.source_ids(), item.uri_ids(), json.loads(item.same_as), strict=True):
            older = overlaps.by_shard.get(target)
            if older is None:  # the receipt does not exist any more
                continue
            place = places.setdefault(target, older.positions()).get(uri)
            if place is not None:
                yield item.fingerprint, source, uri, overlaps.owner(older, place).shard_id


def select_versions(
    overlaps: Overlaps,
    covered: Collection[str],
    before: Versions,
    listing: Iterable[SourceObject] | None = None,
    *,
    drop_missing: bool = False,
) -> Selection:
    """Applies the rule of the module.

    Args:
        overlaps: of all receipts that may be published.
        covered: ids of shards that the parent snapshot covers.
        before: `choices` of the parent.
        listing: the present inputs; None: unknown.
        drop_missing: whether inputs that are not listed are dropped.
    """
    newest: Versions = {}
    past: Versions = {}  # versions in the parent, of URIs that newer receipts name
    renewed: dict[str, set[bytes]] = {}
    for fingerprint, _, uri, shard in owned(overlaps, overlaps.by_shard.values()):
        newest.setdefault(fingerprint, {})[uri] = shard
    fresh = [item for item in overlaps.by_shard.values() if item.shard_id not in covered]
    for fingerprint, _, uri, _ in owned(overlaps, fresh if covered else ()):
        renewed.setdefault(fingerprint, set()).add(uri)
    if fresh and len(fresh) < len(overlaps.by_shard):
        older = [item for item in overlaps.by_shard.values() if item.shard_id in covered]
        for fingerprint, _, uri, shard in owned(overlaps, older):
            if uri in renewed.get(fingerprint, ()):
                past.setdefault(fingerprint, {})[uri] = shard
    versions: Versions = {}
    for fingerprint, found in newest.items():
        kept = before.get(fingerprint, {})
        still = {uri: shard for uri, shard in kept.items() if uri in found and uri not in renewed.get(fingerprint, ())}
        versions[fingerprint] = {**found, **still} if still else found
    for fingerprint, found in before.items():
        past.setdefault(fingerprint, {}).update(found)
    decided = versions
    open_sources: list[SourceObject] = []
    if listing is not None:
        decided, open_sources = _listed(overlaps, versions, listing, drop_missing=drop_missing)
    return Selection(
        versions=decided,
        choices={
            fingerprint: {uri: shard for uri, shard in found.items() if newest[fingerprint][uri] != shard}
            for fingerprint, found in decided.items()
        },
        changes=_changes(decided, newest, past, renewed if covered else None),
        open_sources=open_sources,
    )


def _listed(
    overlaps: Overlaps, versions: Versions, listing: Iterable[SourceObject], *, drop_missing: bool
) -> tuple[Versions, list[SourceObject]]:
    owners: dict[str, dict[bytes, str]] = {}
    for fingerprint, known_source, _, owner in owned(overlaps, overlaps.by_shard.values()):
        owners.setdefault(fingerprint, {})[known_source] = owner
    decided: Versions = {
        fingerprint: dict.fromkeys(found) if drop_missing else dict(found) for fingerprint, found in versions.items()
    }
    open_sources = []
    for source in listing:
        identity, uri = source_id(source), uri_id(source.uri)
        known = False
        for fingerprint, found in decided.items():
            shard = owners[fingerprint].get(identity)
            known = known or shard is not None
            if shard is not None:
                found[uri] = shard
            elif drop_missing and uri in found:  # listed, in a version that is not encoded yet
                found[uri] = versions[fingerprint][uri]
        if not known:
            open_sources.append(source)
    return decided, open_sources


def _changes(
    decided: Versions, newest: Versions, past: Versions, renewed: dict[str, set[bytes]] | None
) -> InputChanges:
    """Changes against the parent. `renewed`: None for a first snapshot, in which all inputs are new."""
    changes = InputChanges()
    for fingerprint, found in decided.items():
        earlier, new = past.get(fingerprint, {}), (renewed or {}).get(fingerprint, set())
        for uri, shard in found.items():
            known = renewed is not None and uri not in earlier and uri not in new
            was = newest[fingerprint][uri] if known else earlier.get(uri)
            if was == shard:
                continue
            if was is None:
                changes.added += 1
            elif shard is None:
                changes.removed += 1
            else:
                changes.replaced += 1
    return changes


def hide_other_versions(overlaps: Overlaps, versions: Versions) -> None:
    """Hides in `overlaps` every source that a receipt owns and whose URI counts in another version or not at all."""
    for item in overlaps.by_shard.values():
        if item.retry is not None or item.same_as is not None:
            continue
        decided = versions[item.fingerprint]
        for position, (source, uri) in enumerate(zip(item.source_ids(), item.uri_ids(), strict=True)):
            if decided[uri] != item.shard_id and overlaps.owner(item, position).shard_id == item.shard_id:
                overlaps.hide(item, source, uri)
