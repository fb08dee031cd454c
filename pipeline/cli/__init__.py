"""Command line: options, commands, results as text, exit codes.

- `app`: encode, plan, status, inspect, verify, sample
- `output_commands`: publish, snapshots, diff, stats
- `export_command`: export
- `network_commands`: train, models, check, evaluate, preview, convert-checkpoint
- `terminal`: options that commands share, printing of results, errors and exit codes
- `progress`: displays of a running build (live, plain lines, JSON lines)
- `wording`, `evaluation_wording`, `export_wording`, `preview_wording`, `snapshot_wording`: results as lines of text
"""


def main() -> None:
    """Entry point of `lathe` and `python -m pipeline`."""
    from pipeline.cli.app import app

    app()
