"""Lines of a list file: encodings, comments, and the folder of relative lines."""

from __future__ import annotations

import codecs
import glob
import os
import re

from pipeline.corpus.patterns import WILDCARD, expand_braces
from pipeline.errors import InputError

LONGEST_NAME = 1024  # bytes of a key on S3; a longer comment cannot be a name


def list_lines(data: bytes, name: str) -> list[str]:
    """Lines that are not empty, comments included. `name` of the list is for errors.

    Text is UTF-8, or UTF-16 with a byte order mark. Bytes that are not UTF-8 are kept: `find` writes local file names as they are.

    Raises:
        InputError: `data` is not text.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(
            f"list file {name} is not UTF-8 text, nor UTF-16 with a byte order mark; expected one input per line"
        )
    # Not splitlines(): it also splits at characters that names may hold (U+0085, U+2028, form feed).
    return [line for part in re.split(r"\r\n|\r|\n", text) if (line := part.strip(" \t\v\f"))]


def is_comment(line: str) -> bool:
    """Whether a line is a comment, unless a file has exactly this name."""
    return line.startswith("#")


def base_folder(folder: str, texts: list[str]) -> str:
    """Folder of relative lines: that of the list, or "" (the current one) if the first of them is not in the list's folder."""
    first = next((text for text in texts if is_relative(text) and not text.startswith("@")), None)
    if first is None or "://" in folder:
        return folder
    name = WILDCARD.split(expand_braces(first)[0])[0]
    looked_up = name.rpartition("/")[0] if WILDCARD.search(first) else name
    return folder if os.path.lexists(os.path.join(folder, looked_up)) else ""


def is_relative(text: str) -> bool:
    """Whether a line is a relative path."""
    return is_comment(text) or ("://" not in text and not text.startswith(("/", "~")))


def joined(base: str, text: str) -> str:
    """The input of a line whose list has base folder `base`."""
    if not base or not is_relative(text):
        return text
    return f"{(glob.escape(base) if WILDCARD.search(text) else base).rstrip('/')}/{text}"
