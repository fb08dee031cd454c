"""Names of tar members: key, stem and extension of a path, and names that are never samples."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.records import VIDEO_EXTENSIONS

TEXT_EXTENSIONS = ("txt", "caption", "json")
CAPTION = ".caption"
VIDEO_RANK = {extension: rank for rank, extension in enumerate(VIDEO_EXTENSIONS)}


@dataclass(frozen=True, slots=True)
class MemberName:
    """`"./v1.2/clip.final.MP4"`: path `v1.2/clip.final.MP4`, key `v1.2/clip`, stem `v1.2/clip.final`, extension `mp4`."""

    path: str
    key: str
    stem: str
    extension: str  # lower case

    @property
    def field(self) -> str:
        """The field in WebDataset's sense: the part behind the key's dot, in lower case."""
        return self.path[len(self.key) + 1 :].lower()

    @property
    def is_video(self) -> bool:
        """A video by its extension."""
        return self.extension in VIDEO_RANK


def member_name(name: str) -> MemberName | None:
    r"""The parts of a member's path; None if the file's name has no dot. Bytes that are not UTF-8 (surrogates of tarfile) become `\xff`."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    path = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    folder, slash, base = path.rpartition("/")
    first, dot, _ = base.partition(".")
    if not dot:
        return None
    stem, _, extension = base.rpartition(".")
    if extension.lower() == "txt":
        stem = caption_stem(stem)
    return MemberName(path, f"{folder}{slash}{first}", f"{folder}{slash}{stem}", extension.lower())


def caption_stem(stem: str) -> str:
    """`a.Caption` as `a.caption`, the stem of `a.Caption.txt`: captions are found in upper and lower case."""
    return stem[: -len(CAPTION)] + CAPTION if stem.lower().endswith(CAPTION) else stem


def why_skipped(name: str) -> str | None:
    """Counter slug for names that are never samples: AppleDouble, hidden files, WebDataset's `__x__`; None for all others."""
    base = name.rpartition("/")[2]
    if base.startswith("._") or "__MACOSX" in name.split("/"):
        return "skipped_appledouble"
    if base.startswith(".") and base not in {".", ".."}:
        return "skipped_hidden"
    return "skipped_meta" if re.fullmatch(r"__.*__", name) else None


def preference(name: MemberName) -> tuple[int, bool, str]:
    """Sort key of several videos with one stem, of which the lowest is taken: by `VIDEO_EXTENSIONS`, lower case before upper case."""
    return VIDEO_RANK[name.extension], not name.path.endswith(name.extension), name.path
