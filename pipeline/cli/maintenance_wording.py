"""Takedowns and garbage collection as lines of text. Takes JSON-ready dictionaries, returns lines."""

from __future__ import annotations

from typing import Any

from pipeline.units import quantities, quantity, size

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
    if found["skipped"]:
        lines.append(
            f"  skipped   {quantity(len(found['skipped']), 'line')} of lists that begin with # and name nothing"
        )
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
    parts = [(len(found[f"{name}s"]), name) for name in ("source", "sample", "row")]
    if found.get("hashed"):
        parts.append((len(found["hashed"]), "hashed name"))
    return ", ".join(quantity(n, name) for n, name in parts if n) or "nothing"


def _some(names: list[str]) -> list[str]:
    """The first `NAMES_SHOWN`, and how many there are beside."""
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
            f"  stored    {quantities(stored, 'row')} in {quantities(stored, 'file')}: the bytes stay until `lathe compact` and `lathe gc`"
        )
    if found.get("sidecars"):
        lines.append(
            f"  sidecars  {', '.join(found['sidecars'])}: tensors of these rows stay until `lathe sidecar prune`"
        )
    if found["delta"] is not None:
        lines.append(f"  delta     rewritten{': no version names these files' if label == 'hidden' else ''}")
    return lines + [f"  note      {text}" for text in found["notices"]]


REASONS = {
    "orphan": "that no receipt names",
    "taken_down": "whose rows are all taken down",
    "compacted": "that `lathe compact` replaced",
    "replaced": "of inputs that were replaced or dropped",
}
KEPT = {
    "young": "younger than the grace time",
    "pending": "of receipts that no snapshot covers yet",
    "waiting": "of receipts that retired less than the grace time ago",
    "of_running_build": "that a running build may have written",
    "in_use": "without a row that counts, of receipts of which other rows count",
}


def gc_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a result of `pipeline.operate.gc.collect`."""
    deleted, snapshots, takedowns = found["deleted"], found["snapshots"], found["takedowns"]
    would = "would delete" if found["dry_run"] else "deleted"
    files = [(deleted[name], words) for name, words in REASONS.items() if deleted[name]["files"]]
    total = {part: sum(item[part] for item, _ in files) for part in ("files", "bytes")}
    data_files = quantity(total["files"], "data file with its index", "data files with their indexes")
    lines = [f"{would} {data_files}, {size(total['bytes'])}"]
    lines += [f"  files     {item['files']} {words}, {size(item['bytes'])}" for item, words in files]
    if snapshots["retired"]:
        go = "would go" if found["dry_run"] else "deleted"
        lines.append(f"  snapshots {_numbers(snapshots['retired'])} {go}, {len(snapshots['retained'])} kept")
    if snapshots["forgotten"]:
        lines.append(
            f"  forgotten {_numbers(snapshots['forgotten'])} of these named files with rows that were taken down"
        )
    others = [
        (deleted["tables"]["files"], "table of snapshots", "tables of snapshots"),
        (deleted["heartbeats"], "old heartbeat", ""),
        (deleted["scratch"], "scratch object", ""),
        (deleted["leftovers"]["files"], "unfinished upload or write", "unfinished uploads or writes"),
        (deleted["runs"]["files"], "part of old run logs and reports", "parts of old run logs and reports"),
    ]
    if shown := ", ".join(quantity(*item) for item in others if item[0]):
        lines.append(f"  others    {shown}")
    if found["receipts"]["retired"]:
        moved = "would move" if found["dry_run"] else "moved"
        lines.append(
            f"  retired   {moved} {quantity(found['receipts']['retired'], 'receipt')}, nothing of which counts, to _retired/"
        )
    if found["receipts"]["restored"]:
        lines.append(
            f"  restored  {quantity(found['receipts']['restored'], 'retired receipt counts', 'retired receipts count')} again"
        )
    for name, words in KEPT.items():
        if n := found["kept"].get(name):
            of = f", {size(found['waiting']['bytes'])}" if name == "waiting" else ""
            lines.append(f"  kept      {quantity(n, 'file')} {words}{of}")
    lines += [f"  running   build {name}" for name in found["running"]]
    if takedowns["names_removed"]:
        state = "would be " if found["dry_run"] else ""
        lines.append(
            f"  takedowns names of {len(takedowns['names_removed'])} {state}replaced by hashes: no bytes are left"
        )
    lines += [f"  takedowns {text}" for text in _some([_stored(item) for item in takedowns["stored"]])]
    if foreign := found["foreign"]["objects"]:
        lines.append(
            f"  foreign   {quantity(foreign, 'object')} that Lathe did not make, such as {found['foreign']['names'][0]}: left alone"
        )
    return lines + [f"  note      {text}" for text in found["notices"]]


def _stored(item: dict[str, Any]) -> str:
    where = f", named by snapshots {_numbers(item['snapshots'])}" if item["snapshots"] else ""
    files = quantity(item["files"], "stored file still holds", "stored files still hold")
    return (
        f"{item['record']}: {files} its rows{where}; `lathe compact` rewrites files of the newest snapshot, `lathe gc --forget` lets go of "
        "older ones"
    )


def _numbers(numbers: list[int]) -> str:
    """`[1, 2, 3, 7]` -> `1 to 3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join(" to ".join(map(str, part)) for part in parts)
