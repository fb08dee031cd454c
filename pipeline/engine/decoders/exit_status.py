"""Why a decoder process ended, as a `WorkerLost` whose `blame` says whether its own work caused it.

Takes the exit status of a child process, or the report of `faulthandler` in a process that crashed.
"""

from __future__ import annotations

import signal

from pipeline.errors import WorkerLost

# Signals that a process causes itself: crashes of native code, and the limit on CPU time. All other signals come from outside, SIGKILL
# as well: the kernel's memory killer, a memory monitor, an operator. Lathe's own kills at `decode.timeout_s` are not judged here.
OWN_SIGNALS = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGABRT: "aborted",
    signal.SIGBUS: "bus error",
    signal.SIGFPE: "arithmetic error",
    signal.SIGILL: "illegal instruction",
    signal.SIGXCPU: "CPU time limit exceeded",
}
# First line of faulthandler's report -> signal.
CRASH_REPORTS = {
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating-point exception": signal.SIGFPE,
    "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
CRASH_PREFIX = "Fatal Python error: "


def lost_by(code: int) -> WorkerLost:
    """Loss of a child process with this `subprocess.Popen.returncode`: negative for a signal."""
    if code >= 0:
        return WorkerLost(f"decoder process ended with exit code {code}", blame=True, stage="decode")
    return _lost_by_signal(-code)


def lost_by_report(report: str) -> WorkerLost | None:
    """Loss of a decoder by the crash that `faulthandler` reported; None where the report is empty: the process did not crash."""
    crash = crash_named(report)
    return None if crash is None else WorkerLost(f"decoder process ended: {crash}", blame=True, stage="decode")


def crash_named(report: str) -> str | None:
    """The crash that `faulthandler` reported, as "segmentation fault (SIGSEGV)"; None where the report is empty."""
    first = report.partition("\n")[0]
    if not first.startswith(CRASH_PREFIX):
        return None
    cause = first.removeprefix(CRASH_PREFIX)
    if (found := CRASH_REPORTS.get(cause)) is None:
        return cause[:200]
    return f"{OWN_SIGNALS[found]} ({found.name})"


def _lost_by_signal(number: int) -> WorkerLost:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "unnamed"
    if number in OWN_SIGNALS:
        text = f"decoder process ended: {OWN_SIGNALS[signal.Signals(number)]} ({name})"
        return WorkerLost(text, blame=True, stage="decode")
    return WorkerLost(f"decoder process was killed from outside by signal {number} ({name})", stage="decode")
