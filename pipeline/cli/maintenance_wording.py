"""Takedowns and garbage collection as lines of text. Takes JSON-ready dictionaries, returns lines."""

from __future__ import annotations

from typing import Any

SNAPSHOTS_SHOWN = 5
NAMES_SHOWN = 5


def takedown_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a result of `pipeline.operate.takedown.take_down`."""
    what = _counted(found)
    if found["dry_run"]:
        lines = [f"would take down {what}; nothing was recorded"]
    elif found["record"] is None:
        lines = ["nothing was recorded: earlier takedowns hide all of it"]
    else:
        lines = [f"taken down: {what}  ({found['record']})"]
    lines += [f"  already   {name}" for name in _some(found["already"])]
    if found["unknown"]:
        lines.append(f"  unknown   {', '.join(_some(found['unknown']))}: will not be encoded")
    if found["rows"]:
        lines.append(
            "  note      an id is that of one clip under one fingerprint; to hide a video whatever the settings, name its source or sample"
        )
    return lines + _view_lines(found, "hidden", "rows hidden")


def undo_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a result of `pipeline.operate.takedown.undo`."""
    lines = [f"undone: {', '.join(found['undone'])}"]
    if found["again"]:
        lines.append(f"  stays     its other names stay hidden by {', '.join(found['again'])}")
    return [*lines, *_view_lines(found, "shown", "rows shown again"), PUBLISH_AGAIN]


PUBLISH_AGAIN = "  note      snapshots that were published after the takedown do not have these rows; the next `lathe publish` has them"


def history_lines(records: list[dict[str, Any]]) -> list[str]:
    """Lines that describe all takedowns."""
    if not records:
        return ["no takedowns"]
    lines = []
    for item in records:
        state = "undone" if item["undone"] else "names removed" if item["names_removed"] else "hides"
        by = f" by {item['by']}" if item["by"] else ""
        lines.append(f"{item['record']}  {item['created']}{by}: {state}, {_counted(item)}")
        if item["reason"]:
            lines.append(f"  reason    {item['reason']}")
        names = [*item["sources"], *(f"{uri}#{key}" for uri, key in item["samples"]), *item["rows"]]
        lines += [f"  name      {name}" for name in _some(names)]
        lines += [f"  hash      {name}" for name in _some(item["hashed"])]
        if item["undone"]:
            who = f" by {item['undone']['by']}" if item["undone"]["by"] else ""
            lines.append(f"  undone    {item['undone']['created']}{who} {item['undone']['reason']}".rstrip())
    return lines


def _counted(found: dict[str, Any]) -> str:
    parts = [(len(found[name]), name) for name in ("sources", "samples", "rows")]
    if found.get("hashed"):
        parts.append((len(found["hashed"]), "hashed names"))
    return ", ".join(f"{n} {name[:-1] if n == 1 else name}" for n, name in parts if n) or "nothing"


def _some(names: list[str]) -> list[str]:
    more = [f"… and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return [*names[:NAMES_SHOWN], *more]


def _view_lines(found: dict[str, Any], label: str, what: str) -> list[str]:
    counts = sorted(((int(number), n) for number, n in found["snapshots"].items()), reverse=True)
    parts = [f"snapshot {number}: {n}" for number, n in counts[:SNAPSHOTS_SHOWN]]
    if len(counts) > SNAPSHOTS_SHOWN:
        rest = [n for _, n in counts[SNAPSHOTS_SHOWN:]]
        parts.append(f"{len(rest)} older ones: {min(rest)} to {max(rest)}")
    lines = [f"  {label:9} {what}: {', '.join(parts) or 'no snapshot yet'}"]
    stored = found["stored"]
    if stored["rows"] and label == "hidden":
        lines.append(
            f"  stored    {stored['rows']} rows in {stored['files']} files keep their bytes until `lathe compact` and `lathe gc`"
        )
    if found["delta"] is not None:
        lines.append("  delta     rewritten from version 0")
    return lines + [f"  note      {text}" for text in found["notices"]]
