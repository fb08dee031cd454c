"""Results as lines of text: plans, statuses, inspections, verifications, networks, builds. Takes their JSON-ready dictionaries."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from pipeline.cli.build_wording import builds_lines
from pipeline.units import duration, quantities, quantity, size

if TYPE_CHECKING:
    from pipeline.engine.driver.report import BuildReport

FAILURES_SHOWN = 10
SHAPES_SHOWN = 6  # whole clips have as many shapes as lengths
EXPLAINED = "explained in docs/rejects.md"
# Warnings without any loss; they are listed last.
HARMLESS = (
    "skipped_directory", "skipped_appledouble", "skipped_hidden", "skipped_meta", "reopened_keys", "resolved_hardlinks",
    "concatenated_archives", "short_end_marker", "cut_compression_trailer", "empty_archives",
)  # fmt: skip


def warning_lines(warnings: dict[str, int]) -> list[str]:
    """`Receipt.warnings` as one line, most frequent first, harmless ones last; no line if there are none."""
    ordered = sorted(warnings.items(), key=lambda item: (item[0] in HARMLESS, -item[1], item[0]))
    return ["  warnings  " + ", ".join(f"{warning} {n}" for warning, n in ordered)] if ordered else []


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """A `Forecast`."""
    images = f", first frames about {size(plan['first_frame_bytes'])}" if plan["first_frame_bytes"] else ""
    lines = [
        f"{quantities(plan, 'sample')}: {quantity(plan['with_clips'], 'gives', 'give')} {quantities(plan, 'clip')}, "
        f"{quantity(plan['without_clips'], 'gives', 'give')} none",
        f"  video     {duration(plan['video_seconds'])} opened, {duration(plan['clip_seconds'])} in clips, {quantities(plan, 'frame')}",
        f"  latents   about {size(plan['latent_bytes'])}{images}",
        "  buckets",
    ]
    for name, fill in sorted(plan["buckets"].items()):
        lines.append(f"    {name:14} {quantities(fill, 'clip', 'frame')}, {size(fill['latent_bytes'])}")
    if plan["dropped"]:
        lines.append(f"  dropped   ({EXPLAINED})")
    for reason, item in sorted(plan["dropped"].items(), key=lambda pair: -pair[1]["count"]):
        kind = "by the job's rules" if item["policy"] else "damaged"
        lines.append(f"    {reason:14} {item['count']} ({kind}; {', '.join(item['keys'])}): {item['message']}")
    if plan["compile"]:
        lines.append(f"  compile   {_compile_text(plan['compile'])}")
    lines += [f"  note      {text}" for text in plan["notices"]]
    if plan["passed_over"]:
        lines.append(f"  {plan['passed_over']['line']}")
    return lines + warning_lines(plan["warnings"])


def _compile_text(found: dict[str, Any]) -> str:
    """A `CompileForecast`."""
    text = f"{'on' if found['on'] else 'off'} in a new output, {found['reason']}"
    if found["on"]:
        text += (
            f"; planned clips have {quantity(found['sizes'], 'size')}, {duration(found['compile_s'])} for each encoder"
        )
    if found["saved_core_s"]:
        text += f", and save {duration(found['saved_core_s'])} of one core"
    return text


def status_lines(status: dict[str, Any]) -> list[str]:
    """The dictionary of `pipeline.operate.status`."""
    snapshot = status.get("snapshot")
    what = (
        f"snapshot {snapshot['number']} of {snapshot['created']}"
        if snapshot
        else f"last commit {status['last_commit'] or 'never'}"
    )
    lines = [
        f"{status['output']}: {quantities(status, 'shard')} done, {what}",
        f"  samples   {status['samples']} in = {status['encoded']} encoded + {status['rejected']} rejected",
        f"  clips     {status['clips']} written + {status['clips_rejected']} rejected, {quantities(status, 'frame', 'file')}, "
        f"{size(status['bytes'])}",
    ]
    if status["rejects"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in status["rejects"].items())
        lines.append(f"  rejects   {reasons} ({EXPLAINED})")
    lines += warning_lines(status["warnings"])
    for fingerprint, shards in status["fingerprints"].items():
        lines.append(f"  encoder   fingerprint {fingerprint[:8]}: {quantity(shards, 'shard')}")
    if pending := status.get("pending"):
        lines.append(
            f"  pending   {quantities(pending, 'shard')} with {quantities(pending, 'clip')} that no snapshot has yet; "
            "`lathe publish` takes them in"
        )
    return lines + builds_lines(status)


def verify_lines(report: dict[str, Any]) -> list[str]:
    """The dictionary of a `VerifyReport`."""
    verdict = "no problems" if report["ok"] else quantity(len(report["problems"]), "problem")
    lines = [
        f"{report['root']}: {verdict}",
        f"  checked   {quantities(report, 'shard', 'file', 'row', 'frame')}, {size(report['bytes_read'])} read",
    ]
    if report["orphans"]:
        lines.append(
            f"  orphans   {quantity(report['orphans'], 'file')} that no receipt names ({size(report['orphan_bytes'])}), harmless"
        )
    lines += [f"  note      {text}" for text in report["notices"]]
    lines += [f"  problem   {p['file']}: found {p['found']}, expected {p['expected']}" for p in report["problems"]]
    return lines


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """The dictionary of `pipeline.operate.inspect`, of a file or an output."""
    if found["kind"] != "output":
        return [
            f"{found['uri']}: {found['kind']}",
            *_tree({k: v for k, v in found.items() if k not in ("uri", "kind")}, 1),
        ]
    lines = [f"{found['uri']}: latent set {found['name']} ({found['uuid']}), made {found['created']}"]
    for item in found["fingerprints"]:
        lines.append(f"  fingerprint {item['fingerprint']}")
        lines += _tree({k: v for k, v in item.items() if k != "fingerprint"}, 2)
    return lines


def _tree(value: Any, depth: int) -> list[str]:
    """Nested dictionaries as indented lines, short ones on one line."""
    pad = "  " * depth
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and item and len(json.dumps(item, default=str)) > 100:
            lines.append(f"{pad}{name}")
            lines += _tree(item, depth + 1)
        elif item not in (None, {}, [], ()):
            text = item if isinstance(item, str) else json.dumps(item, default=str)
            lines.append(f"{pad}{name:14} {text if len(text) <= 200 else text[:197] + '...'}")
    return lines


def _normalisation(spec: dict[str, Any]) -> str:
    """The recommended normalisation of latents, in a few characters."""

    def value(number: Any) -> str:
        return quantity(len(number), "value") if isinstance(number, (list, tuple)) else f"{number:g}"

    if spec["mean"] is not None:
        return "mean/std per channel"
    if spec["scale"] is None:
        return "none known"
    return f"scale {value(spec['scale'])}" + (f", shift {value(spec['shift'])}" if spec["shift"] is not None else "")


def models_lines(cards: dict[str, Any]) -> list[str]:
    """Table of the networks in the registry."""
    rows = [("name", "channels", "stride", "frames", "pixels in", "normalisation", "chunks", "licence", "weights")]
    for name, card in cards.items():
        spec = card["spec"]
        low, high = spec["value_range"]
        rows.append(
            (
                name,
                str(spec["latent_channels"]),
                f"{spec['time_stride']}x{spec['space_stride']}x{spec['space_stride']}",
                card["frames"],
                f"[{low:g}, {high:g}]",
                _normalisation(spec),
                {"none": "whole clips"}.get(spec["chunking"], spec["chunking"]),
                card["licence"],
                card["published"] or "none published",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def model_lines(cards: dict[str, Any]) -> list[str]:
    """Full description of one network."""
    ((name, card),) = cards.items()
    spec = card["spec"]
    also = f" (also {', '.join(card['aliases'])})" if card["aliases"] else ""
    lines = [
        f"{name}{also}: {spec['latent_channels']} channels, {spec['time_stride']}x{spec['space_stride']}x{spec['space_stride']}, "
        f"{card['frames']} frames, pixels in {list(spec['value_range'])}",
        f"  chunking  {spec['chunking']}",
        f"  channels  {spec['channel_semantics'] or 'no meaning known'}",
    ]
    lines += [
        f"  {key:9} {json.dumps(spec[key])}" for key in ("scale", "shift", "mean", "std") if spec[key] is not None
    ]
    lines += [
        f"  config    {json.dumps(card['config'])}",
        f"  weights   {card['published'] or 'none published that can be fetched'}",
        f"  licence   {card['licence']}",
        f"  source    {card['source']}",
    ]
    return lines + ([f"  note      {card['note']}"] if card["note"] else [])


def check_lines(verdict: dict[str, Any]) -> list[str]:
    """The dictionary of `check_network`."""
    origin = "UNTRAINED random weights" if verdict["untrained"] else f"weights {verdict['weights_sha256'][:12]}"
    claims = {"exact": "bit for bit", "rounding": "to rounding", "none": "whole clips only"}
    lines = [
        f"{verdict['network']}, {origin}, {verdict['compute_dtype']} on {verdict['device']}, "
        f"{'compiled' if verdict['compiled'] else 'eager'}, frames {verdict['size']}: "
        + ("lossless" if verdict["ok"] else "NOT LOSSLESS"),
        "  claims    " + ", ".join(f"{way} {claims[claim]}" for way, claim in verdict["claim"].items()),
        f"  {'':7} {'property':34} {'difference':>10} {'allowed':>10} {'of values to':>12}",
    ]
    for finding in verdict["findings"]:
        lines.append(
            f"  {finding['direction']:7} {finding['name']:34} {finding['difference']:10.2e} {finding['allowed']:10.2e} "
            f"{finding['magnitude']:12.3g}  {'ok' if finding['ok'] else 'FAILED'}"
        )
    return lines


def build_lines(report: BuildReport) -> list[str]:
    """Summary at the end of a build."""
    counts = report.counts
    startup = f", {report.startup_s:.1f} s of it to start" if report.shards_done else ""
    startup += f", {report.compile_s:.1f} s to compile the network" if report.compile_s else ""
    before = f", {report.shards_before} were done before" if report.shards_before else ""
    lines = [
        f"{report.shards_done} of {quantity(report.shards_total, 'shard')} encoded in {report.wall_s:.1f} s{startup}{before}",
        f"  samples   {counts.samples} in = {counts.encoded} encoded + {counts.rejected} rejected",
        f"  clips     {counts.clips} written + {counts.clips_rejected} rejected, {quantity(counts.frames, 'frame')}, "
        f"{report.frames_per_s:.1f} frames/s, {size(report.num_bytes)} with indexes",
    ]
    if report.shards_elsewhere:
        total = report.shards_total
        lines.append(
            f"  {report.shards_elsewhere} of {quantity(total, 'shard')} committed by another build that ran at the same time"
        )
    if report.shards_done:
        lines.append(f"  time      {_time_shares(report)}")
        compile_ = f"{'on' if report.compiled else 'off'}, {report.compile_reason}"
        lines.append(f"  compile   {compile_}")
    if report.step_sizes:
        shapes = sorted(report.step_sizes.items(), key=lambda item: (-item[1], item[0]))
        more = f" and {len(shapes) - SHAPES_SHOWN} more shapes" if len(shapes) > SHAPES_SHOWN else ""
        lines.append("  steps     " + ", ".join(f"{n} x {shape}" for shape, n in shapes[:SHAPES_SHOWN]) + more)
    if report.rejects:
        reasons = sorted(report.rejects.items(), key=lambda item: (-item[1], item[0]))
        lines.append(f"  rejects   {', '.join(f'{reason} {n}' for reason, n in reasons)} ({EXPLAINED})")
    if report.taken_down:
        lines.append(f"  taken down: {quantity(report.taken_down, 'input')}, not encoded")
    if report.passed_over:
        lines.append(f"  {report.passed_over['line']}")
    lines += warning_lines(report.warnings)
    lines += _failure_lines(report)
    if report.untrained:
        lines.append("  UNTRAINED random weights: these latents are meaningless, and marked so in the data")
    lines.append(f"  output    {report.output}  ({report.network}, fingerprint {report.fingerprint[:8]})")
    return lines


def _failure_lines(report: BuildReport) -> list[str]:
    failures = [*(f"{name}: {why}" for name, why in sorted(report.failed.items())), *report.refused]
    lines = [f"  failed    {text}" for text in failures[:FAILURES_SHOWN]]
    if len(failures) > FAILURES_SHOWN:
        lines.append(f"  failed    … and {len(failures) - FAILURES_SHOWN} more")
    return lines


def _time_shares(report: BuildReport) -> str:
    timings = report.timings
    parts = {
        "fetch": timings.fetch_s,
        "decode wait": timings.decode_wait_s,
        "encode": max(0.0, timings.encode_s - report.compile_s * report.encoders),
        "write": timings.write_s,
    }
    working_s = report.wall_s - report.startup_s - report.compile_s
    whole = max(working_s * max(1, report.encoders), 1e-9)
    shares = ", ".join(f"{name} {seconds:.1f} s ({seconds / whole:.0%})" for name, seconds in parts.items())
    return f"{shares} of encoder time; write runs beside the others; decoders worked {timings.decode_cpu_s:.1f} s"
