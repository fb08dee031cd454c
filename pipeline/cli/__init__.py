"""The command line: options and commands (`app`, `network_commands`, `terminal`), how results read, exit codes."""


def main() -> None:
    """Entry point of `lathe` and `python -m pipeline`."""
    from pipeline.cli.app import app

    app()
