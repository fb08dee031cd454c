"""History of one input as lines of text. Takes the dictionary of `pipeline.operate.why`."""

from __future__ import annotations

from typing import Any

from pipeline.units import quantity, size

ROWS_SHOWN = 8
SNAPSHOTS_SHOWN = 8
STATES = {
    "encoded": "encoded",
    "rejected": "not encoded",
    "taken_down": "taken down: no reader shows it",
    "superseded": "encoded, and nothing of it counts: another receipt has the input",
    "running": "being encoded",
    "waiting": "to be tried again by a running build",
    "given_up": "given up by a build; the next run tries it again",
    "pending": "to be encoded by a running build",
    "open": "not encoded yet",
    "passed_over": "not encoded: it is neither a tar nor a video",
    "retired": "encoded once, and nothing of it counts: the input was replaced or dropped",
}


def why_lines(history: dict[str, Any]) -> list[str]:
    """State, place, receipts with rows and rejects, snapshots, takedowns."""
    lines = [f"{history['name']}: {STATES[history['state']]}", f"  input     {_place(history['where'])}"]
    for version in history["versions"]:
        lines += _version_lines(version)
    lines += [f"  receipt   {key}, where `lathe gc` moved it; its files go" for key in history.get("retired", ())]
    if history.get("note"):
        lines.append(f"  reason    {history['note']}")
    for build in history.get("builds", ()):
        lines.append(f"  build     {_build(build)}")
    if history.get("open_in") is not None:
        lines.append(f"  snapshot  {history['open_in']} records it as not done")
    if history["versions"]:
        lines.append(f"  snapshots {_snapshots(history)}")
    lines += [f"  takedown  {item['created']}: {item['reason']} ({item['key']})" for item in history["takedowns"]]
    return lines


def _place(where: dict[str, Any]) -> str:
    if where["there"] is None:
        return f"{where['uri']}: it cannot be said whether it is there ({where['note']})"
    if not where["there"]:
        return f"{where['uri']}: no longer there"
    changed = "; it has changed since, and the next run encodes it again" if where.get("changed") else ""
    return f"{where['uri']}, {size(where['size'])}{changed}"


def _version_lines(version: dict[str, Any]) -> list[str]:
    counts = "" if version["counts"] else "; does not count, another receipt has the input"
    retry = f", a retry of {version['retry_of']}" if version["retry_of"] else ""
    build = f" by build {version['build']}" if version["build"] else ""
    lines = [
        f"  receipt   {version['receipt']} of {version['created']}{build}{retry}{counts}",
        f"    shard     {version['shard']}, fingerprint {version['fingerprint'][:8]}{_rules(version['clip_rules'])}",
    ]
    if version["same_as"]:
        lines.append(f"    unchanged its bytes are those that shard {version['same_as']} encoded")
    for row in version["rows"][:ROWS_SHOWN]:
        fps = f" at {row['fps']:g} fps" if isinstance(row["fps"], int | float) else ""
        shape = "x".join(map(str, row["shape"]))
        lines.append(
            f"    row       {row['id']}: {quantity(row['num_frames'], 'frame')}{fps} in bucket {row['bucket']}, {row['dtype']} {shape}, "
            f"row {row['row']} of {row['file']}"
        )
    if version["num_rows"] > ROWS_SHOWN:
        lines.append(
            f"    row       … and {version['num_rows'] - ROWS_SHOWN} more, --json lists {len(version['rows'])}"
        )
    if version["num_taken_down"]:
        lines.append(f"    hidden    {version['num_taken_down']} of {quantity(version['num_rows'], 'row')} taken down")
    for reject in version["rejects"][:ROWS_SHOWN]:
        clip = "" if reject["clip"] is None else f" clip {_clip(reject['clip'], version['variants'])}"
        kind = "by the job's rules" if reject["policy"] else "damaged"
        lines.append(f"    reject    {reject['key']}{clip}: {reject['reason']} ({kind}): {reject['message']}")
    if version["num_rejects"] > ROWS_SHOWN:
        lines.append(f"    reject    … and {version['num_rejects'] - ROWS_SHOWN} more")
    if not version["num_rows"] and not version["num_rejects"] and not version["same_as"]:
        lines.append("    nothing   this receipt has no row and no reject of it")
    return lines


def _clip(number: int, variants: list[str]) -> str:
    """The clip and the variant with this number among all that is cut from the video."""
    clip, variant = divmod(number, len(variants))
    return str(clip) if len(variants) == 1 else f"{clip} ({variants[variant]})"


def _rules(rules: dict[str, Any] | None) -> str:
    if not rules:
        return ""
    inside = "spans:" if rules.get("spans") else ""
    return f", clips: {inside}{rules.get('select')}, fps {rules.get('fps') or 'source'}"


def _build(build: dict[str, Any]) -> str:
    live = "runs;" if build["live"] else "is over; it was"
    shard = f", shard {build['shard']}" if build.get("shard") else ""
    worker = f" on {build['worker']}" if build.get("worker") and build["state"] == "running" else ""
    reason = f": {build['reason']}" if build.get("reason") and build["state"] != "running" else ""
    return f"{build['build']} {live} {build['state'].replace('_', ' ')} since {build['since']}{shard}{worker}{reason}"


def _snapshots(history: dict[str, Any]) -> str:
    looked = history["snapshots_looked"]
    if not looked:
        return "nothing is published yet"
    found = history["snapshots"]
    shown = [f"{item['number']} ({quantity(item['rows'], 'row')})" for item in found if item["rows"]]
    hidden = [f"{item['number']} ({quantity(item['taken_down'], 'row')})" for item in found if item.get("taken_down")]
    if shown:
        parts = [f"shown by {_some(shown)}"]
        if looked[-1] not in {item["number"] for item in found}:
            parts.append(f"the newest, {looked[-1]}, does not show it")
    elif len(looked) > 1:
        parts = [f"none of {looked[0]} to {looked[-1]} shows it"]
    else:
        parts = [f"{looked[0]} does not show it"]
    if hidden:
        parts.append(f"hidden by takedowns in {_some(hidden)}")
    return "; ".join([*parts, *(item["note"] for item in found if item["rows"] is None)])


def _some(snapshots: list[str]) -> str:
    """The newest, and how many there are beside."""
    more = len(snapshots) - SNAPSHOTS_SHOWN
    return ", ".join(snapshots[-SNAPSHOTS_SHOWN:]) + (f" and {more} earlier" if more > 0 else "")
