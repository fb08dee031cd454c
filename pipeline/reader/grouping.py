"""Members of a tar become samples, by WebDataset's rules.

Enters: named fields with their contents, in archive order. Leaves: `Sample` or `Reject`, one a key, in the same order on every read.
The key is the path up to the first dot of the file's name, the field is the rest, lower-cased. A sample leaves when its key ends and it has
a video and a caption or metadata. Others wait in a window bounded in bytes, because their missing part may follow out of order.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.records import VIDEO_EXTENSIONS, Reject, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

MiB = 1024 * 1024
WINDOW_BYTES = 32 * MiB  # what may wait for its missing part
GROUP_BYTES = 512  # what an empty group costs
CAPTION_KEYS = ("caption", "text", "prompt")
VIDEO_RANK = {extension: rank for rank, extension in enumerate(VIDEO_EXTENSIONS)}


@dataclass(slots=True)
class Group:
    """What is known of one key so far."""

    key: str
    index: int
    fields: set[str] = field(default_factory=set)
    video: bytes | str | None = None
    video_ext: str = ""
    video_rank: tuple[int, int] | None = None
    video_span: tuple[int, int] | None = None  # where in the object its bytes lie, if they lie there as they are
    video_bytes: int = 0  # in memory or in a file: both are held
    caption: str | None = None
    metadata: dict[str, Any] | None = None
    fault: tuple[str, str, bool] | None = None  # reason, message, policy: why the video cannot be had
    beside_damage: bool = False  # a broken header lay next to it, so that something of it may be lost
    held_bytes: int = GROUP_BYTES

    @property
    def complete(self) -> bool:
        """Nothing more is expected: a video (or the reason why there is none) and something beside it."""
        return (self.video is not None or self.fault is not None) and (
            self.caption is not None or self.metadata is not None
        )


class Grouper:
    """Feed it with `enter`, then fill the group it gives; `close_current` and `drain` give what is ready.

    At most one sample or reject ever leaves for a key, save one more `duplicate_key` reject if parts of it come after it left.
    """

    def __init__(self, uri: str, counters: dict[str, int]) -> None:
        self.current: Group | None = None
        self._uri = uri
        self._counters = counters
        self._waiting: dict[str, Group] = {}  # in order of their first member; the current one is among them
        self._waiting_bytes = 0
        self._left: set[str] = set()  # keys that are done
        self._late: set[str] = set()  # those of them that were rejected a second time
        self._count = 0
        self._last_fields: set[str] = set()
        self._scattered = False  # a key came back: members are not adjacent here
        self._beside_damage = False

    def enter(self, key: str) -> Iterator[Sample | Reject]:
        """A member of `key` follows: what is ready before it. Afterwards `current` is its group, None for a key that is done."""
        if self.current is not None and self.current.key == key:
            return
        yield from self.close_current()
        if key in self._left:
            if key not in self._late:
                self._late.add(key)
                yield self._late_reject(key)
            count(self._counters, "late_members")
            return
        if key in self._waiting:
            self._scattered = True
            count(self._counters, "reopened_keys")
            self.current = self._waiting[key]
            self._waiting_bytes -= self.current.held_bytes
        else:
            self.current = Group(key, self._count, beside_damage=self._beside_damage)
            self._waiting[key] = self.current
            self._count += 1
        self._beside_damage = False

    def close_current(self) -> Iterator[Sample | Reject]:
        """The key changes: the group leaves if it is complete, else it waits and may push others out."""
        group, self.current = self.current, None
        if group is None:
            return
        self._last_fields = group.fields
        if group.complete and not self._scattered:
            yield self._leave(group)
            return
        texts = len(group.key) + len(group.caption or "") + len(str(group.metadata or ""))
        group.held_bytes = GROUP_BYTES + group.video_bytes + 4 * texts
        self._waiting_bytes += group.held_bytes
        while self._waiting_bytes > WINDOW_BYTES:
            oldest = next(iter(self._waiting.values()))
            self._waiting_bytes -= oldest.held_bytes
            yield self._leave(oldest)

    def damaged(self) -> None:
        """A broken header was met: the groups on both sides of it may have lost something."""
        self._beside_damage = True
        if self.current is not None:
            self.current.beside_damage = True

    def cut_short(self, message: str, *, in_member: bool) -> Iterator[Sample | Reject]:
        """The archive ended early, inside a member of the current key or behind it: a reject with that key, or without one.

        A key that has everything its predecessor had is taken as whole, the first of a shard if it has caption and metadata.
        """
        group = self.current
        expected = self._last_fields or {"txt", "json"}
        whole = group is not None and group.video is not None and group.fields >= expected
        if group is not None and (in_member or not whole):
            self.current = None
            del self._waiting[group.key]
            self._left.add(group.key)
            yield Reject(group.key, "read", "truncated_shard", message, policy=False, uri=self._uri)
        else:
            yield Reject(None, "read", "truncated_shard", message, policy=False, uri=self._uri)

    def drain(self) -> Iterator[Sample | Reject]:
        """The end: everything that still waits, in order."""
        yield from self.close_current()
        for group in list(self._waiting.values()):
            yield self._leave(group)
        self._waiting_bytes = 0

    def _leave(self, group: Group) -> Sample | Reject:
        del self._waiting[group.key]
        self._left.add(group.key)
        if group.video is None:
            reason, message, policy = group.fault or _no_video(group)
            return Reject(group.key, "read", reason, message, policy=policy, uri=self._uri)
        metadata = group.metadata or {}
        caption = group.caption or caption_of(metadata)
        place = group.video_span
        return Sample(group.key, group.index, self._uri, group.video, group.video_ext, caption, metadata, place)

    def _late_reject(self, key: str) -> Reject:
        message = (
            "members of this key are scattered over the archive, or two samples share it; pack the shard sorted by name"
        )
        return Reject(key, "read", "duplicate_key", message, policy=False, uri=self._uri)


def split_name(name: str) -> tuple[str, str] | None:
    """`"./v1.2/clip.final.MP4"` -> key `"v1.2/clip"`, field `"final.mp4"`; None without a dot in the file's name."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if dot else None


