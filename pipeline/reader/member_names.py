"""Names of tar members: key, stem and extension of a path, and names that are never samples."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.records import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

TEXT_EXTENSIONS = ("txt", "caption", "json")
CAPTION = ".caption"
RANK = {extension: rank for rank, extension in enumerate((*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS))}
VIDEOS, IMAGES = frozenset(VIDEO_EXTENSIONS), frozenset(IMAGE_EXTENSIONS)


@dataclass(frozen=True, slots=True)
class MemberName:
    """`"./v1.2/clip.final.MP4"`: path `v1.2/clip.final.MP4`, key `v1.2/clip`, stem `v1.2/clip.final`, extension `mp4`."""

    path: str
    key: str
    stem: str
    extension: str  # lower case
    with_images: bool = False  # whether the job encodes images

    @property
    def field(self) -> str:
        """The field in WebDataset's sense: the part behind the key's dot, in lower case."""
        return self.path[len(self.key) + 1 :].lower()

    @property
    def is_video(self) -> bool:
        """A video by its extension."""
        return self.extension in VIDEOS

    @property
    def is_image(self) -> bool:
        """An image by its extension, in a job that encodes images."""
        return self.with_images and self.extension in IMAGES

    @property
    def is_encoded(self) -> bool:
        """A video, or an image that may be encoded."""
        return self.is_video or self.is_image


def member_name(name: str, *, with_images: bool = False) -> MemberName | None:
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
    return MemberName(path, f"{folder}{slash}{first}", f"{folder}{slash}{stem}", extension.lower(), with_images)


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
    """Sort key of several videos or images with one stem, of which the lowest is taken: by the order of `VIDEO_EXTENSIONS` and
    `IMAGE_EXTENSIONS`, lower case before upper case.
    """
    return RANK[name.extension], not name.path.endswith(name.extension), name.path
