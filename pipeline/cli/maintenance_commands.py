"""Commands that change what an output shows or stores: takedown, gc. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.terminal import AsJson, Config, Debug, StoreSettings, guard, show_result, storage_config

if TYPE_CHECKING:
    from collections.abc import Callable

WholeOutput = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3://bucket/prefix that encode wrote.")]


def takedown(
    output: WholeOutput,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]",
            help="URI of a source, key of a sample, URI#KEY, id of a row, or @list.txt with one of these a line.",
        ),
    ] = None,
    reason: Annotated[
        str, typer.Option(help="Why, for the audit record. Do not name people: the record is kept.")
    ] = "",
    by: Annotated[str | None, typer.Option(metavar="WHO", help="Who asked for it. [default: the user's name]")] = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Names that the output does not have are sources not to be encoded.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be hidden; record nothing.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Show all takedowns.")] = False,
    undo: Annotated[
        str | None,
        typer.Option(
            metavar="RECORD|NAME", help="Show the rows of a record or name again; not once their bytes are gone."
        ),
    ] = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hide sources, samples or rows at once: in every snapshot, the loader, exports and the Delta view. Later builds do not encode them."""

    def run() -> None:
        from pipeline.cli import maintenance_wording as wording
        from pipeline.errors import ConfigError
        from pipeline.ledger.addresses import check_whole_output
        from pipeline.operate import takedown as operation
        from pipeline.process import signals
        from pipeline.storage import open_store

        asked = [bool(names), list_, undo is not None]
        if sum(asked) != 1:
            raise ConfigError("takedown: expected names, or --list, or --undo RECORD, one of the three")
        if not names and (dry_run or allow_unknown):
            given = "--dry-run" if dry_run else "--allow-unknown"
            raise ConfigError(
                f"takedown: {given} is for names, not for {'--list' if list_ else '--undo'}; nothing was changed"
            )
        storage = storage_config(endpoint_url)
        store = open_store(check_whole_output(output), storage)
        if list_:
            records = operation.history(store)
            show_result(records, wording.history_lines, as_json)
            return
        who = _user() if by is None else by
        if undo is not None:
            with signals.handled():  # a signal releases the lease
                undone = operation.undo(store, undo, reason=reason, by=who)
            _show(undone, wording.undo_lines, as_json)
            return
        listed, comments = _listed(names or [], storage)
        found = operation.take_down(
            store, listed, reason=reason, by=who, allow_unknown=allow_unknown, dry_run=dry_run, comments=comments
        )
        _show(found, wording.takedown_lines, as_json)

    guard(run, debug=debug, again="what was recorded stays; the same command goes on")


def gc(
    output: WholeOutput,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; write nothing.")] = False,
    grace: Annotated[
        str | None,
        typer.Option(metavar="48h", help="Keep what is younger: minutes (m), hours (h) or days (d). [default: 48h]"),
    ] = None,
    keep_snapshots: Annotated[
        int | None, typer.Option(min=1, help="Keep so many of the newest snapshots. [default: 30]")
    ] = None,
    keep_days: Annotated[
        float | None, typer.Option(min=0, help="Keep snapshots and run logs that are younger, too. [default: 30]")
    ] = None,
    forget: Annotated[
        bool,
        typer.Option(
            "--forget",
            help="Delete also what is younger and names what was taken down: older snapshots that name files with such rows, run logs.",
        ),
    ] = False,
    ended: Annotated[
        list[str] | None, typer.Option(metavar="BUILD", help="This silent build has ended; repeatable.")
    ] = None,
    config: Config = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Delete files that no kept snapshot, no receipt that counts and no running build needs, and old snapshots. Try --dry-run first."""

    def run() -> None:
        from pipeline.cli.maintenance_wording import gc_lines
        from pipeline.config import build_job
        from pipeline.ledger.addresses import check_whole_output
        from pipeline.operate import gc as operation
        from pipeline.process import signals
        from pipeline.storage import open_store

        flags = {
            "gc.grace_hours": None if grace is None else _hours(grace),
            "gc.keep_snapshots": keep_snapshots,
            "gc.keep_days": keep_days,
            "storage.endpoint_url": endpoint_url,
        }
        root = check_whole_output(output)
        job = build_job({"inputs": [root], "output": root, **flags}, config_path=config)
        store, kept = open_store(root, job.storage), job.gc
        options = operation.GcOptions(
            grace_s=kept.grace_hours * 3600,
            keep_snapshots=kept.keep_snapshots,
            keep_days=kept.keep_days,
            forget=forget,
            ended=tuple(ended or ()),
            dry_run=dry_run,
        )
        with signals.handled():  # a signal releases the lease
            found = operation.collect(store, options)
        show_result(found, gc_lines, as_json)

    guard(run, debug=debug, again="what was deleted stays deleted; the same command goes on")


def _hours(text: str) -> float:
    """`90m`, `48h` or `2d` as hours.

    Raises:
        ConfigError: anything else.
    """
    import re

    from pipeline.errors import ConfigError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text)
    if match is None:
        raise ConfigError(f"--grace: expected minutes, hours or days such as 90m, 48h or 2d, got {text!r}")
    return float(match[1]) * {"m": 1 / 60, "h": 1.0, "d": 24.0}[match[2]]


def _show(found: dict[str, Any], lines: Callable[[dict[str, Any]], list[str]], as_json: bool) -> None:
    """Prints a result; ends with exit code 1 if the Delta log was not rewritten."""
    from pipeline.errors import ViewNotWritten

    show_result(found, lines, as_json)
    if found["delta_error"] is not None:
        raise ViewNotWritten(
            f"the record is written, but the Delta view was not rewritten and may still show the rows: {found['delta_error']}; "
            "run the same command or `lathe publish` to rewrite it"
        )


def _listed(names: list[str], storage: Any) -> tuple[list[str], set[str]]:
    """Names with the lines of list files in their place, and those of the lines that are comments if they name nothing.

    Raises:
        InputError: a list that cannot be read or is empty.
    """
    from pipeline.corpus.lists import is_comment, list_lines
    from pipeline.errors import InputError, NotFound
    from pipeline.storage import read_uri

    found, comments = [], set()
    for name in names:
        if not name.startswith("@"):
            found.append(name)
            continue
        try:
            lines = list_lines(read_uri(name[1:], storage), name[1:])
        except NotFound:
            raise InputError(f"list file {name[1:]} does not exist") from None
        if not lines:
            raise InputError(f"list file {name[1:]} is empty; expected one name per line")
        found += lines
        comments |= set(filter(is_comment, lines))
    return found, comments - set(names)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return ""
