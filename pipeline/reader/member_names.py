"""Names of tar members: key, stem and extension of a path, and which names are never samples."""

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
        """WebDataset's: what follows the key's dot, in lower case."""
        return self.path[len(self.key) + 1 :].lower()

    @property
    def is_video(self) -> bool:
        """A video by its extension."""
        return self.extension in VIDEO_RANK


def member_name(name: str) -> MemberName | None:
    r"""None without a dot in the file's name. Bytes that are not UTF-8, which tarfile gives as surrogates, are spelled `\xff`."""
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
    """`a.Caption` as `a.caption`: the stem of `a.Caption.txt`, which is found in any case."""
    return stem[: -len(CAPTION)] + CAPTION if stem.lower().endswith(CAPTION) else stem


def why_skipped(name: str) -> str | None:
    """Counter of names that are never samples: AppleDouble, hidden files, WebDataset's `__x__`; None for all others."""
    base = name.rpartition("/")[2]
    if base.startswith("._") or "__MACOSX" in name.split("/"):
        return "skipped_appledouble"
    if base.startswith(".") and base not in {".", ".."}:
        return "skipped_hidden"
    return "skipped_meta" if re.fullmatch(r"__.*__", name) else None


def preference(name: MemberName) -> tuple[int, bool, str]:
    """Which of several videos with one stem is taken, lowest first: by `VIDEO_EXTENSIONS`, small letters before capitals."""
    return VIDEO_RANK[name.extension], not name.path.endswith(name.extension), name.path
