"""Parsers of captions and metadata: the bytes of a `.txt` or `.json` become text or JSON values, with warnings for the row.

Results can always be stored: text without control characters, replacement characters and halves of surrogate pairs; metadata that is
strict JSON, at most `LEVELS` deep. The warnings say what was lost or guessed.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipeline.reader.text_encoding import decode_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TEXT_BYTES = 4 * 1024 * 1024  # longest caption or JSON that is read; each row holds a copy
LEVELS = 32  # of nested objects and lists in metadata
CAPTION_KEYS = ("caption", "text", "prompt")
CAPTIONS_KEY = "captions"
USUAL_NAMES = frozenset(("", "txt", "caption", "text", CAPTIONS_KEY))  # of files and fields that hold the one caption
MOST_CAPTIONS = 256  # of one sample
SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**64 - 1  # range that JSON readers accept
INTEGER_DIGITS = 20
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption. `text` is None if there is none or it cannot be decoded. `name`: which of the sample's captions it is."""

    text: str | None = None
    warnings: tuple[str, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata. `values` is empty if the JSON was refused; `captions` are its captions, even of a refused one."""

    values: dict[str, Any] = field(default_factory=dict)
    captions: tuple[Caption, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def caption(self) -> Caption:
        """The first of its captions."""
        return next(iter(self.captions), Caption())


def parse_caption(data: bytes) -> Caption:
    """Caption in any encoding that `decode_text` detects; None with a warning if it detects none."""
    if len(data) > TEXT_BYTES:
        return Caption(None, ("oversized_caption",))
    decoded = decode_text(data)
    if decoded is None:
        return Caption(None, ("undecodable_caption",))
    caption = _caption(decoded.text)
    if not decoded.guessed or caption.text is None:
        return caption
    return Caption(caption.text, (f"caption_encoding:{decoded.encoding}", *caption.warnings))


def parse_metadata(data: bytes) -> Metadata:
    """Metadata of a JSON object; empty with a warning for anything else."""
    if len(data) > TEXT_BYTES:
        return Metadata(warnings=("oversized_metadata",))
    decoded = decode_text(data)
    if decoded is None:
        return Metadata(warnings=("undecodable_metadata",))
    warnings: set[str] = set()
    if decoded.guessed:
        warnings.add(f"metadata_encoding:{decoded.encoding}")
    parser = _Parser(warnings)
    try:
        value = parser.parse(decoded.text.lstrip("\ufeff\0").rstrip("\0"))
    except RecursionError:  # some thousand levels
        return Metadata(warnings=("deep_metadata",))
    except ValueError:
        return Metadata(warnings=("bad_json",))
    if not isinstance(value, dict):
        return Metadata(warnings=("json_not_an_object",))
    captions, unusable = _captions_of(value)
    if unusable:
        warnings.add(f"unusable_captions:{unusable}")
    if _deeper(value, LEVELS):
        return Metadata(captions=captions, warnings=("deep_metadata",))
    return Metadata(parser.storable(value), captions, tuple(sorted(warnings)))


def distinct(captions: Iterable[Caption]) -> tuple[tuple[str, str], ...]:
    """(name, text) of captions that have a text, at most `MOST_CAPTIONS`: each text once, and again by each name that it was given."""
    found: dict[tuple[str, str], None] = {}
    texts: set[str] = set()
    for caption in captions:
        if caption.text is not None and (caption.text not in texts or is_given(caption.name)):
            found[caption.name, caption.text] = None
            texts.add(caption.text)
    return tuple(islice(found, MOST_CAPTIONS))


def is_given(name: str) -> bool:
    """Whether an author chose the name of a caption, and the loader may be asked for it; not a place in a list, or a usual field."""
    return not name.isdigit() and name not in USUAL_NAMES


def caption_text(text: str) -> str:
    """`text` as captions are stored: without what is not text, and without blanks around it."""
    return NOT_TEXT.sub("", text.replace(REPLACEMENT, "")).strip()


def _caption(text: str, name: str = "") -> Caption:
    warnings = ("replacement_characters",) if REPLACEMENT in text else ()
    return Caption(caption_text(text) or None, warnings, name)


def _captions_of(metadata: dict[str, Any]) -> tuple[tuple[Caption, ...], int]:
    """Captions of metadata that have a text, and the number of entries of `captions` that have none."""
    single = [(name, text) for name in CAPTION_KEYS if isinstance(text := metadata.get(name), str)]
    listed = list(_entries(metadata.get(CAPTIONS_KEY)))
    several = [(name, text) for name, text in listed if isinstance(text, str)]
    captions = [_caption(text, _storable_text(name)) for name, text in (*single, *several[:MOST_CAPTIONS])]
    usable = sum(bool(caption.text) for caption in captions[len(single) :])
    return tuple(caption for caption in captions if caption.text), len(listed) - usable


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, text) of a list of captions, or of an object of named ones, each a text, a list, or an object with a text. `value` may be
    such a list as text of JSON, as a cell of a table.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):  # a caption that begins with a bracket
            value = json.loads(value)
    if isinstance(value, dict):
        for name, texts in value.items():
            yield from ((name, text) for text in (texts if isinstance(texts, list) else [texts]))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, dict):
                name = item.get("name")
                text = next((item[key] for key in CAPTION_KEYS if isinstance(item.get(key), str)), None)
                yield name if isinstance(name, str) else str(number), text
            else:
                yield str(number), item
    elif value is not None:
        yield CAPTIONS_KEY, value


class _Parser:
    """Parser of JSON to plain values. Adds to `warnings` what strict readers would refuse."""

    def __init__(self, warnings: set[str]) -> None:
        self._warnings = warnings

    def parse(self, text: str) -> Any:
        """Values as of `json.loads`, but None for NaN and Infinity and strings for huge integers."""
        return json.loads(text, parse_constant=self._constant, parse_int=self._integer, object_pairs_hook=self._object)

    def storable(self, value: Any) -> Any:
        """`value` with strings and numbers that every JSON reader accepts."""
        if isinstance(value, str):
            return _storable_text(value)
        if isinstance(value, float) and not math.isfinite(value):  # 1e999
            return self._constant("Infinity")
        if isinstance(value, dict):
            return {_storable_text(name): self.storable(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self.storable(item) for item in value]
        return value

    def _constant(self, _: str) -> None:
        self._warnings.add("nonfinite_metadata")

    def _integer(self, digits: str) -> int | str:
        if len(digits) <= INTEGER_DIGITS and SMALLEST_INTEGER <= int(digits) <= LARGEST_INTEGER:
            return int(digits)
        self._warnings.add("huge_integers")
        return digits

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._warnings.add("repeated_json_keys")
        return found


def _deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list) and (not levels or any(_deeper(item, levels - 1) for item in value))


def _storable_text(text: str) -> str:
    r"""`text` without NUL, and with escapes (`\ud800`) for halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.replace("\0", "").encode("utf-8", "backslashreplace").decode("utf-8")
