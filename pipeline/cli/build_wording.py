"""Running, killed and finished builds of `lathe status` as lines of text. Takes the dictionary of `pipeline.operate.status`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pipeline.units import duration, size

if TYPE_CHECKING:
    from collections.abc import Iterable

DOING = {
    "encode": "encode",
    "compile": "compile the network",
    "decode": "wait for decoders",
    "fetch": "wait for fetches",
    "upload": "wait for uploads",
    "idle": "have no shard",
    "outage": "wait for the store",
    "starting": "start",
    "busy": "work between steps",
}
OUTCOMES = {
    "done": "done",
    "shards_failed": "ended with failed shards",
    "stopped": "stopped",
    "error": "ended with an error",
}
WORKERS_SHOWN = 16


def builds_lines(status: dict[str, Any], now: float | None = None) -> list[str]:
    """Running builds, builds that stopped reporting, and the last run that is over. `now` in seconds since 1970."""
    now = time.time() if now is None else now
    lines = []
    for build in filter(None, (status["progress"], *status["other_builds"])):
        lines += _running_lines(build, now)
    last = status.get("last_run")
    ended = str(last["build"]) if last is not None and last["ended"] is not None else ""
    dead = [build for build in status.get("dead_builds", ()) if str(build.get("build")) > ended]
    for build in dead:
        lines.append(
            f"  build     {build['build']} stopped reporting {duration(max(0.0, now - build['last_seen']))} ago "
            f"({_place(build)}): killed, or its machine or network was lost; it had {_counts(build)}; the same command resumes"
        )
    if last is not None and str(last["build"]) not in {str(build.get("build")) for build in dead}:
        lines += _last_run_lines(last)
    return lines


def _running_lines(build: dict[str, Any], now: float) -> list[str]:
    encoders = build.get("encoders") or {}
    rate = encoders.get("frames_per_s")
    speed = f"{build['frames_per_s']:.1f} frames/s"
    if rate is not None:
        speed = f"{rate:.1f} frames/s now, {speed} since the start"
    eta = build.get("eta_s")
    left = "" if eta is None else f", about {duration(eta)} left"
    waits = "; it waits for storage" if build.get("waiting_for_storage") else ""
    state = "running" if build["running"] else "not running"
    lines = [
        f"  build     {build.get('build', '')} {state} on {_place(build)}, last report "
        f"{duration(max(0.0, now - build.get('last_seen', build['updated'])))} ago: {_counts(build)}, {speed}{left}{waits}"
    ]
    if encoders.get("num"):
        lines.append(
            f"  encoders  {encoders['num']} of {encoders.get('wanted', encoders['num'])} up: {_doing(encoders['doing'])}"
        )
    listed = encoders.get("listed", [])
    for worker in listed[:WORKERS_SHOWN]:
        lines.append(f"    {_worker_line(worker)}")
    if len(listed) > WORKERS_SHOWN or encoders.get("only_slowest"):
        lines.append(
            "    … the slowest; --json lists more" if encoders.get("only_slowest") else "    … --json lists all"
        )
    return lines


def _worker_line(worker: dict[str, Any]) -> str:
    shares = sorted(worker["shares"].items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)
    parts = [f"{worker['worker']:12} {worker['doing']:8} {worker['frames_per_s']:.1f} frames/s"]
    if spent:
        parts.append(f"({spent})")
    if worker["shard"] is not None:
        more = f" and {worker['shards'] - 1} more" if worker["shards"] > 1 else ""
        parts.append(f"shard {worker['shard']} for {duration(worker['shard_s'])}{more}")
    if worker["video"]:
        parts.append(f"video {worker['video']}")
    return "  ".join(parts)


def _last_run_lines(last: dict[str, Any]) -> list[str]:
    ended = last["ended"]
    if ended is None:
        return [f"  last run  {last['build']} left no end in its log, last line {last['last_event']}: it was killed"]
    why = f": {ended['reason']}" if ended["reason"] else ""
    report = last["report"] or {}
    failed = len(report.get("failed", ())) + len(report.get("refused", ()))
    lines = [
        f"  last run  {last['build']} {OUTCOMES.get(ended['outcome'], ended['outcome'])} at {ended['ts']}{why}: "
        f"{report.get('shards_done')} of {report.get('shards_total')} shards in {duration(report.get('wall_s', 0.0))}, "
        f"{report.get('frames_per_s', 0.0):.1f} frames/s" + (f", {failed} failed" if failed else "")
    ]
    return lines


def _counts(build: dict[str, Any]) -> str:
    counts = f"{build['shards_done']}/{build['shards_total']} shards"
    total = build.get("bytes_total")
    return f"{counts}, {100 * build['bytes_done'] // total}% of {size(total)}" if total else counts


def _place(build: dict[str, Any]) -> str:
    return f"{build.get('host', '?')}, pid {build.get('pid', '?')}"


def _doing(doing: dict[str, int]) -> str:
    items: Iterable[tuple[str, int]] = sorted(doing.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} {DOING.get(name, name)}" for name, n in items)
