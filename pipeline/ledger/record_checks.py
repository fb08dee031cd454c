"""Check of the parsed record of a snapshot before it is used: names, types, and numbers that have to agree. No I/O."""

from __future__ import annotations

from datetime import datetime
from typing import Any

COUNTS = ("shards", "samples", "encoded", "rejected", "damaged", "clips_rejected", "rows", "frames", "files", "bytes")
CHANGES = (
    "inputs_added",
    "inputs_replaced",
    "inputs_removed",
    "files_added",
    "files_dropped",
    "rows_added",
    "rows_dropped",
)
IN_BUCKET = ("files", "rows", "frames", "bytes")
IN_FINGERPRINT = ("shards", "files", "rows", "frames", "bytes")
TABLES = {"files", "receipts"}  # that every snapshot has


def check_record(raw: dict[str, Any]) -> None:
    """Checks a record without `format` and `format_version`.

    Raises:
        ValueError, KeyError, TypeError: a value is missing, of another type, or contradicts another.
    """
    number, parent = raw["number"], raw["parent"]
    _expect(_is_number(number) and number > 0, "number", number, "a number from 1")
    _expect(parent is None or (_is_number(parent) and 0 < parent < number), "parent", parent, "a lower number or null")
    _expect(isinstance(raw["created"], str), "created", raw["created"], "a time")
    datetime.fromisoformat(raw["created"])  # a ValueError that names the text
    _numbers("counts", raw["counts"], COUNTS)
    _numbers("changes", raw["changes"], CHANGES)
    for name in ("rejects", "warnings"):
        _numbers(name, raw[name])
    for name, counts in raw.get("videos", {}).items():
        _numbers(f"videos.{name}", counts)
    for name, bucket in raw["buckets"].items():
        _numbers(f"buckets.{name}", bucket, IN_BUCKET)
    for name in ("open_shards", "takedowns"):
        _expect(_is_list(raw[name], str), name, raw[name], "a list of strings")
    _expect(_is_list(raw["passed_over"], int), "passed_over", raw["passed_over"], "a list of numbers")
    _expect(isinstance(raw["lineage"], dict), "lineage", raw["lineage"], "an object")
    for name, item in raw["fingerprints"].items():
        _numbers(f"fingerprints.{name}", {key: item[key] for key in IN_FINGERPRINT}, IN_FINGERPRINT)
    for name in ("shards", "files", "rows", "frames", "bytes"):
        found = sum(item[name] for item in raw["fingerprints"].values())
        _expect(found == raw["counts"][name], f"{name} of all fingerprints", found, str(raw["counts"][name]))
    _expect(set(raw["tables"]) >= TABLES, "tables", sorted(raw["tables"]), "files and receipts")
    for name, item in raw["tables"].items():
        texts = all(isinstance(item[key], str) for key in ("key", "sha256"))
        _expect(texts and _is_number(item["num_bytes"]) and _is_number(item["rows"]), name, item, "a table")


def _numbers(name: str, values: Any, names: tuple[str, ...] = ()) -> None:
    _expect(isinstance(values, dict), name, values, "an object")
    missing = [each for each in names if each not in values]
    _expect(not missing, name, sorted(values), f"also {', '.join(missing)}")
    for each, value in values.items():
        _expect(_is_number(value) and value >= 0, f"{name}.{each}", value, "a number from 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _expect(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {found!r:.100}, expected {expected}")
