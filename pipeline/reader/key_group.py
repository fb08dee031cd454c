"""Members of one key of a tar: its videos or images, texts and what a cut archive cost it. Part of the reader."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.reader.member_names import CAPTION, IMAGES, TEXT_EXTENSIONS, caption_stem
from pipeline.reader.pairing import Pair, pairs_of
from pipeline.reader.texts import Caption, Metadata, distinct
from pipeline.records import MemberRule, named_caption

if TYPE_CHECKING:
    from pipeline.reader.member_names import MemberName
    from pipeline.records import Sample

GROUP_BYTES = 200  # memory of an empty group

Fault = tuple[str, str, bool]  # reason, message, policy


@dataclass(slots=True)
class Video:
    """A video or image member: its contents, or why they cannot be read."""

    name: MemberName
    contents: bytes | str | None = field(repr=False)
    num_bytes: int = 0  # in memory or in a file
    span: tuple[int, int] | None = None  # first byte and size in the object; None if compressed or sparse
    fault: Fault | None = None
    index: int = 0
    repeated: bool = False  # a second video had the same name: later texts belong to that one

    def place(self, rule: MemberRule) -> tuple[str, str] | None:
        """Sample and name that the rule gives it."""
        return rule.place(self.name.path, self.name.stem)


@dataclass(slots=True)
class Group:
    """The members of one key read so far. A stem is a path without its last extension."""

    key: str
    index: int
    rule: MemberRule = field(default_factory=MemberRule)  # for paired videos
    again: bool = False  # samples of this key were emitted before
    videos: dict[str, Video] = field(default_factory=dict)  # by stem
    stems: set[str] = field(default_factory=set)  # of all videos, including emitted ones
    bases: set[str] = field(default_factory=set)  # paths of all samples of paired videos, including emitted ones
    texts: dict[tuple[str, str], Caption | Metadata] = field(default_factory=dict)  # by stem and extension
    named: dict[str, list[str]] = field(default_factory=dict)  # stem of a video -> stems of captions with a name
    used: set[tuple[str, str]] = field(default_factory=set)  # texts that a sample has
    fields: dict[str, None] = field(default_factory=dict)  # parts of names behind the key, for messages
    extensions: dict[str, set[str]] = field(default_factory=dict)  # by stem
    all_extensions: set[str] = field(default_factory=set)
    stem: str = ""  # of the last member
    of_images: bool = False  # `videos` are images: the key has no video so far
    beside_damage: bool = False  # next to a broken header, so members may be lost
    unnamed: bool = False  # a video that the rule does not name was rejected
    held_bytes: int = GROUP_BYTES

    @property
    def complete(self) -> bool:
        """Whether no more members are expected: every video has a text, and its key is certain. Of a pair the main one has a text."""
        if self.rule and not self.of_images:
            pairs = self.pairs
            whole = all(pair.whole(self.rule) and pair.fault(self.rule) is None for pair in pairs)
            return bool(pairs) and whole and all(pair.main and self.texts_of(pair.main) for pair in pairs)
        lone = len(self.stems) == 1 and not self.again and self.key not in self.stems
        return bool(self.videos) and not lone and all(self.texts_of(video) for video in self.videos.values())

    @property
    def pairs(self) -> list[Pair]:
        """The videos as samples of paired ones."""
        return pairs_of(self.videos.values(), self.rule)

    @property
    def last_extensions(self) -> set[str]:
        """Extensions of the members of the sample read last."""
        return self.extensions.get(self.stem, set()) if len(self.stems) > 1 else self.all_extensions

    def texts_of(self, video: Video) -> list[tuple[str, str]]:
        """Texts of a video, captions first: its own, then those of the key if they cannot belong to another video."""
        stems = [video.name.stem]
        if not self.again and self.key not in self.stems:
            stems.append(self.key)
        names = [
            (name, extension)
            for stem in stems
            for name, extension in ((caption_stem(stem), "txt"), (stem, "caption"), (f"{stem}.caption", "txt"))
            if name in {stem, caption_stem(stem)} or name not in self.stems
        ]
        own = video.name.stem
        names += [(stem, "txt") for stem in self.named.get(own, ()) if stem not in self.stems]
        return [name for name in (*names, *((stem, "json") for stem in stems)) if name in self.texts]

    def captions_of(self, video: Video, names: list[tuple[str, str]]) -> list[Caption]:
        """Captions among these texts of a video, with their names: `txt`, `caption`, or that of `a.short.txt`."""
        found = []
        for stem, extension in names:
            text, named = self.texts[stem, extension], named_caption(stem)
            if isinstance(text, Caption):
                other = "caption" if stem.endswith(CAPTION) else extension
                found.append(replace(text, name=named[1] if named and named[0] == video.name.stem else other))
        return found

    def cut(self, member: MemberName | None, expected: set[str]) -> list[Video] | None:
        """Videos that an early end of the archive, inside `member` or between members, cost bytes or texts; None if the key is complete.

        `expected`: extensions that a sample of this archive has.
        """
        if member is not None and member.is_encoded:
            held = self.videos.get(member.stem)
            is_cut = held is not None and held.name.path == member.path and held.fault is not None
            return [held] if held is not None and is_cut and held.fault and held.fault[0] == "truncated_shard" else None
        if member is not None and member.extension in TEXT_EXTENSIONS:
            if (member.stem, member.extension) in self.texts:
                return None
            stem = member.stem.removesuffix(".caption")
            own = self.videos.get(stem)
            if own is not None or stem != self.key:
                return [own] if own is not None else None if self.stems else []
            return [video for video in self.videos.values() if not self._has_own_text(video)]
        held = self.videos.get(self.stem) or next(iter(self.videos.values()), None)
        whole = self.stem in self.videos or len(self.videos) == 1
        if whole and self.last_extensions >= expected:
            return None
        if member is not None and held is not None and self.texts_of(held):
            return None  # a field that is not read is cut, behind the texts
        if len(self.videos) < 2 and (self.stem in {self.key, *self.videos} or not self.videos):
            return list(self.videos.values())
        video = self.videos.get(self.stem)
        return None if video is None else [video]

    def _has_own_text(self, video: Video) -> bool:
        return video.name.stem != self.key and any(stem == video.name.stem for stem, _ in self.texts_of(video))

    def no_video(self) -> Fault:
        """Why a group without a video is rejected.

        video2dataset writes caption and metadata of failed downloads too: that is policy, not damage, unless a header broke nearby.
        """
        found = ", ".join(sorted(self.fields)) or "nothing readable"
        if self.all_extensions & IMAGES:
            found += " (images are encoded with --images keep)"
        if self.beside_damage:
            return "corrupt_header", f"no video beside a broken tar header; found {found}", False
        values = next((text.values for text in self.texts.values() if isinstance(text, Metadata)), {})
        causes = [f"{name}: {values[name]}" for name in ("status", "error_message") if values.get(name)]
        return "no_video", "; ".join([f"no video, only {found}", *causes])[:500], True


def sample_of(bare: Sample, captions: list[Caption], metadata: Metadata) -> Sample:
    """`bare` with its texts: all captions, of which the first that is not empty is `caption`, and metadata, with the warnings of all."""
    first = [caption for caption in captions if caption.name in TEXT_EXTENSIONS]
    everything = (*first, *metadata.captions, *(caption for caption in captions if caption not in first))
    named = distinct(everything)
    warnings = [warning for caption in everything for warning in caption.warnings]
    unique = tuple(dict.fromkeys([*warnings, *metadata.warnings]))
    caption = named[0][1] if named else None
    return replace(bare, caption=caption, captions=named, metadata=metadata.values, warnings=unique)
