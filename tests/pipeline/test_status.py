"""`lathe status` of running, killed and finished builds, from the store alone."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from pipeline.cli import status_commands
from pipeline.cli.build_wording import builds_lines
from pipeline.format.layout import CURRENT
from pipeline.ledger.receipts import Ledger
from pipeline.operate.status import live_status, status
from pipeline.storage import Store
from tests.pipeline.latent_clips import local_store

OLD, NEW = "20260101T000000Z-00000000", "20260102T000000Z-11111111"
REPORT = {
    "shards_done": 5,
    "shards_total": 6,
    "wall_s": 3700.0,
    "frames_per_s": 12.3,
    "failed": {"s0": "bad"},
    "refused": [],
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = local_store(tmp_path / "out")
    Ledger(made).prepare("films")
    return made


def beat(store: Store, build: str, *, age_s: float = 0.0, **values: Any) -> None:
    now = time.time()
    facts = {"build": build, "started": now - 100, "updated": now - age_s, "every_s": 30.0, "running": True}
    numbers = {"shards_done": 3, "shards_total": 6, "bytes_done": 10, "bytes_total": 40, "frames_per_s": 5.0}
    found = {**facts, "host": "node-7", "pid": 12, **numbers, "eta_s": 7200.0, **values}
    store.write(CURRENT.progress_key(build), json.dumps(found).encode())
    os.utime(store.uri(CURRENT.progress_key(build)), (now - age_s,) * 2)


def log(store: Store, build: str, *events: dict[str, Any]) -> None:
    lines = [json.dumps({"ts": f"2026-01-0{n + 1}", **event}) for n, event in enumerate(events)]
    store.write(CURRENT.run_log_key(build, 1), "\n".join(lines).encode())


def started(build: str) -> dict[str, Any]:
    return {"event": "started", "build": build, "host": "node-7", "shards": 6}


def ended(outcome: str, reason: str | None = None) -> dict[str, Any]:
    return {"event": "ended", "outcome": outcome, "reason": reason, "open_shards": 1, "report": REPORT}


def worker(n: int, **values: Any) -> dict[str, Any]:
    shown = {
        "worker": f"encoder-{n}",
        "doing": "decode",
        "shares": {"decode": 0.7, "encode": 0.25},
        "frames_per_s": 4.5,
    }
    return {**shown, "shard": f"in/{n:06d}.tar", "shard_s": 63.0, "shards": 2, "video": f"clips/{n}", **values}


def test_a_running_build_shows_rate_eta_and_what_each_worker_waits_for(store: Store) -> None:
    doing = {"num": 2, "wanted": 3, "doing": {"decode": 1, "outage": 1}, "frames_per_s": 4.5, "only_slowest": False}
    idle = worker(2, doing="outage", shard=None, shard_s=None, shards=0, shares={}, video=None, frames_per_s=0.0)
    beat(store, NEW, encoders={**doing, "listed": [worker(1), idle]}, waiting_for_storage=True, updated=0.0)
    log(store, NEW, started(NEW))
    found = status(store)
    assert found["progress"]["build"] == NEW
    assert (found["dead_builds"], found["last_run"]) == ([], None)
    text = "\n".join(builds_lines(found))
    assert re.search(r"running on node-7, pid 12, last report \d+s ago", text), "by the store's clock"
    assert (
        "3/6 shards, 25% of 40 B, 4.5 frames/s now, 5.0 frames/s since the start, about 2h00m left; it waits for"
        in text
    )
    assert "2 of 3 up: 1 wait for decoders, 1 wait for the store" in text
    assert (
        "encoder-1    decode   4.5 frames/s  (decode 70%, encode 25%)  shard in/000001.tar for 1m03s and 1 more" in text
    )
    assert "encoder-2    outage   0.0 frames/s" in text
    assert live_status(store)["progress"] == found["progress"]


def test_a_build_that_stopped_reporting_is_called_so_until_another_has_ended(store: Store) -> None:
    log(store, OLD, started(OLD))
    beat(store, OLD, age_s=7200.0)
    found = status(store)
    assert found["progress"] is None
    assert [build["build"] for build in found["dead_builds"]] == [OLD]
    (line,) = builds_lines(found)
    assert f"{OLD} stopped reporting 2h00m ago (node-7, pid 12): killed" in line
    log(store, NEW, started(NEW), ended("done"))
    found = status(store)
    assert [build["build"] for build in found["dead_builds"]] == [OLD]
    (line,) = builds_lines(found)
    assert f"last run  {NEW} done at 2026-01-02: 5 of 6 shards in 1h01m, 12.3 frames/s, 1 failed" in line


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("shards_failed", "ended with failed shards"),
        ("stopped", "stopped"),
        ("error", "ended with an error"),
    ],
)
def test_the_last_run_says_how_it_ended(store: Store, outcome: str, words: str) -> None:
    log(store, NEW, started(NEW), ended(outcome, "it is so"))
    found = status(store)["last_run"]
    assert (found["ended"]["outcome"], found["report"]["shards_done"], found["started"]["shards"]) == (outcome, 5, 6)
    assert f"{words} at 2026-01-02: it is so" in builds_lines(status(store))[0]


def test_a_killed_build_without_a_heartbeat_left_a_log_without_end(store: Store) -> None:
    log(store, OLD, started(OLD), {"event": "assigned"})
    found = status(store)
    assert found["last_run"]["ended"] is None
    assert "left no end in its log, last line 2026-01-02" in builds_lines(found)[0]


def test_many_workers_are_not_all_printed(store: Store) -> None:
    listed = [worker(n) for n in range(16)]
    encoders = {"num": 900, "wanted": 1000, "doing": {"encode": 900}, "frames_per_s": 1.0, "listed": listed}
    beat(store, NEW, encoders={**encoders, "only_slowest": True})
    lines = builds_lines(status(store))
    assert len(lines) == 19
    assert "the slowest" in lines[-1]


def test_watching_shows_the_builds_until_none_runs(store: Store, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    beat(store, NEW)
    log(store, NEW, started(NEW))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            store.delete(CURRENT.progress_key(NEW))
            log(store, NEW, started(NEW), ended("done"))

    monkeypatch.setattr("pipeline.cli.status_commands.time", SimpleNamespace(sleep=sleep, strftime=time.strftime))
    status_commands.status(store.root, watch=True, every=7.0)
    shown = capsys.readouterr().out
    assert slept == [7.0, 7.0]
    assert shown.count("running on node-7") == 2  # the whole status, and one look
    assert shown.splitlines()[-1].startswith(f"  last run  {NEW} done")
    assert shown.count("shards done, last commit") == 1


def test_an_interval_without_watching_is_refused(store: Store, capsys: Any) -> None:
    with pytest.raises(typer.Exit) as ended_with:
        status_commands.status(store.root, every=7.0)
    assert ended_with.value.exit_code == 2
    assert "--every 7 is for --watch" in capsys.readouterr().err


def test_a_name_that_is_not_known_ends_with_exit_code_2(store: Store, capsys: Any) -> None:
    with pytest.raises(typer.Exit) as ended_with:
        status_commands.why(store.root, "clips/1")
    assert ended_with.value.exit_code == 2
    assert "clips/1 is not known" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        status_commands.why(f"{store.root}@1", "clips/1")
    assert "over all snapshots" in capsys.readouterr().err
