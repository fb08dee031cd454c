"""Text of a list file as lines: encodings, comments, and what relative lines are relative to."""

from __future__ import annotations

import codecs
import glob
import os
import re

from pipeline.corpus.patterns import WILDCARD, expand_braces
from pipeline.errors import InputError

LONGEST_NAME = 1024  # bytes of a key on S3; a longer comment is not looked up as a name


def list_lines(data: bytes, name: str) -> list[str]:
    """Lines without those that are empty, comments included. `name`: of the list, for errors.

    UTF-8 and UTF-16 (with its byte order mark). Other bytes are those of a local file name, as `find` writes it.

    Raises:
        InputError: it is not text.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(
            f"list file {name} is not UTF-8 text, nor UTF-16 with a byte order mark; expected one input a line"
        )
    # Not splitlines(): it also splits at characters that names may hold (U+0085, U+2028, form feed).
    return [line for part in re.split(r"\r\n|\r|\n", text) if (line := part.strip(" \t\v\f"))]


def is_comment(line: str) -> bool:
    """Whether a line is a comment, unless a file has just this name."""
    return line.startswith("#")


def base_folder(folder: str, texts: list[str]) -> str:
    """What relative lines of a list are relative to: its folder, or the current one (empty) if the first of them is not there."""
    first = next((text for text in texts if is_relative(text) and not text.startswith("@")), None)
    if first is None or "://" in folder:
        return folder
    name = WILDCARD.split(expand_braces(first)[0])[0]
    looked_up = name.rpartition("/")[0] if WILDCARD.search(first) else name
    return folder if os.path.lexists(os.path.join(folder, looked_up)) else ""


def is_relative(text: str) -> bool:
    """Whether a line is relative to the list."""
    return is_comment(text) or ("://" not in text and not text.startswith(("/", "~")))


def joined(base: str, text: str) -> str:
    """A line as an input."""
    if not base or not is_relative(text):
        return text
    return f"{(glob.escape(base) if WILDCARD.search(text) else base).rstrip('/')}/{text}"
