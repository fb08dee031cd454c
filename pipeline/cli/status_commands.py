"""Commands that show the state of an output and of one input: status, why. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is instant.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.output_commands import open_numbered
from pipeline.cli.terminal import (
    AsJson,
    Debug,
    Output,
    StoreSettings,
    guard,
    json_text,
    show,
    show_result,
    storage_config,
)

if TYPE_CHECKING:
    from pipeline.storage import Store

WATCH_S = 10.0


def status(
    output: Output,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the builds again and again, until none is running.")
    ] = False,
    every: Annotated[
        float | None, typer.Option(min=1, help="Seconds between two looks of --watch. [default: 10]")
    ] = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the state of an output. Lists shards, clips and rejects, what running builds do and how the last one ended."""

    def run() -> None:
        from pipeline.errors import ConfigError
        from pipeline.operate.status import status as status_of

        if every is not None and not watch:
            raise ConfigError(f"status: --every {every:g} is for --watch; add --watch or leave --every out")
        store, number = open_numbered(output, endpoint_url)
        found = status_of(store, number)
        show(found, "status_lines", as_json)
        while watch and found["progress"] is not None:
            time.sleep(WATCH_S if every is None else every)
            found = _look(store, as_json)

    guard(run, debug=debug, again="nothing was changed; builds go on")


def _look(store: Store, as_json: bool) -> dict[str, Any]:
    """Prints the builds only: reading all receipts every few seconds would load the store."""
    from pipeline.cli.build_wording import builds_lines
    from pipeline.operate.status import live_status

    found = live_status(store)
    text = json_text(found) if as_json else "\n".join([time.strftime("%H:%M:%S"), *builds_lines(found)])
    typer.echo(text)
    return found


def why(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3://bucket/prefix that encode wrote.")],
    name: Annotated[
        str,
        typer.Argument(metavar="KEY|URI|ID", help="Key of a sample, URI or path of an input, URI#KEY, or id of a row."),
    ],
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell what became of one input: where it lies, its clips and rows, snapshots that show it, or why it was rejected."""

    def run() -> None:
        from pipeline.cli.why_wording import why_lines
        from pipeline.errors import ConfigError
        from pipeline.operate import why as operation

        store, number = open_numbered(output, endpoint_url)
        if number is not None:
            raise ConfigError(f"{output}: the history of an input is over all snapshots; write {store.root}")
        found = operation.why(store, name, storage_config(endpoint_url))
        show_result(found, why_lines, as_json)

    guard(run, debug=debug)
