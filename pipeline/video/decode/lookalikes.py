"""Signatures of files that are named like videos but are not: still images, web pages, archives, git-lfs pointers.

Takes the first bytes of a file, returns what it is and what to do, as text for messages. Part of the decode package.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.video.decode.encoded_file import open_encoded

if TYPE_CHECKING:
    from collections.abc import Callable

HEAD_BYTES = 4096
TEXT_CHARS = 32  # fewer characters are not taken for text


@dataclass(frozen=True, slots=True)
class Lookalike:
    """A kind of file. `what`: its name with the article; `advice`: what to do.

    `kind`: a `still` image, an image format that `may_move`, a moving `picture` format that Lathe does not read, `sound`, or `no_video`.
    """

    what: str
    advice: str
    kind: Literal["still", "may_move", "picture", "sound", "no_video"] = "no_video"


STILL = "--images keep encodes png, jpg, webp, avif, tiff and bmp; convert other images or leave them out"
CONVERT = "convert it to a video (mp4, webm) first"
REFERS = "it only names other files; use those as inputs"
DOWNLOAD = "download the video again"
UNPACK = "unpack it; shards are plain or gzip-compressed tars named .tar"
FOREIGN = "use the video itself as input"
SOUND = "leave sound out of the corpus"


def _starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def _matches(pattern: bytes) -> Callable[[bytes], bool]:
    compiled = re.compile(pattern, re.IGNORECASE | re.DOTALL)
    return lambda head: compiled.match(head.lstrip(b"\xef\xbb\xbf \t\r\n")) is not None


def _brands(*brands: bytes) -> Callable[[bytes], bool]:
    return lambda head: head[4:8] == b"ftyp" and head[8:12] in brands


# The first one that matches counts.
TABLE: tuple[tuple[Callable[[bytes], bool], Lookalike], ...] = (
    (_starts(b"\xff\xd8\xff"), Lookalike("a JPEG image", STILL, "still")),
    (
        lambda head: head.startswith(b"\x89PNG\r\n\x1a\n") and b"acTL" in head,
        Lookalike("an animated PNG", CONVERT, "may_move"),
    ),
    (_starts(b"\x89PNG\r\n\x1a\n"), Lookalike("a PNG image", STILL, "still")),
    (_starts(b"GIF87a", b"GIF89a"), Lookalike("a GIF image", STILL, "may_move")),
    (
        lambda head: head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and head[20:21] != b"" and bool(head[20] & 2),
        Lookalike("an animated WebP", CONVERT, "picture"),
    ),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", Lookalike("a WebP image", STILL, "still")),
    (_brands(b"heic", b"heix", b"heim", b"heis", b"mif1"), Lookalike("a HEIC image", STILL, "still")),
    (_brands(b"avif"), Lookalike("an AVIF image", STILL, "still")),
    (
        _starts(b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
        Lookalike("a JPEG XL image", STILL, "still"),
    ),
    (_starts(b"\0\0\0\x0cjP  \r\n\x87\n"), Lookalike("a JPEG 2000 image", STILL, "still")),
    (_starts(b"BM"), Lookalike("a BMP image", STILL, "still")),
    (_starts(b"II*\0", b"MM\0*"), Lookalike("a TIFF image", STILL, "still")),
    (_starts(b"8BPS"), Lookalike("a Photoshop image", STILL, "still")),
    (_starts(b"version https://git-lfs"), Lookalike("a git-lfs pointer", "fetch the file with `git lfs pull`")),
    (_starts(b"#EXTM3U"), Lookalike("an HLS playlist", REFERS)),
    (_starts(b"ffconcat version"), Lookalike("an ffconcat list", REFERS)),
    (_matches(rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(\w+:)?MPD\b"), Lookalike("a DASH manifest", REFERS)),
    (_matches(rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<svg\b"), Lookalike("an SVG image", STILL, "still")),
    (
        _matches(rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype html|<html\b|<head\b|<body\b)"),
        Lookalike("an HTML page", DOWNLOAD),
    ),
    (_matches(rb"<\?xml\b"), Lookalike("an XML document", DOWNLOAD)),
    (_starts(b"%PDF-"), Lookalike("a PDF document", FOREIGN)),
    (_starts(b"PK\x03\x04", b"PK\x05\x06"), Lookalike("a zip archive", UNPACK)),
    (_starts(b"\x1f\x8b"), Lookalike("gzip-compressed data", UNPACK)),
    (_starts(b"\x28\xb5\x2f\xfd"), Lookalike("zstd-compressed data", UNPACK)),
    (_starts(b"BZh"), Lookalike("bzip2-compressed data", UNPACK)),
    (_starts(b"\xfd7zXZ\0"), Lookalike("xz-compressed data", UNPACK)),
    (_starts(b"7z\xbc\xaf\x27\x1c"), Lookalike("a 7z archive", UNPACK)),
    (_starts(b"Rar!\x1a\x07"), Lookalike("a RAR archive", UNPACK)),
    (lambda head: head[257:262] == b"ustar", Lookalike("a tar archive", UNPACK)),
    (_starts(b"\x7fELF", b"MZ\x90\0"), Lookalike("a program", FOREIGN)),
    (
        _starts(b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xfa"),
        Lookalike("an MP3 sound file", SOUND, "sound"),
    ),
    (_starts(b"\xff\xf1", b"\xff\xf9"), Lookalike("an AAC sound file", SOUND, "sound")),
    (_starts(b"fLaC"), Lookalike("a FLAC sound file", SOUND, "sound")),
    (
        lambda head: head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE",
        Lookalike("a WAV sound file", SOUND, "sound"),
    ),
    (lambda head: head[:4] == b"FORM" and head[8:11] == b"AIF", Lookalike("an AIFF sound file", SOUND, "sound")),
    (_starts(b"MThd"), Lookalike("a MIDI file", SOUND, "sound")),
    (_starts(b"#!AMR", b"\x0b\x77", b"MAC ", b"wvpk"), Lookalike("a sound file", SOUND, "sound")),
    (_matches(rb"[\[{].{0,200}\""), Lookalike("a JSON text", DOWNLOAD)),
    (lambda head: not head, Lookalike("empty", DOWNLOAD)),
    (lambda head: len(head) >= 64 and not any(head), Lookalike("nothing but zero bytes", DOWNLOAD)),
)


def lookalike(video: bytes | str) -> Lookalike | None:
    """The kind of a file that is not a video; None if it may be one, or is of no known kind.

    Raises:
        StorageUnavailable, SourceChanged, SourceRefused: the file cannot be read.
    """
    with closing(open_encoded(video)) as file:
        head = file.read(HEAD_BYTES)
        file.check()
    found = next((kind for matches, kind in TABLE if matches(head)), None)
    if found is None and head and _is_text(head):
        return Lookalike("a text", DOWNLOAD)
    return found


def _is_text(head: bytes) -> bool:
    text = head[:1024].decode("utf-8", "replace").removesuffix("\ufffd")  # the last character may be cut
    return (
        len(text) >= TEXT_CHARS
        and any(map(str.isspace, text))
        and all((char.isprintable() or char.isspace()) and char != "\ufffd" for char in text)
    )
