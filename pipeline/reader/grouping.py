"""Grouping of the members of a tar into samples: WebDataset's rules, and a sample or reject for every video.

Takes named members with their contents in archive order; yields `Sample`s and `Reject`s, in the same order on every read.

- A key is the path up to the first dot of the file's name, as in WebDataset. Members of one key belong together.
- A key with one video is one sample of that key. Of several videos with different names (`yt.f137.mp4`, `yt.f248.mp4`) each is a sample
  whose key is its path without the extension. It gets the texts of that name, else those of the key if no video has just the key's name.
- Of several videos that differ only in the extension (`a.mp4`, `a.webm`) the best one is taken, the others are rejected as `extra_video`.
- If the job encodes images, a key without a video has images by the same rules. An image of a key with a video is ignored, as the
  thumbnail that downloaders write. Both are samples only if the video comes out of order, after its key was emitted.
- With `members` in the job, the videos of a sample are one sample, see `pairing`. A video that they do not name is rejected as
  `unnamed_video`. Images are samples by the rules above.
- A repeated name is rejected as `duplicate_key`, and texts after it count as those of the second video.

A sample is emitted when its key ends, if it has a video and a caption or metadata. Others wait, within a limit in bytes, because their
missing part or another video of their key may follow out of order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.reader.key_group import GROUP_BYTES, Fault, Group, Video, sample_of
from pipeline.reader.member_names import preference
from pipeline.reader.pairing import unnamed
from pipeline.reader.texts import Metadata
from pipeline.records import MAIN, MemberRule, Reject, Sample, named_caption

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.reader.member_names import MemberName
    from pipeline.reader.pairing import Pair
    from pipeline.reader.texts import Caption

MiB = 1024 * 1024
WINDOW_BYTES = 32 * MiB  # limit of groups that wait for a missing part
FIELDS_NAMED = 16
LATE = (
    "{name}: the tar already has a video of this name or key; only the first is encoded. "
    "Repack with unique, sorted names"
)


class Grouper:
    """Grouper of one tar: call `enter` for each member, then add it; `enter`, `close_current` and `drain` yield what is ready."""

    def __init__(
        self,
        uri: str,
        counters: dict[str, int],
        rule: MemberRule | None = None,
        forget: Callable[[Video], None] = lambda video: None,
    ) -> None:
        """`forget` is called for videos of pairs that are not encoded."""
        self._rule, self._forget = rule or MemberRule(), forget
        self.current: Group | None = None
        self._uri = uri
        self._counters = counters
        self._waiting: dict[str, Group] = {}  # by key, in order of their first member, the current one included
        self._waiting_bytes = 0
        self._left: set[str] = set()  # emitted keys
        self._with_video: set[str] = set()  # emitted keys that have a video
        self._taken: dict[str, str] = {}  # stems of emitted videos -> file name
        self._taken_images: dict[str, str] = {}
        self._sample_keys: set[str] = set()
        # key -> reject, emitted at the end, and number of texts
        self._without_video: dict[str, tuple[Reject, int]] = {}
        self._count = 0
        self._last_extensions: set[str] = set()
        self._scattered = False  # a key was repeated: its members are not adjacent
        self._beside_damage = False

    def enter(self, name: MemberName) -> Iterator[Sample | Reject]:
        """Starts a member: yields what is ready before it and makes its group `current`."""
        group = self.current
        if group is None or group.key != name.key:
            yield from self.close_current()
            group = self.current = self._open(name.key)
        elif name.stem != group.stem and group.held_bytes > WINDOW_BYTES:
            paired = bool(self._rule) and not group.of_images
            yield from self._shrink_pairs(group, name) if paired else self._shrink(group, name.stem)
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
            group = Group(key, self._count, self._rule, again=key in self._left, beside_damage=self._beside_damage)
            self._waiting[key] = group
            self._count += 1
        self._beside_damage = False
        return group

    # --- members of the current group ---------------------------------------------------------------------------------

    def ignores(self, name: MemberName) -> bool:
        """Whether this is an image whose key has a video."""
        group = self._group()
        has_video = (bool(group.stems) and not group.of_images) or group.key in self._with_video
        return name.is_image and has_video

    def displaced_by(self, name: MemberName) -> list[Video]:
        """Removes and returns the images of the key, if this is its first video."""
        group = self._group()
        if name.is_image or not group.of_images:
            return []
        displaced = list(group.videos.values())
        group.held_bytes -= sum(image.num_bytes + GROUP_BYTES for image in displaced)
        group.videos, group.stems, group.of_images = {}, set(), False
        return displaced

    def refusal(self, name: MemberName) -> Reject | None:
        """Reject of a video or image that need not be read: its name occurred before, or a preferred one of its stem was read."""
        group = self._group()
        by_rule = bool(self._rule) and not name.is_image
        if by_rule and (reject := self._refused_by_rule(group, name)) is not None:
            return reject
        if (taken := self._taken_of(name).get(name.stem)) is not None:
            return self._repeated(name) if taken == name.path else self._extra(name, taken)
        held = group.videos.get(name.stem)
        if held is None or held.fault is not None:
            return None
        if held.name.path == name.path:
            held.repeated = True
            return self._repeated(name)
        return self._extra(name, held.name.path) if _better(held, name) else None

    def _refused_by_rule(self, group: Group, name: MemberName) -> Reject | None:
        place = self._rule.place(name.path, name.stem)
        if place is None:
            group.unnamed = True
            return self._faulty(name.path, unnamed(name.path, self._rule))
        if place[1] == MAIN:  # of several with one stem the best is taken, as without a rule
            return None
        held = next((video.name for video in group.videos.values() if video.place(self._rule) == place), None)
        return None if held is None or held.path == name.path else self._extra(name, held.path)

    def _taken_of(self, name: MemberName) -> dict[str, str]:
        return self._taken_images if name.is_image else self._taken

    def add_video(self, video: Video) -> tuple[Video, Reject] | None:
        """Adds a video or image. If its stem has two now, returns the one that is dropped, with its reject."""
        group, stem = self._group(), video.name.stem
        group.of_images = video.name.is_image
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
        place = None if video.name.is_image else video.place(self._rule)
        if self._rule and place is not None:
            group.bases.add(place[0])
        group.held_bytes += video.num_bytes + GROUP_BYTES
        if held is None:
            return None
        group.held_bytes -= held.num_bytes
        loss = (
            self._extra(held.name, video.name.path) if held.fault is None else self._faulty(held.name.path, held.fault)
        )
        return held, loss

    def _late_video(self, group: Group, stem: str) -> None:
        """Handles a video whose key was already emitted. If the key had no video, this is its first; otherwise emitted texts may belong to
        it and are counted as late.
        """
        if (found := self._without_video.pop(group.key, None)) is not None:
            group.again = False
            self._left.discard(group.key)
            count(self._counters, "late_members", found[1])
        elif stem == group.key and stem not in self._sample_keys:
            count(self._counters, "late_members")

    def accepts_text(self, name: MemberName) -> bool:
        """Whether a caption or JSON is the first of its name, and not after a second video of that name."""
        group = self._group()
        video = group.videos.get(name.stem)
        return (name.stem, name.extension) not in group.texts and not (video is not None and video.repeated)

    def add_text(self, name: MemberName, text: Caption | Metadata, num_bytes: int) -> None:
        """Adds a caption or JSON."""
        group = self._group()
        group.texts[name.stem, name.extension] = text
        if name.extension == "txt" and (named := named_caption(name.stem)) is not None:
            group.named.setdefault(named[0], []).append(name.stem)
        parsed = 4 if isinstance(text, Metadata) else 1  # parsed objects take more memory than their text
        group.held_bytes += len(name.stem) + parsed * num_bytes

    def _group(self) -> Group:
        if self.current is None:
            raise ValueError("no member was entered")
        return self.current

    # --- emission -----------------------------------------------------------------------------------------------------

    def close_current(self) -> Iterator[Sample | Reject]:
        """Ends the current key: its group is emitted if complete, else it waits, and may push the oldest ones out of the window."""
        group, self.current = self.current, None
        if group is None:
            return
        self._last_extensions = group.last_extensions
        if not self._scattered and group.complete:  # in this order: `complete` reads every video
            yield from self._emit(group)
            return
        self._waiting_bytes += group.held_bytes
        while self._waiting_bytes > WINDOW_BYTES:
            oldest = next(iter(self._waiting.values()))
            self._waiting_bytes -= oldest.held_bytes
            yield from self._emit(oldest)

    def damaged(self) -> None:
        """Records a broken header: the groups on both sides of it may have lost members."""
        self._beside_damage = True
        if self.current is not None:
            self.current.beside_damage = True

    def cut_short(self, message: str, *, member: MemberName | None) -> Iterator[Sample | Reject]:
        """The archive ended early, inside `member` or between members: yields a reject for each video of the current key that is cut.

        If it is unknown which video was cut, the reject has no key.
        """
        group = self.current
        lost = None if group is None else group.cut(member, self._last_extensions or {"txt", "json"})
        if (
            self._rule
            and group is not None
            and not group.of_images
            and (cut := [pair for pair in group.pairs if pair.is_cut(self._rule, lost or [])])
        ):
            for pair in cut:  # one reject each, when the archive is drained
                for video in pair.videos.values():
                    video.fault = video.fault or ("truncated_shard", message, False)
            return
        if group is None or not (lost or (lost is not None and not group.stems and not group.again)):
            yield self._cut(None, message)
            return
        if not lost:  # only texts
            self.current = None
            del self._waiting[group.key]
            yield self._cut(group.key, message)
        for video in lost or ():
            del group.videos[video.name.stem]
            yield self._cut(video.name.stem if group.again or len(group.stems) > 1 else group.key, message)

    def drain(self) -> Iterator[Sample | Reject]:
        """Ends the archive: yields all groups that wait, in order."""
        yield from self.close_current()
        for group in list(self._waiting.values()):
            yield from self._emit(group)
        self._waiting_bytes = 0
        yield from (reject for reject, _ in self._without_video.values())
        self._without_video.clear()

    def _emit(self, group: Group) -> Iterator[Sample | Reject]:
        del self._waiting[group.key]
        if not group.stems:
            if group.again:
                if group.texts:  # of a sample that was emitted before
                    count(self._counters, "late_members", len(group.texts))
            elif group.unnamed:  # one reject an input
                self._forget_texts(group, set(group.texts))
            else:
                self._left.add(group.key)
                self._without_video[group.key] = self._faulty(group.key, group.no_video()), len(group.texts)
            return
        if self._rule and not group.of_images:
            yield from [self._settle_pair(group, pair) for pair in group.pairs]
        else:
            yield from [self._settle(group, video) for video in list(group.videos.values())]
        self._left.add(group.key)
        if not group.of_images:
            self._with_video.add(group.key)
        self._forget_texts(group, set(group.texts))

    def _shrink(self, group: Group, stem: str) -> Iterator[Sample | Reject]:
        """Shrinks a key that exceeds the limit: emits videos whose keys are certain, drops texts without a video."""
        if len(group.stems) > 1:
            yield from [self._settle(group, video) for video in list(group.videos.values()) if video.name.stem != stem]
        kept = {stem, group.key, *group.videos}
        self._forget_texts(group, {name for name in group.texts if name[0].removesuffix(".caption") not in kept})
        group.extensions = {name: found for name, found in group.extensions.items() if name in kept}
        group.held_bytes = GROUP_BYTES + sum(video.num_bytes for video in group.videos.values())

    def _shrink_pairs(self, group: Group, name: MemberName) -> Iterator[Sample | Reject]:
        """Shrinks a key that exceeds the limit, which many samples with dots in their names share: emits all but that of `name`."""
        others = [pair for pair in group.pairs if not name.path.startswith(f"{pair.stem}.")]
        if others:
            group.bases.add(name.stem)  # theirs is not the only one
        for pair in others:
            yield self._settle_pair(group, pair)
            self._forget_texts(group, {text for text in group.texts if f"{text[0]}.".startswith(f"{pair.stem}.")})
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
        if key in self._sample_keys:  # `a.mp4` far after `a.1.mp4`, which got the key
            key = video.name.path
        if video.contents is None:
            group.used |= set(group.texts_of(video))
            return self._faulty(key, video.fault or ("empty_video", f"{video.name.path} has no bytes", False))
        self._taken_of(video.name)[video.name.stem] = (
            video.name.path
        )  # not a faulty one: the name may come again with a good video
        self._sample_keys.add(key)
        return self._with_texts(group, video, video.contents, key)

    def _with_texts(self, group: Group, video: Video, contents: bytes | str, key: str) -> Sample:
        names = group.texts_of(video)
        group.used |= set(names)
        captions = group.captions_of(video, names)
        metadata = next((text for name in names if isinstance(text := group.texts[name], Metadata)), Metadata())
        name = video.name
        bare = Sample(key, video.index, self._uri, contents, name.extension, file_name=name.path, span=video.span)
        return sample_of(bare, captions, metadata)

    def _settle_pair(self, group: Group, pair: Pair) -> Sample | Reject:
        """The sample of paired videos, with the key of the group if that has no other."""
        alone = len(group.bases) == 1 and not group.again
        item = self._paired(group, pair, group.key if alone else pair.stem)
        for video in pair.videos.values():
            del group.videos[video.name.stem]
            if isinstance(item, Sample):
                self._taken[video.name.stem] = video.name.path
            else:
                self._forget(video)
        return item

    def _paired(self, group: Group, pair: Pair, key: str) -> Sample | Reject:
        if (fault := pair.fault(self._rule)) is not None:
            return self._faulty(key, fault)
        if group.beside_damage and not pair.whole(self._rule):
            lost = (
                f"no member of {pair.stem} beside a broken tar header, which may have cost them; pack the shard again"
            )
            return self._faulty(key, ("corrupt_header", lost, False))
        if key in self._sample_keys or pair.main is None or pair.main.contents is None:
            return self._faulty(key, ("duplicate_key", LATE.format(name=pair.stem), False))
        self._sample_keys.add(key)
        bare = self._with_texts(group, pair.main, pair.main.contents, key)
        return replace(bare, members=pair.members(self._rule))

    # --- rejects ------------------------------------------------------------------------------------------------------

    def _faulty(self, key: str, fault: Fault) -> Reject:
        reason, message, policy = fault
        return Reject(key, "read", reason, message, policy=policy, uri=self._uri)

    def _repeated(self, name: MemberName) -> Reject:
        return self._faulty(name.stem, ("duplicate_key", LATE.format(name=name.path), False))

    def _extra(self, name: MemberName, kept: str) -> Reject:
        message = f"{name.path} is the same sample as {kept}, which was taken; rename one of them to encode both"
        return self._faulty(name.path, ("extra_video", message, True))

    def _cut(self, key: str | None, message: str) -> Reject:
        return Reject(key, "read", "truncated_shard", message, policy=False, uri=self._uri)


def count(counters: dict[str, int], slug: str, n: int = 1) -> None:
    """Adds to a counter."""
    counters[slug] = counters.get(slug, 0) + n


def _better(held: Video, name: MemberName) -> bool:
    return preference(held.name) <= preference(name)
