"""Parser of annotated spans: a list in metadata, or rows of a table, becomes `TimeSpan`s with their captions and fields.

Accepted: `{"start": 1.5, "end": 4, "caption": "…"}` or `[1.5, 4]`; numbers as text; timecodes `00:01:02.500` and `1:02.5`; lists as text of
JSON or Python. A span that cannot be used keeps its place, with the fault: the decoder's reject names it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from typing import TYPE_CHECKING, Any

from pipeline.reader.texts import CAPTION_KEYS, distinct, parse_metadata
from pipeline.records import SpanTexts, TimeSpan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import ClipConfig

MOST_SPANS = 10_000  # of one sample
LONGEST = 60  # characters of a value in a message
MOST_PYTHON = (
    512 * 1024
)  # characters of a list written in Python: its parser takes a kilobyte for each, JSON's a few bytes
TIMECODE = re.compile(r"(?:(\d{1,6}):)?(\d{1,6}):(\d{1,2}(?:[.,]\d{1,9})?)")
EXPECTED = "expected {start, end} or [start, end], each a number or a timecode such as 00:01:02.500"
LONG = f"{EXPECTED}; a list longer than {MOST_PYTHON} characters must be JSON"

Spans = tuple[tuple[TimeSpan, ...], tuple[SpanTexts, ...]]


def spans_of(value: Any, captions: Sequence[Any] | None, config: ClipConfig) -> Spans:
    """Spans that a metadata field lists. `captions`: of as many spans, one each; None: spans have their own."""
    if value is None:
        return (), ()
    items = _list_of(value)
    if items is None:
        expected = LONG if isinstance(value, str) and len(value) > MOST_PYTHON else EXPECTED
        return _faulty(f"span 0 is {_shown(value)}; {expected}", {})
    of_spans: Sequence[Any] = captions if captions is not None and len(captions) == len(items) else [None] * len(items)
    return _joined([_span(number, item, of_spans[number], config) for number, item in enumerate(items)])


def listed_captions(value: Any) -> list[str | None] | None:
    """Captions of spans that a metadata field lists, as JSON or as text of JSON or Python; None if it is not a list of texts."""
    found = _literal(value) if isinstance(value, str) else value
    if not isinstance(found, list) or not all(text is None or isinstance(text, str) for text in found):
        return None
    return found


def spans_of_rows(rows: Sequence[dict[str, Any]], config: ClipConfig) -> Spans:
    """Spans of rows of a table with a start and an end each."""
    return _joined([_span(number, row, None, config) for number, row in enumerate(rows)])


def _joined(found: list[tuple[TimeSpan, SpanTexts]]) -> Spans:
    return tuple(span for span, _ in found), tuple(texts for _, texts in found)


def _faulty(fault: str, fields: dict[str, Any]) -> Spans:
    return (TimeSpan(0, 0, fault=fault),), (SpanTexts((), fields),)


def _list_of(value: Any) -> list[Any] | None:
    """A list, or text that is one in JSON or Python; None for anything else. A single span stands for a list of it."""
    if isinstance(value, str):
        value = _literal(value)
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else None


def _literal(text: str) -> Any:
    """The list or object that `text` is in JSON or Python; None for anything else."""
    text = text.strip()
    if not text.startswith(("[", "(", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if len(text) > MOST_PYTHON:
        return None
    try:
        found = ast.literal_eval(text)
        json.dumps(found, default=str)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # TypeError: a key that JSON cannot have
        return None
    return list(found) if isinstance(found, tuple) else found


def _span(number: int, item: Any, caption: Any, config: ClipConfig) -> tuple[TimeSpan, SpanTexts]:
    if isinstance(item, (list, tuple)) and len(item) == 2:
        item = {"start": item[0], "end": item[1]}
    if not isinstance(item, dict):
        return TimeSpan(0, 0, fault=f"span {number} is {_shown(item)}; {EXPECTED}"), SpanTexts()
    if isinstance(caption, str) and not any(item.get(name) for name in CAPTION_KEYS):
        item = {**item, "caption": caption}
    span = _bounds(number, item.get("start"), item.get("end"), config.spans_unit)
    parsed = parse_metadata(json.dumps(item, default=str).encode())  # storable, with a caption as of any other metadata
    return span, SpanTexts(distinct(parsed.captions), parsed.values)


def _bounds(number: int, start: Any, end: Any, unit: str) -> TimeSpan:
    shown = f"span {number} is {_shown(start)} to {_shown(end)}"
    low, high = _bound(start), _bound(end)
    if low is None or high is None:
        return TimeSpan(0, 0, fault=f"{shown}; {EXPECTED}")
    (first, first_timecode), (last, last_timecode) = low, high
    if not first < last:
        return TimeSpan(0, 0, fault=f"{shown}; expected a start before the end")
    if unit == "seconds" or (first_timecode and last_timecode):
        return TimeSpan(first, last)
    if first_timecode or last_timecode or first != int(first) or last != int(last):
        return TimeSpan(0, 0, fault=f"{shown}; expected whole frames, as clips.spans_unit is frames")
    return TimeSpan(first, last, "frames")


def _bound(value: Any) -> tuple[float, bool] | None:
    """A start or end, and whether it is a timecode; None if it is neither that nor a finite number."""
    if isinstance(value, str):
        if match := TIMECODE.fullmatch(value.strip()):
            hours, minutes, seconds = match.groups()
            return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", ".")), True
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        return None
    return float(value), False


def _shown(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