def why_skipped(name: str) -> str | None:
    """Counter of names that are never samples: AppleDouble, hidden files, WebDataset's `__x__`; None for all others."""
    base = name.rpartition("/")[2]
    if base.startswith("._") or "__MACOSX" in name.split("/"):
        return "skipped_appledouble"
    if base.startswith(".") and base not in {".", ".."}:
        return "skipped_hidden"
    return "skipped_meta" if re.fullmatch(r"__.*__", name) else None


def video_rank(extension: str) -> tuple[int, int] | None:
    """Preference among several videos of a key, lowest first: the plain field before `orig.mp4`, then as in `VIDEO_EXTENSIONS`."""
    rank = VIDEO_RANK.get(extension.rpartition(".")[2])
    return None if rank is None else (extension.count("."), rank)


def parse_caption(data: bytes, counters: dict[str, int]) -> str | None:
    """UTF-8 text, bytes that are none replaced and counted; None if blank."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        count(counters, "non_utf8_captions")
        text = data.decode("utf-8-sig", errors="replace")
    return text.strip() or None


def parse_metadata(data: bytes, counters: dict[str, int]) -> dict[str, Any]:
    """A JSON object; anything else is counted and becomes empty."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, absurd numbers, absurd nesting
        count(counters, "bad_json")
        return {}
    if not isinstance(value, dict):
        count(counters, "json_not_an_object")
        return {}
    return value


def caption_of(metadata: dict[str, Any]) -> str | None:
    """The caption where only the metadata has one."""
    texts = (metadata.get(name) for name in CAPTION_KEYS)
    # JSON can spell half a surrogate pair; no file or table can hold it.
    return next(
        (text.encode(errors="replace").decode() for text in texts if isinstance(text, str) and text.strip()), None
    )


def count(counters: dict[str, int], slug: str, n: int = 1) -> None:
    """Adds to a counter."""
    counters[slug] = counters.get(slug, 0) + n


def _no_video(group: Group) -> tuple[str, str, bool]:
    """video2dataset writes caption and metadata of failed downloads too: that is policy, not damage, unless a header broke nearby."""
    found = ", ".join(sorted(group.fields)) or "nothing readable"
    if group.beside_damage:
        return "corrupt_header", f"no video beside a broken tar header; found {found}", False
    told = (
        [f"{name}: {group.metadata[name]}" for name in ("status", "error_message") if (group.metadata or {}).get(name)]
        if group.metadata
        else []
    )
    return "no_video", "; ".join([f"no video, only {found}", *told])[:500], True
