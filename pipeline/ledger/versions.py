"""Versions of inputs that count in a published snapshot, chosen from summaries of receipts. No I/O, no clock.

An input is a URI within one fingerprint; a version of it is the receipt that owns its rows (`overlaps.Overlaps.owner`). The rule:

1. The version of the newest receipt of the URI. An `unchanged` receipt has the older version whose bytes it found again.
2. A different choice of an earlier snapshot stays, until a newer receipt names the URI. Snapshots also hand on the choices of fingerprints
   that they leave out.
3. With a listing of the inputs: the version that is listed, if a receipt has it. URIs that are not listed follow `drop_missing`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pipeline.ledger.summary import source_id, uri_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from pipeline.ledger.overlaps import Overlaps
    from pipeline.ledger.summary import ReceiptSummary
    from pipeline.records import SourceObject

Choice = str | None
"""Shard id of the receipt whose version counts; None: the input is dropped."""
Versions = dict[str, dict[bytes, Choice]]
"""By fingerprint, then by `uri_id`."""


class Chosen(NamedTuple):
    """A choice that rule 1 alone would not give, and the newest receipt that named the URI then: it stays until there is a newer one."""

    shard: Choice
    named_by: str  # shard id


Choices = dict[str, dict[bytes, Chosen]]
"""By fingerprint, then by `uri_id`."""
Mentions = dict[str, set[bytes]]
"""`uri_id`s by fingerprint."""


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
    choices: Choices  # of entries of `versions` that rule 1 alone would not give, and of fingerprints that are left out
    changes: InputChanges
    open_sources: list[SourceObject] = field(default_factory=list)
    dropped: dict[str, dict[bytes, str]] = field(default_factory=dict)
    """Inputs that count no longer because this listing lacks them: by fingerprint and `uri_id`, the shard that had the rows."""


class Owned(NamedTuple):
    """A source that a receipt names."""

    fingerprint: str
    source: bytes  # `source_id`
    uri: bytes  # `uri_id`
    owner: str  # shard id of the receipt that has its rows
    named_by: str  # shard id of the receipt that names it


def owned(overlaps: Overlaps, items: Iterable[ReceiptSummary]) -> Iterator[Owned]:
    """Every source of these receipts, retries left out."""
    for item in items:
        if item.retry is not None:
            continue
        if item.same_as is None:
            for source, uri in zip(item.source_ids(), item.uri_ids(), strict=True):
                owner = overlaps.owner(item.fingerprint, source).shard_id
                yield Owned(item.fingerprint, source, uri, owner, item.shard_id)
            continue
        sources: dict[str, dict[bytes, bytes]] = {}
        for source, uri, target in zip(item.source_ids(), item.uri_ids(), json.loads(item.same_as), strict=True):
            older = overlaps.by_shard.get(target)
            if older is None:  # the receipt does not exist any more
                continue
            if target not in sources:
                sources[target] = older.source_of_uri()
            if (same := sources[target].get(uri)) is not None:
                owner = overlaps.owner(item.fingerprint, same).shard_id
                yield Owned(item.fingerprint, source, uri, owner, item.shard_id)


def select_versions(
    overlaps: Overlaps,
    covered: Collection[str] | None,
    before: Choices,
    listing: Iterable[SourceObject] | None = None,
    *,
    drop_missing: bool = False,
    current: str | None = None,
) -> Selection:
    """Applies the rule of the module.

    Args:
        overlaps: of all receipts that may be published.
        covered: ids of shards among them that the parent snapshot covers; None: there is no parent.
        before: `choices` of the parent.
        listing: the present inputs; None: unknown.
        drop_missing: whether inputs that are not listed are dropped.
        current: the fingerprint under which a listed input must be encoded, else it is open; None: any.
    """
    newest: Versions = {}
    named: dict[str, dict[bytes, str]] = {}
    for item in owned(overlaps, overlaps.by_shard.values()):
        newest.setdefault(item.fingerprint, {})[item.uri] = item.owner
        if item.uri in before.get(item.fingerprint, ()):
            named.setdefault(item.fingerprint, {})[item.uri] = item.named_by
    versions: Versions = {}
    for fingerprint, found in newest.items():
        kept, last = before.get(fingerprint, {}), named.get(fingerprint, {})
        still = {uri: chosen.shard for uri, chosen in kept.items() if chosen.named_by == last.get(uri)}
        versions[fingerprint] = {**found, **still} if still else found
    decided = versions
    open_sources: list[SourceObject] = []
    if listing is not None:
        decided, open_sources = _listed(overlaps, versions, listing, drop_missing=drop_missing, current=current)
    return Selection(
        versions=decided,
        choices=_choices(overlaps, decided, newest, before),
        changes=_changes(decided, newest, *_past(overlaps, covered, before)),
        open_sources=open_sources,
        dropped=_dropped(decided, versions),
    )


def _choices(overlaps: Overlaps, decided: Versions, newest: Versions, before: Choices) -> Choices:
    differing = {
        fingerprint: {uri: shard for uri, shard in found.items() if newest[fingerprint][uri] != shard}
        for fingerprint, found in decided.items()
    }
    named: dict[str, dict[bytes, str]] = {}
    for item in owned(overlaps, overlaps.by_shard.values() if any(differing.values()) else ()):
        if item.uri in differing[item.fingerprint]:
            named.setdefault(item.fingerprint, {})[item.uri] = item.named_by
    found: Choices = {
        fingerprint: {uri: Chosen(shard, named[fingerprint][uri]) for uri, shard in uris.items()}
        for fingerprint, uris in differing.items()
    }
    return {**{name: uris for name, uris in before.items() if name not in decided}, **found}


def _past(overlaps: Overlaps, covered: Collection[str] | None, before: Choices) -> tuple[Versions, Mentions | None]:
    """Versions in the parent of URIs that newer receipts or its choices name, and these URIs; no URIs if there is no parent."""
    if covered is None:
        return {}, None
    asked: Mentions = {fingerprint: set(found) for fingerprint, found in before.items()}
    items = overlaps.by_shard.values()
    for item in owned(overlaps, (each for each in items if each.shard_id not in covered)):
        asked.setdefault(item.fingerprint, set()).add(item.uri)
    past: Versions = {}
    for item in owned(overlaps, (each for each in items if each.shard_id in covered) if asked else ()):
        if item.uri in asked.get(item.fingerprint, ()):
            chosen = before.get(item.fingerprint, {}).get(item.uri)
            past.setdefault(item.fingerprint, {})[item.uri] = item.owner if chosen is None else chosen.shard
    return past, asked


def _listed(
    overlaps: Overlaps,
    versions: Versions,
    listing: Iterable[SourceObject],
    *,
    drop_missing: bool,
    current: str | None,
) -> tuple[Versions, list[SourceObject]]:
    owners: dict[str, dict[bytes, str]] = {}
    for item in owned(overlaps, overlaps.by_shard.values()):
        owners.setdefault(item.fingerprint, {})[item.source] = item.owner
    decided: Versions = {
        fingerprint: dict.fromkeys(found) if drop_missing else dict(found) for fingerprint, found in versions.items()
    }
    open_sources = []
    for source in listing:
        identity, uri = source_id(source), uri_id(source.uri)
        known = False
        for fingerprint, found in decided.items():
            shard = owners[fingerprint].get(identity)
            known = known or (shard is not None and current in (None, fingerprint))
            if shard is not None:
                found[uri] = shard
            elif drop_missing and uri in found:  # listed, in a version that is not encoded yet
                found[uri] = versions[fingerprint][uri]
        if not known:
            open_sources.append(source)
    return decided, open_sources


def _dropped(decided: Versions, versions: Versions) -> dict[str, dict[bytes, str]]:
    """Shards of inputs that would count, were they not dropped by this listing."""
    return {
        fingerprint: {
            uri: shard for uri, shard in versions[fingerprint].items() if shard is not None and found[uri] is None
        }
        for fingerprint, found in decided.items()
        if found is not versions[fingerprint]
    }


def _changes(decided: Versions, newest: Versions, past: Versions, asked: Mentions | None) -> InputChanges:
    """Changes against the parent. `past`, `asked`: see `_past`."""
    changes = InputChanges()
    for fingerprint, found in decided.items():
        earlier, uris = past.get(fingerprint, {}), (asked or {}).get(fingerprint, set())
        for uri, shard in found.items():
            # A URI that only covered receipts name and no choice was made of: as rule 1 says.
            was = earlier.get(uri) if asked is None or uri in uris else newest[fingerprint][uri]
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
        for source, uri in zip(item.source_ids(), item.uri_ids(), strict=True):
            if decided[uri] != item.shard_id and overlaps.owner(item.fingerprint, source).shard_id == item.shard_id:
                overlaps.hide(item, source, uri)
