"""Members of a tar become samples: WebDataset's rules, and a sample or reject for every video.

In: named members with their contents, in archive order. Out: `Sample`s and `Reject`s, in the same order on every read.

- A key is the path up to the first dot of the file's name, as in WebDataset. Members of a key belong together.
- A key with one video is one sample of that key. Of several videos with different names (`yt.f137.mp4`, `yt.f248.mp4`) each is a sample
  whose key is its path without the extension, with the texts of that name, else those of the key if no video has just the key's name.
- Of several videos that differ only in the extension (`a.mp4`, `a.webm`) the best one is taken, the others are rejected as `extra_video`.
- A name that comes again is rejected as `duplicate_key`, and texts behind it are taken as the second one's.

A sample leaves when its key ends and it has a video and a caption or metadata. Others wait in a window bounded in bytes, because their
missing part, or another video of their key, may follow out of order.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.reader.member_names import TEXT_EXTENSIONS, caption_stem, preference
from pipeline.reader.texts import Caption, Metadata
from pipeline.records import Reject, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.reader.member_names import MemberName

MiB = 1024 * 1024
WINDOW_BYTES = 32 * MiB  # what may wait for its missing part
GROUP_BYTES = 200  # what an empty group costs
FIELDS_NAMED = 16
LATE = (
    "{name} comes after another video of that name or key was handed on; the first of each was taken. "
    "Pack the shard with every name once, sorted by name"
)

Fault = tuple[str, str, bool]  # reason, message, policy


@dataclass(slots=True)
class Video:
    """A video member: its contents, or why they cannot be had."""

    name: MemberName
    contents: bytes | str | None
    num_bytes: int = 0  # in memory or in a file: both are held
    span: tuple[int, int] | None = None  # where in the object its bytes lie, if they lie there as they are
    fault: Fault | None = None
    index: int = 0
    repeated: bool = False  # its name came again: texts from there on are the second one's


@dataclass(slots=True)
class Group:
    """What is known of one key so far. Stems are paths without the last extension."""

    key: str
    index: int
    again: bool = False  # samples of this key left before
    videos: dict[str, Video] = field(default_factory=dict)  # by stem
    stems: set[str] = field(default_factory=set)  # of all videos, of those that left too
    texts: dict[tuple[str, str], Caption | Metadata] = field(default_factory=dict)  # by stem and extension
    used: set[tuple[str, str]] = field(default_factory=set)  # texts that a sample has
    fields: dict[str, None] = field(default_factory=dict)  # what follows the key, for messages
    extensions: dict[str, set[str]] = field(default_factory=dict)  # by stem
    all_extensions: set[str] = field(default_factory=set)
    stem: str = ""  # of the last member
    beside_damage: bool = False  # a broken header lay next to it, so that something of it may be lost
    held_bytes: int = GROUP_BYTES

    @property
    def complete(self) -> bool:
        """Nothing more is expected: every video has a text, and its key is certain."""
        lone = len(self.stems) == 1 and not self.again and self.key not in self.stems
        return bool(self.videos) and not lone and all(self.texts_of(video) for video in self.videos.values())

    def texts_of(self, video: Video) -> list[tuple[str, str]]:
        """Texts of a video, captions first: its own, then those of the key where they can only be meant for it."""
        stems = [video.name.stem]
        if not self.again and self.key not in self.stems:
            stems.append(self.key)
        names = [
            (name, extension)
            for stem in stems
            for name, extension in ((caption_stem(stem), "txt"), (stem, "caption"), (f"{stem}.caption", "txt"))
            if name in {stem, caption_stem(stem)} or name not in self.stems
        ]
        return [name for name in (*names, *((stem, "json") for stem in stems)) if name in self.texts]


class Grouper:
    """Feed it with `enter`, then fill the group it gives; `close_current` and `drain` give what is ready."""

    def __init__(self, uri: str, counters: dict[str, int]) -> None:
        self.current: Group | None = None
        self._uri = uri
        self._counters = counters
        self._waiting: dict[str, Group] = {}  # in order of their first member; the current one is among them
        self._waiting_bytes = 0
        self._left: set[str] = set()  # keys that are done
        self._taken: dict[str, str] = {}  # stems of videos that were handed on, each with its file name
        self._sample_keys: set[str] = set()
        self._without_video: dict[str, tuple[Reject, int]] = {}  # keys that left so, told at the end; number of texts
        self._count = 0
        self._last_extensions: set[str] = set()
        self._scattered = False  # a key came back: members are not adjacent here
        self._beside_damage = False

    def enter(self, name: MemberName) -> Iterator[Sample | Reject]:
        """A member follows: what is ready before it. Afterwards `current` is its group."""
        group = self.current
        if group is None or group.key != name.key:
            yield from self.close_current()
            group = self.current = self._open(name.key)
        elif name.stem != group.stem and group.held_bytes > WINDOW_BYTES:
            yield from self._relieve(group, name.stem)
        group.stem = name.stem
        if len(group.fields) < FIELDS_NAMED:
            group.fields[name.field] = None
        group.extensions.setdefault(name.stem, set()).add(name.extension)
        group.all_extensions.add(name.extension)

    def _open(self, key: str) -> Group:
        if (group := self._waiting.get(key)) is not None:
            self._scattered = True
            count(self._counters, "reopened_keys")
            self._waiting_bytes -= group.held_bytes
        else:
            group = Group(key, self._count, again=key in self._left, beside_damage=self._beside_damage)
            self._waiting[key] = group
            self._count += 1
        self._beside_damage = False
        return group

    # --- members of the current group ---------------------------------------------------------------------------------

    def refusal(self, name: MemberName) -> Reject | None:
        """Why a video is not even read, if so: a name that came before, or a better video of its stem is there."""
        group = self._group()
        if (taken := self._taken.get(name.stem)) is not None:
            return self._repeated(name) if taken == name.path else self._extra(name, taken)
        held = group.videos.get(name.stem)
        if held is None or held.fault is not None:
            return None
        if held.name.path == name.path:
            held.repeated = True
            return self._repeated(name)
        return self._extra(name, held.name.path) if _better(held, name) else None

    def add_video(self, video: Video) -> tuple[Video, Reject] | None:
        """Takes a video; of two with one stem the one that is let go, with its reject."""
        group, stem = self._group(), video.name.stem
        held = group.videos.get(stem)
        if group.again and not group.stems:
            self._late_video(group, stem)
        if held is not None and video.fault is not None and (held.fault is None or _better(held, video.name)):
            return video, self._faulty(video.name.path, video.fault)
        if held is not None:
            video.index = held.index
        elif group.stems or group.again:
            video.index = self._count
            self._count += 1
        else:
            video.index = group.index
        group.videos[stem] = video
        group.stems.add(stem)
        group.held_bytes += video.num_bytes + GROUP_BYTES
        if held is None:
            return None
        group.held_bytes -= held.num_bytes
        loss = (
            self._extra(held.name, video.name.path) if held.fault is None else self._faulty(held.name.path, held.fault)
        )
        return held, loss

    def _late_video(self, group: Group, stem: str) -> None:
        """The key left before: without a video, so that this is its first one, or with texts that could have been of this stem."""
        if (found := self._without_video.pop(group.key, None)) is not None:
            group.again = False
            self._left.discard(group.key)
            count(self._counters, "late_members", found[1])
        elif stem == group.key and stem not in self._sample_keys:
            count(self._counters, "late_members")

    def wants_text(self, name: MemberName) -> bool:
        """Whether a caption or json is the first of its name, and not behind the second video of that name."""
        group = self._group()
        video = group.videos.get(name.stem)
        return (name.stem, name.extension) not in group.texts and not (video is not None and video.repeated)

    def add_text(self, name: MemberName, text: Caption | Metadata, num_bytes: int) -> None:
        """Takes a caption or json."""
        group = self._group()
        group.texts[name.stem, name.extension] = text
        parsed = 4 if isinstance(text, Metadata) else 1  # objects take more than their spelling
        group.held_bytes += len(name.stem) + parsed * num_bytes

    def _group(self) -> Group:
        if self.current is None:
            raise ValueError("no member was entered")
        return self.current

    # --- what leaves --------------------------------------------------------------------------------------------------

    def close_current(self) -> Iterator[Sample | Reject]:
        """The key changes: the group leaves if it is complete, else it waits and may push others out."""
        group, self.current = self.current, None
        if group is None:
            return
        self._last_extensions = self._extensions(group)
        if not self._scattered and group.complete:  # in this order: the second looks at every video
            yield from self._leave(group)
            return
        self._waiting_bytes += group.held_bytes
        while self._waiting_bytes > WINDOW_BYTES:
            oldest = next(iter(self._waiting.values()))
            self._waiting_bytes -= oldest.held_bytes
            yield from self._leave(oldest)

    def damaged(self) -> None:
        """A broken header was met: the groups on both sides of it may have lost something."""
        self._beside_damage = True
        if self.current is not None:
            self.current.beside_damage = True

    def cut_short(self, message: str, *, member: MemberName | None) -> Iterator[Sample | Reject]:
        """The archive ended early, inside `member` of the current key or between members: a reject of each video that lost something.

        Without such a video, or when it is not certain that one did, the reject has no key.
        """
        group = self.current
        lost = None if group is None else self._lost(group, member)
        if group is None or not (lost or (lost is not None and not group.stems and not group.again)):
            yield self._cut(None, message)
            return
        if not lost:  # texts alone
            self.current = None
            del self._waiting[group.key]
            yield self._cut(group.key, message)
        for video in lost or ():
            del group.videos[video.name.stem]
            yield self._cut(video.name.stem if group.again or len(group.stems) > 1 else group.key, message)

    def _lost(self, group: Group, member: MemberName | None) -> list[Video] | None:
        """Videos of the current key whose own bytes or texts are cut, or may follow behind the cut. None if the key is whole."""
        if member is not None and member.is_video:
            held = group.videos.get(member.stem)
            cut = held is not None and held.name.path == member.path and held.fault is not None
            return [held] if held is not None and cut and held.fault and held.fault[0] == "truncated_shard" else None
        if member is not None and member.extension in TEXT_EXTENSIONS:
            if (member.stem, member.extension) in group.texts:
                return None
            stem = member.stem.removesuffix(".caption")
            own = group.videos.get(stem)
            if own is not None or stem != group.key:
                return [own] if own is not None else None if group.stems else []
            return [video for video in group.videos.values() if not self._own_text(group, video)]
        expected = self._last_extensions or {"txt", "json"}
        held = group.videos.get(group.stem) or next(iter(group.videos.values()), None)
        whole = group.stem in group.videos or len(group.videos) == 1
        if whole and self._extensions(group) >= expected:
            return None
        if member is not None and held is not None and group.texts_of(held):
            return None  # an unused field is cut behind its texts
        if len(group.videos) < 2 and (group.stem in {group.key, *group.videos} or not group.videos):
            return list(group.videos.values())
        video = group.videos.get(group.stem)
        return None if video is None else [video]

    @staticmethod
    def _own_text(group: Group, video: Video) -> bool:
        return video.name.stem != group.key and any(stem == video.name.stem for stem, _ in group.texts_of(video))

    def drain(self) -> Iterator[Sample | Reject]:
        """The end: everything that still waits, in order."""
        yield from self.close_current()
        for group in list(self._waiting.values()):
            yield from self._leave(group)
        self._waiting_bytes = 0
        yield from (reject for reject, _ in self._without_video.values())
        self._without_video.clear()

    @staticmethod
    def _extensions(group: Group) -> set[str]:
        if len(group.stems) > 1:
            return group.extensions.get(group.stem, set())
        return group.all_extensions

    def _leave(self, group: Group) -> Iterator[Sample | Reject]:
        del self._waiting[group.key]
        if not group.stems:
            if group.again:
                if group.texts:  # of a sample that left before
                    count(self._counters, "late_members", len(group.texts))
            else:
                self._left.add(group.key)
                self._without_video[group.key] = self._faulty(group.key, _no_video(group)), len(group.texts)
            return
        yield from [self._settle(group, video) for video in list(group.videos.values())]
        self._left.add(group.key)
        self._forget_texts(group, set(group.texts))

    def _relieve(self, group: Group, stem: str) -> Iterator[Sample | Reject]:
        """A key with more members than may wait: videos whose keys are certain leave, and texts without a video are let go."""
        if len(group.stems) > 1:
            yield from [self._settle(group, video) for video in list(group.videos.values()) if video.name.stem != stem]
        kept = {stem, group.key, *group.videos}
        self._forget_texts(group, {name for name in group.texts if name[0].removesuffix(".caption") not in kept})
        group.extensions = {name: found for name, found in group.extensions.items() if name in kept}
        group.held_bytes = GROUP_BYTES + sum(video.num_bytes for video in group.videos.values())

    def _forget_texts(self, group: Group, names: set[tuple[str, str]]) -> None:
        if unused := names - group.used:
            late = sum(stem.removesuffix(".caption") in self._taken for stem, _ in unused)
            for slug, n in (("late_members", late), ("ignored_fields", len(unused) - late)):
                if n:
                    count(self._counters, slug, n)
        for name in names:
            del group.texts[name]

    def _settle(self, group: Group, video: Video) -> Sample | Reject:
        del group.videos[video.name.stem]
        key = video.name.stem if group.again or len(group.stems) > 1 else group.key
        if key in self._sample_keys:  # `a.mp4` far behind `a.1.mp4`, which had the key
            key = video.name.path
        names = group.texts_of(video)
        group.used |= set(names)
        if video.contents is None:
            return self._faulty(key, video.fault or ("empty_video", f"{video.name.path} has no bytes", False))
        self._taken[video.name.stem] = video.name.path  # not a faulty one: the same name may come again and be good
        self._sample_keys.add(key)
        captions = [text for name in names if isinstance(text := group.texts[name], Caption)]
        metadata = next((text for name in names if isinstance(text := group.texts[name], Metadata)), Metadata())
        return sample_of(
            Sample(
                key,
                video.index,
                self._uri,
                video.contents,
                video.name.extension,
                span=video.span,
                file_name=video.name.path,
            ),
            captions,
            metadata,
        )

    # --- rejects ------------------------------------------------------------------------------------------------------

    def _faulty(self, key: str, fault: Fault) -> Reject:
        reason, message, policy = fault
        return Reject(key, "read", reason, message, policy=policy, uri=self._uri)

    def _repeated(self, name: MemberName) -> Reject:
        return self._faulty(name.stem, ("duplicate_key", LATE.format(name=name.path), False))

    def _extra(self, name: MemberName, kept: str) -> Reject:
        message = f"{name.path} is the same sample as {kept}, which was taken; rename one of them to have both"
        return self._faulty(name.path, ("extra_video", message, True))

    def _cut(self, key: str | None, message: str) -> Reject:
        return Reject(key, "read", "truncated_shard", message, policy=False, uri=self._uri)


def sample_of(bare: Sample, captions: list[Caption], metadata: Metadata) -> Sample:
    """`bare` with its texts: the first caption that says something, else that of the metadata, and the warnings of what was looked at."""
    warnings: list[str] = []
    text = None
    for caption in (*captions, metadata.caption):
        if text is None:
            text = caption.text
            warnings += caption.warnings
    return replace(
        bare,
        caption=text,
        metadata=metadata.values,
        warnings=tuple(dict.fromkeys([*warnings, *metadata.warnings])),
    )


def count(counters: dict[str, int], slug: str, n: int = 1) -> None:
    """Adds to a counter."""
    counters[slug] = counters.get(slug, 0) + n


def _better(held: Video, name: MemberName) -> bool:
    return preference(held.name) <= preference(name)


def _no_video(group: Group) -> Fault:
    """video2dataset writes caption and metadata of failed downloads too: that is policy, not damage, unless a header broke nearby."""
    found = ", ".join(sorted(group.fields)) or "nothing readable"
    if group.beside_damage:
        return "corrupt_header", f"no video beside a broken tar header; found {found}", False
    values = next((text.values for text in group.texts.values() if isinstance(text, Metadata)), {})
    told = [f"{name}: {values[name]}" for name in ("status", "error_message") if values.get(name)]
    return "no_video", "; ".join([f"no video, only {found}", *told])[:500], True
