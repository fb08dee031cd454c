"""Command line: options, commands, results as text, exit codes.

- `app`: encode, plan, inspect, verify, sample
- `status_commands`: status, why
- `output_commands`: publish, snapshots, diff, stats
- `compact_command`: compact
- `maintenance_commands`: takedown, gc
- `nightly_command`: nightly
- `report_commands`: report, serve
- `export_command`: export
- `sidecar_commands`: embed, sidecar import, list, verify
- `network_commands`: train, models, check, evaluate, preview, convert-checkpoint
- `terminal`: options that commands share, printing of results, errors and exit codes
- `progress`: displays of a running build (live, plain lines, JSON lines)
- `wording`, `build_wording`, `why_wording`, `snapshot_wording`, `evaluation_wording`, `export_wording`,
  `maintenance_wording`, `preview_wording`: results as lines of text
"""

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn

STOPPED = 130  # exit code of a command that Ctrl-C ended


def main() -> NoReturn:
    """Entry point of `lathe` and `python -m pipeline`. Ends the process."""
    try:
        from pipeline.cli.app import app

        app()
        code: object = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # while the commands are imported; later they say what is left to do
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write("lathe: stopped\n")
        code = STOPPED
    _end(code if isinstance(code, int) else int(code is not None))


def _end(code: int) -> NoReturn:
    """Ends the process, without the destructors of libraries: a thread of torch or Arrow that is still at work would abort it there, and a
    command that succeeded would have the exit code of SIGABRT.
    """
    try:
        # A command that failed early does not wait for its network, whose thread is a daemon; all others are waited for, as always.
        threading._shutdown()  # type: ignore[attr-defined]  # as `multiprocessing` ends its processes
        atexit._run_exitfuncs()
    except KeyboardInterrupt:
        code = STOPPED
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
    os._exit(code)
