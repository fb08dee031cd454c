"""Takedowns and what comes later: builds leave their sources out, publishing does not wait for them. The command line."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pipeline
from pipeline.cli.app import app
from pipeline.cli.wording import build_lines
from pipeline.engine.driver.coverage import find_work
from pipeline.errors import NothingEncoded
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.summaries import Summaries
from pipeline.ledger.takedowns import read_takedowns, record_takedown
from pipeline.operate.delta_log import DeltaLog
from pipeline.records import MemberObject, Shard, SourceObject
from pipeline.storage import Store
from tests.operate.outputs import tar, write_files
from tests.pipeline.frameless_build import job_for
from tests.pipeline.latent_clips import FINGERPRINT, latent_clip, local_store
from tests.pipeline.published import publish_all
from tests.tiny_corpus import tiny_job, video_bytes, write_tar


def test_taken_down_sources_are_left_out_even_if_changed_or_under_other_settings(store: Store, tmp_path: Path) -> None:
    record_takedown(store, "asked", sources=["s3://corpus/b.tar", "s3://corpus/new.mp4"])
    files = tuple(SourceObject(f"s3://corpus/{name}.mp4", 10, "e") for name in ("new", "other"))
    shards = [tar("a", "e1"), tar("b", "e3"), tar("d", "e1"), Shard("files", "files 0", files)]
    for fingerprint, left in ((FINGERPRINT, [tar("d", "e1")]), ("0" * 32, [tar("a", "e1"), tar("d", "e1")])):
        work = find_work(shards, Summaries(store).all(), fingerprint, job_for(tmp_path), read_takedowns(store))
        assert (work.tars, work.files, work.taken_down) == (left, [files[1]], 2)


def test_a_video_whose_paired_video_is_taken_down_is_left_out(store: Store, tmp_path: Path) -> None:
    record_takedown(store, "asked", sources=["s3://corpus/a.depth.mp4"])
    depth = (MemberObject("control", "s3://corpus/a.depth.mp4", 10, "e"),)
    paired, other = (
        SourceObject("s3://corpus/a.mp4", 10, "e", members=depth),
        SourceObject("s3://corpus/b.mp4", 10, "e"),
    )
    shards = [Shard("files", "files 0", (paired, other))]
    work = find_work(shards, Summaries(store).all(), FINGERPRINT, job_for(tmp_path), read_takedowns(store))
    assert (work.files, work.taken_down) == ([other], 1)
    made = publish_all(store, listing=[paired, *(tar(name, "e1").objects[0] for name in "ac")])
    assert not any("a.mp4" in name for name in made.open_shards)


def test_a_listed_source_that_is_taken_down_is_not_open(store: Store) -> None:
    """It is never encoded, so a publisher that waited for it would wait for ever. It is not gone either."""
    record_takedown(store, "asked", sources=["s3://corpus/z.tar", "s3://corpus/a.tar"])
    listing = [tar(name, version).objects[0] for name, version in (("a", "e9"), ("b", "e2"), ("c", "e1"), ("z", "e1"))]
    made = publish_all(store, listing=listing, removed="drop")
    assert (made.counts["rows"], made.open_shards, made.changes["inputs_removed"]) == (3, (), 0)


def test_a_build_counts_what_is_taken_down(tmp_path: Path) -> None:
    corpus = write_tar(tmp_path / "a.tar", {"a": {"mp4": video_bytes(9)}})
    store = local_store(tmp_path / "out")
    Ledger(store).prepare("films")
    record_takedown(store, "asked", sources=[str(corpus)])
    with pytest.raises(NothingEncoded, match="1 input is taken down") as caught:
        pipeline.encode(tiny_job(corpus, tmp_path / "out"))
    report = caught.value.report
    assert (report.taken_down, report.shards_total) == (1, 0)
    assert "  taken down: 1 input, not encoded" in build_lines(report)


def lathe(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(words))
    return found.exit_code, found.output


def test_the_commands_of_an_operator(store: Store, tmp_path: Path) -> None:
    """Take down by a list, look, undo, collect: what is printed and the exit codes."""
    (tmp_path / "names.txt").write_text("# by letter of 3 May\ns3://corpus/b.tar\nc/20\n")
    code, text = lathe("takedown", store.root, f"@{tmp_path / 'names.txt'}", "--reason", "letter", "--by", "ann")
    assert code == 0, text
    assert "taken down: 1 source, 1 sample" in text
    assert "skipped   1 line of lists that begin with # and name nothing" in text
    assert "rows hidden: snapshot 3: 3, snapshot 2: 2, snapshot 1: 2" in text
    assert "delta     rewritten" in text
    code, text = lathe("takedown", store.root, "--list")
    assert (code, " by ann: hides, 1 source, 1 sample" in text, "reason    letter" in text) == (0, True, True)
    code, text = lathe("takedown", store.root, "--undo", "c/20", "--json")
    assert (code, json.loads(text)["snapshots"]) == (0, {"1": 0, "2": 0, "3": 1})
    code, text = lathe("gc", store.root, "--dry-run", "--keep-snapshots", "1", "--keep-days", "0", "--grace", "1h")
    assert code == 0, text
    assert "would delete" in text
    assert "snapshots 1 to 2 would go, 1 kept" in text
    code, text = lathe("gc", store.root, "--keep-snapshots", "1", "--keep-days", "0", "--json")
    assert (code, json.loads(text)["snapshots"]["retired"]) == (0, [1, 2])


def test_a_line_of_a_list_is_a_comment_only_if_it_names_nothing(store: Store, tmp_path: Path) -> None:
    write_files_of_d(store, tmp_path, keys=("#1 hit", "two"))
    names = tmp_path / "names.txt"
    names.write_text("# by letter\n#1 hit\n#2 hit\n")
    for options in ([], ["--allow-unknown"]):
        code, text = lathe("takedown", store.root, f"@{names}", "--json", "--dry-run", *options)
        found = json.loads(text)
        assert (code, found["samples"], found["unknown"]) == (0, [["s3://corpus/d.tar", "#1 hit"]], [])
        assert found["skipped"] == ["# by letter", "#2 hit"]
    code, text = lathe("takedown", store.root, f"@{names}", "#2 hit")
    assert (code, "has no source, sample or row '#2 hit'" in text) == (2, True), "not from a list alone"
    names.write_text("# a\n# b\n")
    code, text = lathe("takedown", store.root, f"@{names}")
    assert (code, "all 2 lines that were given begin with # and name nothing" in text) == (2, True), text
    assert read_takedowns(store).records == ()


def write_files_of_d(store: Store, folder: Path, keys: tuple[str, ...]) -> None:
    clips = [latent_clip(30 + n, uri="s3://corpus/d.tar", key=key) for n, key in enumerate(keys)]
    Ledger(store).commit(write_files(store, folder / "spool", tar("d", "e1"), clips))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["takedown", "OUT"], "expected names, or --list, or --undo"),
        (["takedown", "OUT", "a", "--list"], "one of the three"),
        (
            ["takedown", "OUT", "--undo", "a", "--dry-run"],
            "--dry-run is for names, not for --undo; nothing was changed",
        ),
        (["takedown", "OUT", "--list", "--allow-unknown"], "--allow-unknown is for names, not for --list"),
        (["takedown", "OUT@1", "a"], "this command writes to a whole output"),
        (["takedown", "OUT", "@nowhere.txt"], "list file nowhere.txt does not exist"),
        (["takedown", "OUT", "nothing-like-it"], "has no source, sample or row 'nothing-like-it'"),
        (["gc", "OUT", "--grace", "soon"], "expected minutes, hours or days such as 90m, 48h or 2d, got 'soon'"),
        (["gc", "nowhere"], "nowhere is not a latent set"),
    ],
)
def test_wrong_commands_are_refused(store: Store, words: list[str], said: str) -> None:
    code, text = lathe(*(word.replace("OUT", store.root) for word in words))
    assert (code, said in text) == (2, True), text


def test_a_signal_ends_gc_with_its_lease_released(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sends SIGTERM; the next gc would wait two minutes for a lease that is left."""
    monkeypatch.setattr(DeltaLog, "refresh", lambda log: signal.raise_signal(signal.SIGTERM))
    code, text = lathe("gc", store.root)
    assert (code, "what was deleted stays deleted" in text) == (130, True), text
    monkeypatch.undo()
    assert lathe("gc", store.root)[0] == 0
