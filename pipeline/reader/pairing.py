"""Pairing of videos: which of a tar's key, or which plain file with its members, are one sample, as the job's `members` say.

Takes the videos of a `Group` with the `MemberRule`; gives `Pair`s in the order of their first videos. A video of an incomplete pair is not
encoded: each pair that lacks its main video or a member is one reject. A video without any member is a sample if the rule says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.records import MAIN, MemberVideo

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

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

    def whole(self, rule: MemberRule) -> bool:
        """Whether all videos are there."""
        return len(self.videos) == 1 + len(rule.others)

    def fault(self, rule: MemberRule) -> Fault | None:
        """Why the pair cannot be encoded; None if all its videos are there and can be read, or it is an unpaired video that may be."""
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
        return missing(self.main.name.path, self.stem, self.videos, rule)

    def is_cut(self, rule: MemberRule, lost: list[Video]) -> bool:
        """Whether an early end of the archive, which cost these videos, cost it a video or texts."""
        if not self.whole(rule) or self.fault(rule) is not None:
            return True
        return any(video is other for video in self.videos.values() for other in lost)

    def members(self, rule: MemberRule) -> tuple[MemberVideo, ...]:
        """All but the main video, in the order of their names. Call it where there is no `fault`."""
        others = [(name, self.videos[name]) for name in rule.names if name in self.videos]
        return tuple(MemberVideo(name, item.contents or b"", item.name.path) for name, item in others)


def missing(main: str, stem: str, there: Container[str], rule: MemberRule) -> Fault | None:
    """Fault of a main video of which only these members are there. One without any is a video of another kind, not a broken pair."""
    lacking = [f"{name} ({stem}.{suffix})" for name, suffix in rule.others if name not in there]
    none_there = len(lacking) == len(rule.others)
    if not lacking or (none_there and rule.unpaired):
        return None
    if none_there:
        message = f"{main} has no {', no '.join(lacking)}; set unpaired to encode, which takes videos without members"
        return "no_members", message, True
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
    if (fault := missing(path, stem, there, rule)) is not None:
        return fault
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
