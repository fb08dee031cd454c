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

import contextlib
import os
import sys
import threading


def main() -> None:
    """Entry point of `lathe` and `python -m pipeline`."""
    from pipeline.cli.app import app

    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int) and any(thread.name == "identify" for thread in threading.enumerate()):
            # A command that failed or was stopped early, while its network is identified. The interpreter would end that thread inside
            # torch, which aborts the process: its exit code would be that of SIGABRT.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
                    stream.flush()
            os._exit(end.code)
        raise
