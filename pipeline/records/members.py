"""Records of paired videos: which files of a sample are members of it, by their suffix, and a member on its way to a decoder.

The main video of a sample decides its clips; a member has the same frames, and its latent is a column of the row. Names that begin with
`mask` are masks: they are not encoded by the network but averaged at latent resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAIN = "video"
MASK = "mask"
VERSION = 1
"""How members are cut and masks are averaged, for the fingerprint: raised whenever a stored value could change."""

RESERVED = frozenset((
    "id", "latent", "logvar", "i2v_cond", "first_frame", "vae_latent", "vae_logvar", "source", "row", "shape", "dtype", "index", "text",
    "txt", "json", "npy", "mean", "caption", "captions", "caption_names", "file_name", "media_type", "width", "height", "num_frames",
    "duration_sec", "duration_s", "fps", "bucket", "variant", "source_uri", "source_key", "source_hash", "sample_index", "clip_index",
    "clip_start_sec", "clip_end_sec", "clip_start_frame", "crop", "scaled_width", "scaled_height", "src_width", "src_height", "src_fps",
    "codec", "color_matrix", "color_range", "warnings", "metadata", "fingerprint",
))  # fmt: skip
"""Names of columns and of files of a row, which a member cannot have."""


def is_mask(name: str) -> bool:
    """Whether a member of this name is a mask."""
    return name.startswith(MASK)


@dataclass(frozen=True, slots=True)
class MemberRule:
    """Suffixes of the videos of one sample. `others`: (name, suffix) of each member, sorted. `video`: that of the main one; empty: any.

    `unpaired`: whether a video without any member, or an image, is a sample of its own.
    """

    others: tuple[tuple[str, str], ...] = ()
    video: str = ""
    unpaired: bool = False

    def __bool__(self) -> bool:
        return bool(self.others)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all members, in the order of a file."""
        return tuple(name for name, _ in self.others)

    def place(self, path: str, stem: str) -> tuple[str, str] | None:
        """(path of the sample, name) of a video `path`, whose path without its extension is `stem`: name is `video` for the main one.
        None: no suffix of the rule fits.
        """
        lower = path.lower()
        fitting = [(suffix, name) for name, suffix in self.others if lower.endswith(f".{suffix}")]
        if fitting:
            suffix, name = max(fitting, key=lambda item: len(item[0]))
            if len(suffix) >= len(self.video) or not lower.endswith(f".{self.video}"):
                return path[: -len(suffix) - 1], name
        if not self.video:
            return stem, MAIN
        return (path[: -len(self.video) - 1], MAIN) if lower.endswith(f".{self.video}") else None

    def suffix(self, name: str) -> str:
        """Of a member."""
        return dict(self.others)[name]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, part of the fingerprint."""
        more = {"unpaired": True} if self.unpaired else {}
        return {"version": VERSION, "video": self.video, "others": dict(self.others), **more}

    @classmethod
    def of(cls, fingerprint_parts: dict[str, Any]) -> MemberRule:
        """The rule of data of a fingerprint; empty without paired videos."""
        raw = fingerprint_parts.get("members")
        if raw is None:
            return cls()
        return cls(tuple(sorted(raw["others"].items())), raw["video"], raw.get("unpaired", False))


@dataclass(frozen=True, slots=True)
class MemberVideo:
    """A video of a sample besides its main one: encoded bytes, or a local path."""

    name: str
    video: bytes | str = field(repr=False)
    file_name: str  # path in the tar, or base name of a plain file


@dataclass(frozen=True, slots=True)
class MemberObject:
    """A plain file that is a member of the sample of another one, as it was listed."""

    name: str
    uri: str
    size: int
    etag: str
