"""Kinds of files by name: a tar shard, a video, an image, a text beside them, or a file that is not encoded, with the reason."""

from __future__ import annotations

import re
from typing import Literal

from pipeline.records import IMAGE_EXTENSIONS, MAYBE_STILL, VIDEO_EXTENSIONS, ImagePolicy

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
LIST_SUFFIXES = (".txt", ".list")
TEXT_SUFFIXES = (".txt", ".json", ".caption")  # read beside a video
VIDEOS = frozenset(VIDEO_EXTENSIONS)
IMAGES = frozenset(IMAGE_EXTENSIONS)
LONGEST_SUFFIX = 12

NO_SUFFIX = "without an extension"
OTHER_SUFFIX = "with another extension"
UNKNOWN = "not a suffix of a video or tar; rename or convert videos"

# Reason -> suffixes of files that are often in a corpus and never encoded.
_REASONS = {
    "images are encoded with --images keep": " ".join(IMAGE_EXTENSIONS),
    "images that are not read: convert them to png or jpg": "heic heif jxl jp2 j2k jpx ico svg "
    "psd exr hdr tga dng cr2 nef arw ppm pgm pbm pnm dpx mpo",
    "audio is not encoded; if the file contains video, rename it to .ogv, .mp4 or .mkv": "mp3 wav flac aac m4a m4b ogg oga opus "
    "spx wma aif aiff ac3 eac3 dts mka amr mid midi caf",
    "subtitles are not read": "srt vtt ass ssa sub idx smi ttml dfxp mks lrc",
    "tables in a folder are not read; name the table as an input": "csv tsv jsonl ndjson parquet arrow feather xlsx "
    "npy npz pkl h5 hdf5 tfrecord lance db sqlite",
    "playlists only list files; pass the listed files as inputs": "m3u8 m3u mpd pls xspf ffconcat ism ismc sdp",
    "media segments without init segment; concatenate init segment and segments": "m4s cmfa",
    "low-resolution copies that cameras keep beside the video; rename to .mp4 to encode them": "lrv lrf thm",
    "unfinished downloads": "part crdownload ytdl aria2 download partial tmp temp",
    "raw frames without a size; wrap them as .y4m": "yuv rgb nv12 i420 raw",
    "archives other than tar: unpack them, or repack as .tar": "zip 7z rar gz bz2 xz zst lz4 zstd cab iso",
    "camera raw video: convert it": "braw r3d crm ari",
}
REASONS = {f".{suffix}": reason for reason, suffixes in _REASONS.items() for suffix in suffixes.split()}
# Compressed tars that are not read, longest suffix first.
PACKED_TARS = {
    **dict.fromkeys((".tar.zst", ".tar.zstd", ".tzst"), "zstd tars: repack as .tar or .tar.gz"),
    **dict.fromkeys((".tar.lz4", ".tlz4"), "lz4 tars: repack as .tar or .tar.gz"),
    **dict.fromkeys(
        (".tar.lzma", ".tlz", ".tar.lz", ".tar.z", ".taz", ".tar.br", ".tar.sz"), "repack as .tar or .tar.gz"
    ),
    **dict.fromkeys((".tar.gpg", ".tar.enc", ".tar.age"), "encrypted tars: decrypt them"),
    ".tar.part": "unfinished downloads",
    ".tbz": "repack as .tar or .tar.gz, or rename to .tbz2",
}
PACKED_ENDS = tuple(PACKED_TARS)


def media_kind(name: str, images: ImagePolicy = "skip") -> Literal["tar", "video", "image"] | None:
    """Kind of a file by its suffix; None if it is of none that the job encodes."""
    lower = name.lower()
    if lower.endswith(TAR_SUFFIXES):
        return "tar"
    end = lower.rpartition("/")[2].rpartition(".")[2] if "." in lower else ""
    if images != "skip" and end in IMAGES:
        return "image"
    return "video" if end in VIDEOS and (images != "only" or end in MAYBE_STILL) else None


def is_text(name: str) -> bool:
    """Whether the file is read if a video or image of the same name lies beside it."""
    return name.lower().endswith(TEXT_SUFFIXES)


def is_hidden(relative: str) -> bool:
    """Whether a file is hidden, AppleDouble (`._x`) or in `__MACOSX`. `relative` is its path below the folder that was named."""
    parts = [part for part in relative.split("/") if part not in {".", ".."}]  # ordinary names in a bucket
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def suffix(name: str) -> str:
    """Suffix under which a file is counted, in lower case: `.jpg`, `.tar.zst`, or a description if there is none or it is unusual."""
    lower = name.rpartition("/")[2].lower()
    packed = next((end for end in PACKED_TARS if lower.endswith(end)), None) if lower.endswith(PACKED_ENDS) else None
    if packed is not None:
        return packed
    stem, dot, end = lower.rpartition(".")
    if not dot or not stem:
        return NO_SUFFIX
    return f".{end}" if re.fullmatch(rf"[a-z0-9_-]{{1,{LONGEST_SUFFIX}}}", end) else OTHER_SUFFIX


def reason(suffix: str, images: ImagePolicy = "skip") -> str:
    """Why files with a suffix are not encoded."""
    if images == "only" and suffix.removeprefix(".") in VIDEOS:
        return "videos are left out by --images only"
    return PACKED_TARS.get(suffix) or REASONS.get(suffix) or UNKNOWN
