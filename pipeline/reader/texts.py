"""Parsers of captions and metadata: the bytes of a `.txt` or `.json` become text or JSON values, with warnings for the row.

Results can always be stored: text without control characters, replacement characters and halves of surrogate pairs; metadata that is
strict JSON, at most `LEVELS` deep. The warnings say what was lost or guessed.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

from pipeline.reader.text_encoding import decode_text

TEXT_BYTES = 4 * 1024 * 1024  # longest caption or JSON that is read; each row holds a copy
LEVELS = 32  # of nested objects and lists in metadata
CAPTION_KEYS = ("caption", "text", "prompt")
SMALLEST_INTEGER, LARGEST_INTEGER = -(2**63), 2**64 - 1  # range that JSON readers accept
INTEGER_DIGITS = 20
NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption. `text` is None if there is none or it cannot be decoded."""

    text: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata. `values` is empty if the JSON was refused; `caption` is its caption, even of a refused one."""

    values: dict[str, Any] = field(default_factory=dict)
    caption: Caption = Caption()
    warnings: tuple[str, ...] = ()


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
    caption = _caption_of(value)
    if _deeper(value, LEVELS):
        return Metadata(caption=caption, warnings=("deep_metadata",))
    return Metadata(parser.storable(value), caption, tuple(sorted(warnings)))


def _caption(text: str) -> Caption:
    warnings = ("replacement_characters",) if REPLACEMENT in text else ()
    return Caption(NOT_TEXT.sub("", text.replace(REPLACEMENT, "")).strip() or None, warnings)


def _caption_of(metadata: dict[str, Any]) -> Caption:
    texts = (metadata.get(name) for name in CAPTION_KEYS)
    captions = (_caption(text) for text in texts if isinstance(text, str))
    return next((caption for caption in captions if caption.text), Caption())


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
