"""After kill -9 at every kill point, the same command again gives the rows of one clean run: none lost, none doubled."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.ledger.receipts import Ledger
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests import forked_command
from tests.engine.test_inline import assert_same_rows
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_flags, tiny_job

OWNER_POINTS = [
    "after_fetch",
    "mid_video",
    "before_upload",
    "in_upload",
    "after_upload",
    "before_commit",
    "before_read_back",
    "after_commit",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=2, samples=3)


@pytest.fixture(scope="module")
def clean_rows(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    pipeline.encode(tiny_job(corpus, output))
    return rows(output)


def lathe(*arguments, **options):
    return forked_command.run(*arguments, **options)


def drill_flags(point, folder, times=1):
    return ["--set", f"drill.point={point}", "--set", f"drill.marker_dir={folder}", "--set", f"drill.times={times}"]


def assert_sound(output, clean_rows, samples=6):
    assert_same_rows(clean_rows, rows(output))
    found = receipts(output)
    assert sum(receipt.counts.samples for receipt in found) == samples
    report = verify_output(open_store(str(output), StorageConfig()))
    assert report.ok, report.problems


@pytest.mark.parametrize("point", OWNER_POINTS)
def test_same_command_finishes_after_the_process_was_killed(corpus, clean_rows, tmp_path, point):
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    died = lathe(*command, *drill_flags(point, tmp_path / "markers"))
    assert died.returncode == -signal.SIGKILL, died.stderr
    if point == "after_commit":
        again = lathe(*command)
        assert again.returncode == 0, again.stderr
        assert re.search(r"[12] were done before", again.stdout)  # the other shard may have come first
    else:
        assert pipeline.encode(tiny_job(corpus, output)).ok  # the same job in this process, which is faster
    assert_sound(output, clean_rows)


def commits_wait():
    """Commits of this process wait for a file; another file says that one does."""
    folder, commit = Path(os.environ["COMMITS_WAIT"]), Ledger.commit

    def late(self, receipt):
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return commit(self, receipt)

    Ledger.commit = late


def test_same_command_finishes_after_a_kill_during_the_second_attempts_clean_up(corpus, clean_rows, tmp_path):
    """Just before its first commit, another run of the same job finishes; the first one then loses and is killed."""
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    run = forked_command.start(
        *(*command, *drill_flags("in_clean_up", tmp_path / "markers")),
        env={**os.environ, "COMMITS_WAIT": str(tmp_path)},
        prepare="tests.engine.test_kill:commits_wait",
    )
    while not (tmp_path / "waiting").exists():
        assert run.poll() is None
        time.sleep(0.02)
    assert pipeline.encode(tiny_job(corpus, output)).ok
    (tmp_path / "go").touch()
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == -signal.SIGKILL, stderr
    assert lathe(*command).returncode == 0
    assert_sound(output, clean_rows)


def test_build_continues_after_a_decoder_was_killed(corpus, clean_rows, tmp_path):
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    run = lathe(*command, *drill_flags("in_decoder", tmp_path / "markers"))
    assert run.returncode == 0, run.stderr
    assert os.listdir(tmp_path / "markers") == ["in_decoder-0"]
    assert_sound(output, clean_rows)


def test_temporary_files_of_a_killed_run_are_deleted_by_the_next(corpus, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = ["encode", corpus, tmp_path / "out", *tiny_flags("--executor", "inline")]
    lathe(*command, *drill_flags("before_upload", tmp_path / "markers"), env=environment)
    assert any(temporary.iterdir())
    assert lathe(*command, env=environment).returncode == 0
    assert list(temporary.iterdir()) == []


def test_a_transient_failure_is_tried_again_within_the_run(corpus, clean_rows, tmp_path):
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    run = lathe(*command, *drill_flags("before_commit", tmp_path / "markers", 2), "--set", "drill.action=raise")
    assert run.returncode == 0, run.stderr
    assert "attempt 1 of 3 failed" in run.stderr
    assert_sound(output, clean_rows)


def test_permanent_failure_is_exit_code_1_and_names_the_shard(corpus, clean_rows, tmp_path):
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    run = lathe(*command, *drill_flags("before_commit", tmp_path / "markers", 99), "--set", "drill.action=raise")
    assert run.returncode == 1
    assert "2 of 2 shards failed" in run.stderr
    assert "000000" in run.stderr
    assert rows(output) == {}
    assert pipeline.encode(tiny_job(corpus, output)).ok
    assert_sound(output, clean_rows)


def test_two_runs_at_once_make_one_set_of_rows(corpus, clean_rows, tmp_path):
    output = tmp_path / "out"
    command = ["encode", corpus, output, *tiny_flags("--executor", "inline")]
    runs = [forked_command.start(*command) for _ in range(2)]
    for run in runs:
        _, stderr = run.communicate(timeout=300)
        assert run.returncode == 0, stderr
    assert_sound(output, clean_rows)


def test_the_first_signal_drains_the_second_stops(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", shards=6, samples=2)
    output = tmp_path / "out"
    flags = tiny_flags("--executor", "inline", "--set", "engine.credit=1")
    command = ["encode", corpus, output, *flags]
    drill = drill_flags("after_commit", tmp_path / "markers")
    run = forked_command.start(*command, *drill, "--set", "drill.action=hang")
    while not (tmp_path / "markers").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    assert any("stopping" in line for line in run.stderr)  # reads until the line comes, or the process ends
    time.sleep(1.5)  # signals within a second are one request
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=300)
    assert run.returncode == 130, stderr
    assert "resumes" in stderr
    finished = lathe(*command)
    assert finished.returncode == 0, finished.stderr
    assert sum(receipt.counts.samples for receipt in receipts(output)) == 12
