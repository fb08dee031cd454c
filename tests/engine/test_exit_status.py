"""Cause of a decoder's end, from its exit status, its crash report, or its start."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

from pipeline.engine.decoders import crash_report
from pipeline.engine.decoders.crash_report import take_report
from pipeline.engine.decoders.exit_status import lost_by, lost_by_report
from pipeline.engine.decoders.start_ups import FAILED_STARTS, NO_DECODER_S, PAUSES_S, StartUps
from pipeline.errors import BuildError, WorkerLost

OWN = {
    "SIGSEGV": "segmentation fault",
    "SIGABRT": "aborted",
    "SIGBUS": "bus error",
    "SIGFPE": "arithmetic error",
    "SIGILL": "illegal instruction",
    "SIGXCPU": "CPU time limit",
}
OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGPIPE", "SIGUSR1")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [*OWN, *OUTSIDE])
def test_a_signal_is_named_and_only_a_crash_or_a_limit_is_blamed(name):
    lost = lost_by(-getattr(signal, name))
    assert name in lost.message
    assert lost.blame == (name in OWN)
    assert OWN.get(name, f"from outside by signal {int(getattr(signal, name))}") in lost.message


def test_exit_with_an_error_is_blamed_and_names_its_code():
    lost = lost_by(run("import sys; sys.exit(3)").returncode)
    assert (lost.blame, lost.message) == (True, "decoder process ended with exit code 3")


def test_signal_without_a_name_is_reported_by_its_number():
    assert "signal 63" in lost_by(-63).message


def test_blame_survives_pickling_and_is_not_the_default():
    for blame in (False, True):
        assert pickle.loads(pickle.dumps(WorkerLost("x", blame=blame, stage="decode"))).blame == blame  # noqa: S301 - our own bytes
    assert not WorkerLost("x").blame


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGKILL", "SIGTERM"])
def test_a_process_that_crashes_leaves_a_report_and_one_that_is_killed_leaves_none(name):
    code = "import os; from pipeline.engine.decoders.crash_report import CrashReport; r = CrashReport(); print(r.path, flush=True);"
    ended = run(f"{code} os.kill(os.getpid(), {int(getattr(signal, name))})")
    path = ended.stdout.strip()
    assert os.path.exists(path)
    lost = lost_by_report(take_report(path))
    if name in OWN:
        assert (lost.blame, lost.message) == (True, lost_by(ended.returncode).message)
    else:
        assert lost is None
    assert not os.path.exists(path)
    assert take_report(path) == ""  # taken once


def test_old_reports_of_ended_processes_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(crash_report.tempfile, "tempdir", str(tmp_path))
    gone, fresh = tmp_path / "lathe-crash-gone", tmp_path / "lathe-crash-fresh"
    gone.touch()
    os.utime(gone, (0, 0))
    fresh.touch()
    code = (
        "import os, faulthandler; from pipeline.engine.decoders.crash_report import CrashReport; r = CrashReport();"
        "os.utime(r.path, (0, 0)); print(r.path, flush=True); input()"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as living:
        path = living.stdout.readline().strip()
        crash_report._sweep()
        assert os.path.exists(path)  # old, but its process lives
        assert fresh.exists()
        assert not gone.exists()
        living.stdin.write("\n")


# --- processes that die on start-up -------------------------------------------------------------------------------------------

BY_ITSELF, KILLED = lost_by(1), lost_by(-signal.SIGKILL)


def test_decoders_that_end_by_themselves_stop_the_build_after_six_in_a_row():
    starts = StartUps(2)
    for n in range(FAILED_STARTS - 1):
        starts.died(n % 2, BY_ITSELF, others_up=False, now=0.0)
    with pytest.raises(
        BuildError, match=r"6 decoder processes in a row died before they were up; the last: .*exit code 1"
    ):
        starts.died(0, BY_ITSELF, others_up=False, now=0.0)


@pytest.mark.parametrize("others_up", [True, False])
def test_failed_starts_do_not_stop_a_build_while_a_decoder_is_up(others_up):
    starts = StartUps(1)
    for _ in range(10 * FAILED_STARTS):
        starts.died(0, BY_ITSELF, others_up=others_up, now=0.0)
        if not others_up:
            starts.up(0)


def test_decoders_killed_on_start_up_are_started_again_after_growing_pauses():
    starts, now, pauses = StartUps(1), 0.0, []
    while now <= NO_DECODER_S:
        pauses.append(starts.died(0, KILLED, others_up=False, now=now))
        now += pauses[-1]
    assert len(pauses) > FAILED_STARTS
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == PAUSES_S
    with pytest.raises(BuildError, match=r"no decoder process came up in 300 s; the last: .*SIGKILL"):
        starts.died(0, KILLED, others_up=False, now=now)
    starts.up(0)
    assert starts.died(0, KILLED, others_up=False, now=now) == PAUSES_S[0]
