"""`lathe compact`, and its result as text. `pipeline.cli.app` registers it.

Packages are imported when the command runs, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.terminal import AsJson, Debug, StoreSettings, guard, show_result, storage_config
from pipeline.units import quantity, size

if TYPE_CHECKING:
    from collections.abc import Callable

LEAST_BYTES = 1_000_000
NOTHING = "nothing to do: no file is small or has rows that do not count"


def compact(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3://bucket/prefix that encode wrote.")],
    target_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="Size of the files that are written. Files below half of it are merged.")
    ] = "512MB",
    only_takedowns: Annotated[
        bool, typer.Option("--only-takedowns", help="Rewrite only files with rows that were taken down; merge nothing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be rewritten; write nothing.")] = False,
    delta: Annotated[
        bool, typer.Option("--delta/--no-delta", help="Write the Delta Lake view of Parquet outputs as well.")
    ] = True,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Merge small data files of each bucket and drop rows that do not count, as a new snapshot of the same rows."""

    def run() -> None:
        from pipeline.ledger.addresses import check_whole_output

        root = check_whole_output(output)
        from pipeline.operate.compact import CompactOptions
        from pipeline.operate.compact import compact as rewrite
        from pipeline.process import signals
        from pipeline.storage import open_store

        options = CompactOptions(
            target_bytes=byte_size(target_bytes), only_takedowns=only_takedowns, dry_run=dry_run, delta=delta
        )
        store = open_store(root, storage_config(endpoint_url))
        with signals.handled():  # a signal deletes what was written and releases the lease
            found = rewrite(store, options, progress=_progress_line() if sys.stderr.isatty() else None).to_dict()
        found["dry_run"] = dry_run
        show_result(found, compaction_lines, as_json)

    guard(
        run,
        debug=debug,
        again=lambda: (
            f"`lathe snapshots {output}` lists a new snapshot if one was published; run the same command again"
        ),
    )


def byte_size(text: str) -> int:
    """Bytes of a size such as `512MB`, `1GiB` or `1000000`.

    Raises:
        ConfigError: not a size, or below `LEAST_BYTES`.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    from pipeline.errors import ConfigError

    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        found = 0
    if found < LEAST_BYTES:
        raise ConfigError(f"--target-bytes: expected a size of at least 1MB, such as 512MB, got {text!r}")
    return found


def compaction_lines(found: dict[str, Any]) -> list[str]:
    """Lines that describe a `Compaction`."""
    if not found["files_before"]:
        return found["notices"] or [NOTHING]
    notes = [f"  note      {text}" for text in found["notices"]]
    what = f"{quantity(found['files_before'], 'file becomes', 'files become')} {found['files_after']}"
    if found["rows_dropped"]:
        what += f", without {quantity(found['rows_dropped'], 'row that does not count', 'rows that do not count')}"
    if found["dry_run"]:
        return [
            f"would make a snapshot of the rows of snapshot {found['parent']}: {what}; {size(found['bytes_read'])} to copy",
            *notes,
        ]
    return [
        f"snapshot {found['snapshot']}: the rows of snapshot {found['parent']}; {what}",
        f"  bytes     {size(found['bytes_read'])} read, {size(found['bytes_written'])} written",
        "  next      old files stay for readers of older snapshots until `lathe gc` deletes them",
        *notes,
    ]


def _progress_line() -> Callable[[int, int], None]:
    """Shows on stderr how much is copied."""
    done = 0

    def show(num_bytes: int, total: int) -> None:
        nonlocal done
        done += num_bytes
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r{size(done)} of {size(total)} copied{end}")
        sys.stderr.flush()

    return show
