"""The story of one input as lines of text. Takes the dictionary of `pipeline.operate.why`."""

from __future__ import annotations

from typing import Any

from pipeline.units import size

ROWS_SHOWN = 8
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


def why_lines(story: dict[str, Any]) -> list[str]:
    """State, place, receipts with rows and rejects, snapshots, takedowns."""
    lines = [f"{story['name']}: {STATES[story['state']]}", f"  input     {_place(story['where'])}"]
    for version in story["versions"]:
        lines += _version_lines(version)
    lines += [f"  receipt   {key}, where `lathe gc` moved it; its files go" for key in story.get("retired", ())]
    if story.get("note"):
        lines.append(f"  reason    {story['note']}")
    for build in story.get("builds", ()):
        lines.append(f"  build     {_build(build)}")
    if story.get("open_in") is not None:
        lines.append(f"  snapshot  {story['open_in']} records it as not done")
    if story["versions"]:
        lines.append(f"  snapshots {_snapshots(story)}")
    lines += [f"  takedown  {item['created']}: {item['reason']} ({item['key']})" for item in story["takedowns"]]
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
            f"    row       {row['id']}: {row['num_frames']} frames{fps} in bucket {row['bucket']}, {row['dtype']} {shape}, "
            f"row {row['row']} of {row['file']}"
        )
    if version["num_rows"] > ROWS_SHOWN:
        lines.append(
            f"    row       … and {version['num_rows'] - ROWS_SHOWN} more, --json lists {len(version['rows'])}"
        )
    if version["num_taken_down"]:
        lines.append(f"    hidden    {version['num_taken_down']} of {version['num_rows']} rows are taken down")
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
    return f", clips: {rules.get('select')}, fps {rules.get('fps') or 'source'}"


def _build(build: dict[str, Any]) -> str:
    live = "runs;" if build["live"] else "is over; it was"
    shard = f", shard {build['shard']}" if build.get("shard") else ""
    worker = f" on {build['worker']}" if build.get("worker") and build["state"] == "running" else ""
    reason = f": {build['reason']}" if build.get("reason") and build["state"] != "running" else ""
    return f"{build['build']} {live} {build['state'].replace('_', ' ')} since {build['since']}{shard}{worker}{reason}"


def _snapshots(story: dict[str, Any]) -> str:
    shown = [f"{item['number']} ({item['rows']} rows)" for item in story["snapshots"] if item["rows"]]
    damaged = [f"; {item['note']}" for item in story["snapshots"] if item["rows"] is None]
    looked = story["snapshots_looked"]
    if not looked:
        return "nothing is published yet"
    if not shown:
        text = f"none of {looked[0]} to {looked[-1]} shows it" if len(looked) > 1 else f"{looked[0]} does not show it"
    else:
        text = f"shown by {', '.join(shown[-8:])}" + (f" and {len(shown) - 8} earlier" if len(shown) > 8 else "")
        if looked[-1] not in {item["number"] for item in story["snapshots"]}:
            text += f"; the newest, {looked[-1]}, does not show it"
    return text + "".join(damaged)
