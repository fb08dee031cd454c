"""Plain files that are paired videos: taken out of the inputs and put beside the main video of their sample, as part of its identity.

A member is found among the inputs, or looked up beside its main video: a table, or a name, may list the main video alone. A member without
a main video stays an input, which the reader rejects.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.corpus.kinds import media_kind
from pipeline.records import MAIN, MISSING, MemberObject, stable_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.records import MemberRule, Shard, SourceObject


def with_members(
    sources: list[SourceObject], rule: MemberRule, existing: Callable[[list[str]], dict[str, SourceObject]]
) -> list[SourceObject]:
    """`sources` without members of others of them. `existing`: the objects that are there, of some URIs."""
    mains: dict[str, SourceObject] = {}
    members: dict[str, dict[str, SourceObject]] = {}
    for source in sources:
        if media_kind(source.uri) != "video":
            continue
        stem, name = rule.place(source.uri, os.path.splitext(source.uri)[0]) or ("", "")
        if name == MAIN:
            mains.setdefault(stem, source)
        elif name:
            members.setdefault(stem, {}).setdefault(name, source)
    unlisted = {
        f"{stem}.{suffix}": (stem, name)
        for stem, source in mains.items()
        for name, suffix in rule.others
        if source.etag != MISSING and name not in members.get(stem, {})
    }
    for uri, source in existing(list(unlisted)).items():
        stem, name = unlisted[uri]
        members.setdefault(stem, {})[name] = source
    of_main = {main.uri: members.get(stem, {}) for stem, main in mains.items()}
    taken = {member.uri for found in of_main.values() for member in found.values()}
    return [
        replace(source, members=_objects(of_main.get(source.uri, {}))) for source in sources if source.uri not in taken
    ]


def _objects(found: dict[str, SourceObject]) -> tuple[MemberObject, ...]:
    return tuple(MemberObject(name, item.uri, item.size, item.etag) for name, item in sorted(found.items()))


def identified(shards: Iterable[Shard]) -> list[Shard]:
    """The shards, with members as part of what decides the rows of their objects: a changed member encodes its sample again."""
    return [replace(shard, objects=tuple(map(_identified, shard.objects))) for shard in shards]


def _identified(source: SourceObject) -> SourceObject:
    if not source.members:
        return source
    facts = [[member.name, member.size, member.etag] for member in source.members]
    return replace(source, annotations=stable_hash([source.annotations, facts]))
