"""Snapshots, differences and statistics as lines of text. Takes JSON-ready dictionaries, returns lines."""

from __future__ import annotations

from typing import Any

from pipeline.units import quantities, quantity, size

SOURCES_SHOWN = 5
CHANNELS_SHOWN = 32


def published_lines(published: dict[str, Any]) -> list[str]:
    """Lines that describe a `Published`."""
    snapshot = published["snapshot"]
    lines = [f"snapshot {snapshot['number']}: {_contents(snapshot)}"] if published["made"] else []
    if published["made"]:
        lines += [_changes(snapshot), *check_lines(snapshot["checks"])]
    lines += [f"  note      {text}" for text in published["notices"]]
    return [*lines, f"  page      {published['page']}"] if "page" in published else lines


def snapshots_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe the snapshots of an output, a few lines each."""
    lines = [f"{found['output']}: {quantity(len(found['snapshots']), 'snapshot')}"]
    for item in found["snapshots"]:
        lines += [f"  {item['number']:>4}  {item['created']}  {_contents(item)}", f"        {_changes(item).strip()}"]
        if about := item["lineage"].get("compaction"):
            lines.append(f"        compacted: {quantity(about['files_before'], 'file')} became {about['files_after']}")
        if sidecars := item["lineage"].get("sidecars"):
            lines.append(
                f"        sidecars: {', '.join(f'{name}@{number}' for name, number in sorted(sidecars.items()))}"
            )
        if item["open_shards"]:
            number = item["tables"]["open"]["rows"] if "open" in item["tables"] else len(item["open_shards"])
            lines.append(f"        partial: {quantity(number, 'shard or input was', 'shards or inputs were')} not done")
        if item["passed_over"]:
            lines.append(f"        passed over damaged snapshots: {', '.join(map(str, item['passed_over']))}")
    return lines + [f"  {item['number']:>4}  {item['error']}" for item in found["damaged"]]


def diff_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a result of `pipeline.operate.diff`."""
    a, b = found["a"], found["b"]
    files, rows, sources = found["files"], found["rows"], found["sources"]
    lines = [
        f"{a['output']}@{a['snapshot']} -> {b['output']}@{b['snapshot']}: {a['rows']} -> {quantities(b, 'row')}, "
        f"{a['files']} -> {quantities(b, 'file')}",
        f"  rows      +{rows['added']} -{rows['dropped']}",
        f"  files     +{len(files['added'])} -{len(files['dropped'])}, {len(files['changed'])} show other rows, "
        f"{len(files['rewritten'])} rewritten by compaction",
        f"  sources   +{len(sources['added'])} -{len(sources['dropped'])}, {len(sources['replaced'])} replaced, "
        f"{len(sources['re_encoded'])} encoded again",
    ]
    if hidden := a["rows"] + rows["added"] - rows["dropped"] - b["rows"]:
        lines.insert(1, f"  note      {quantity(hidden, 'row')} that were taken down are left out of what follows")
    for sign, name in (("+", "added"), ("~", "replaced"), ("=", "re_encoded"), ("-", "dropped")):
        lines += [f"    {sign} {uri}" for uri in sources[name][:SOURCES_SHOWN]]
        if (rest := len(sources[name]) - SOURCES_SHOWN) > 0:
            lines.append(f"    {sign} and {rest} more")
    for what in ("buckets", "rejects"):
        if found[what]:
            lines.append(f"  {what:9} " + ", ".join(f"{name} {n:+d}" for name, n in found[what].items()))
    return lines


def stats_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a result of `pipeline.operate.statistics`."""
    where = f"{found['output']}@{found['snapshot']}" if found["snapshot"] else f"{found['output']} (nothing published)"
    lines = [where]
    if found["newer_takedowns"]:
        lines.append(
            f"  note      {quantity(found['newer_takedowns'], 'takedown is', 'takedowns are')} newer than this snapshot: exact numbers "
            "still contain the rows; `lathe publish` makes a snapshot without them"
        )
    for fingerprint, item in found["fingerprints"].items():
        exact, one = item["exact"], item["suggested"]["one_for_all"]
        lines.append(
            f"  fingerprint {fingerprint[:8]} ({item['network']}): {quantity(exact['values_per_channel'], 'value')} per channel "
            f"of {quantity(item['rows'], 'row')}"
        )
        lines.append("    channel        mean         std         min         max")
        for channel in range(min(len(exact["mean"]), CHANNELS_SHOWN)):
            values = [exact[name][channel] for name in ("mean", "std", "min", "max")]
            lines.append(f"    {channel:7d} " + " ".join(f"{value:11.4g}" for value in values))
        lines.append(
            f"    suggested   shift {one['shift']:.4g}, scale {one['scale']:.4g} for all channels; per channel: --json"
        )
        lines.append(f"    constants   {_constants(item)}")
        for bucket, part in item["buckets"].items():
            mean, std = (sum(part[name]) / len(part[name]) for name in ("mean", "std"))
            lines.append(
                f"    {bucket:14} {quantity(part['clips'], 'clip')} read: mean {mean:.4g}, standard deviation {std:.4g}"
            )
    return lines


def _constants(item: dict[str, Any]) -> str:
    constants, normalised = item["constants"], item["normalised_by_constants"]
    if normalised is None:
        return "the network's authors publish none"
    names = ", ".join(f"{name} {_short(value)}" for name, value in constants.items() if value is not None)
    return (
        f"{names}: normalised latents have mean {normalised['mean']:.3g} and standard deviation {normalised['std']:.3g}"
    )


def _short(value: Any) -> str:
    return quantity(len(value), "value") if isinstance(value, list) else f"{value:g}"


def _contents(snapshot: dict[str, Any]) -> str:
    counts = snapshot["counts"]
    return f"{quantities(counts, 'row', 'frame')} in {quantities(counts, 'file')}, {size(counts['bytes'])}"


def _changes(snapshot: dict[str, Any]) -> str:
    changes = snapshot["changes"]
    parent = f"snapshot {snapshot['parent']}" if snapshot["parent"] else "nothing"
    return (
        f"  against {parent}: inputs +{changes['inputs_added']} -{changes['inputs_removed']}, {changes['inputs_replaced']} replaced; "
        f"rows +{changes['rows_added']} -{changes['rows_dropped']}"
    )


def check_lines(checks: list[dict[str, Any]]) -> list[str]:
    """A line for each `Check`."""
    return list(map(_check, checks))


def _check(check: dict[str, Any]) -> str:
    state = "ok" if check["ok"] else "FAILED"
    return f"  check     {check['name']}: {state if check['judged'] else 'not judged'}{_numbers(check)}"


def _numbers(check: dict[str, Any]) -> str:
    """The numbers of a check that fit on a line."""
    values = {name: value for name, value in check["numbers"].items() if isinstance(value, (int, float))}
    shown = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
    return f" ({shown})" if shown else ""
