"""Pairing of videos: which of a tar's key, or which plain file with its members, are one sample, as the job's `members` say.

Takes the videos of a `Group` with the `MemberRule`; gives `Pair`s in the order of their first videos. A video of an incomplete pair is not
encoded: each pair that lacks its main video or a member is one reject.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.records import MAIN, MemberVideo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.reader.key_group import Fault, Video
    from pipeline.records import MemberRule, SourceObject


@dataclass(slots=True)
class Pair:
    """The videos of one sample, by their names in the rule. `stem`: path that they have in common."""

    stem: str
    videos: dict[str, Video] = field(default_factory=dict)

    @property
    def main(self) -> Video | None:
        """The main video, if it is there."""
        return self.videos.get(MAIN)

    def fault(self, rule: MemberRule) -> Fault | None:
        """Why the pair cannot be encoded; None if all its videos are there and can be read."""
        for name, video in self.videos.items():
            if video.fault is not None:
                reason, message, policy = video.fault
                return reason, message if name == MAIN else f"{name}: {message}", policy
        if self.main is None:
            found = ", ".join(video.name.path for video in self.videos.values())
            wanted = f"{self.stem}.{rule.video}" if rule.video else f"a video {self.stem}"
            return (
                "missing_member",
                f"{wanted} is not beside {found}; pack the videos of a sample one after another",
                False,
            )
        lacking = [f"{name} ({self.stem}.{suffix})" for name, suffix in rule.others if name not in self.videos]
        return missing(self.main.name.path, lacking, rule) if lacking else None

    def is_cut(self, rule: MemberRule, lost: list[Video]) -> bool:
        """Whether an early end of the archive, which cost these videos, cost it a video or texts."""
        return self.fault(rule) is not None or any(video is other for video in self.videos.values() for other in lost)

    def members(self, rule: MemberRule) -> tuple[MemberVideo, ...]:
        """All but the main video, in the order of their names. Call it where there is no `fault`."""
        others = [(name, self.videos[name]) for name in rule.names]
        return tuple(MemberVideo(name, item.contents or b"", item.name.path) for name, item in others)


def missing(main: str, lacking: list[str], rule: MemberRule) -> Fault:
    """Fault of a main video without these members. One without any is a video of another kind, not a broken pair."""
    if len(lacking) == len(rule.others):
        return "no_members", f"{main} has no {', no '.join(lacking)}; encode it in a build without `members`", True
    return (
        "missing_member",
        f"{main} has no {', no '.join(lacking)}; take them out of `members`, or add the files",
        False,
    )


def pairs_of(videos: Iterable[Video], rule: MemberRule) -> list[Pair]:
    """Videos that the rule names as pairs."""
    found: dict[str, Pair] = {}
    for video in videos:
        if (place := video.place(rule)) is not None:
            found.setdefault(place[0], Pair(place[0])).videos[place[1]] = video
    return list(found.values())


def plain_fault(source: SourceObject, rule: MemberRule, most_bytes: int) -> Fault | None:
    """Why a plain video is not a sample: it is not a main video, or lacks a member, or has one that cannot be read."""
    path = source.uri.rpartition("/")[2]
    place = rule.place(path, os.path.splitext(path)[0])
    if place is None:
        return unnamed(path, rule)
    stem, name = place
    if name != MAIN:
        wanted = f"{stem}.{rule.video}" if rule.video else f"a video {stem}"
        return "missing_member", f"{path} is the {name} of {wanted}, which is not among the inputs", False
    there = {member.name: member for member in source.members}
    if lacking := [f"{name} ({stem}.{suffix})" for name, suffix in rule.others if name not in there]:
        return missing(path, lacking, rule)
    for member in source.members:
        if member.size == 0:
            return "empty_video", f"{member.name}: {member.uri} has no bytes", False
        if member.size > most_bytes:
            return "too_large", f"{member.name}: {member.uri} has {member.size} bytes, the limit is {most_bytes}", True
    return None


def unnamed(path: str, rule: MemberRule) -> Fault:
    """Fault of a video that the rule does not name."""
    named = ", ".join(filter(None, [rule.video, *(suffix for _, suffix in rule.others)]))
    message = f"{path} is none of the videos of a sample that `members` names: {named}; add it, or rename the file"
    return "unnamed_video", message, True
