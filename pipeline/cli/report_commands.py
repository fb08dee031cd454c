"""Commands that show an output to people: report, serve. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is instant.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.output_commands import open_numbered
from pipeline.cli.terminal import AsJson, Debug, Output, StoreSettings, guard, show_result, storage_config


def report(
    output: Output,
    html: Annotated[
        str, typer.Option(metavar="PAGE.html", help="Where the page goes; its values go beside it, as PAGE.json.")
    ] = "report.html",
    clips: Annotated[int, typer.Option(min=0, help="Clips that are decoded and measured; 0: no pictures.")] = 24,
    against: Annotated[
        int | None, typer.Option(metavar="M", help="Snapshot to compare with, besides the parent.")
    ] = None,
    assets: Annotated[
        bool, typer.Option("--assets", help="Put pictures into a folder beside the page instead of into it.")
    ] = False,
    keep: Annotated[bool, typer.Option("--store", help="Store the page in the output as well.")] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="Where the latents' weights are now. [default: as recorded]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, for decoding.")] = "auto",
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a page of a snapshot for people: what is in it, what was left out and why, checks, statistics, decoded clips."""

    def run() -> None:
        from pipeline.report.collect import ReportOptions, collect
        from pipeline.report.written import page_path, store_report, write_report

        path = page_path(html)
        store, number = open_numbered(output, endpoint_url)
        options = ReportOptions(clips=clips, against=against, checkpoint=checkpoint, device=device)
        found, pictures = collect(store, number, storage_config(endpoint_url), options)
        stored = store_report(store, found, pictures) if keep else None
        values = write_report(found, pictures, path, assets=assets)
        places = {"page": str(path), "values": str(values), "stored": stored}
        show_result({**found.to_dict(), **places} if as_json else {"report": found, **places}, report_lines, as_json)

    guard(run, debug=debug, again="the output was not changed; run the same command again")


def serve(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3://bucket/prefix that encode wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0: a free one.")] = 8765,
    endpoint_url: StoreSettings = None,
    debug: Debug = False,
) -> None:
    """Show an output in a browser on this machine: its snapshots, a running build, the pages. Read-only; Ctrl-C ends it."""

    def run() -> None:
        from pipeline.errors import ConfigError
        from pipeline.process import signals
        from pipeline.report.serving import open_server

        config = storage_config(endpoint_url)
        store, number = open_numbered(output, endpoint_url)
        if number is not None:
            raise ConfigError(f"{output}: all snapshots are served; write {store.root}")
        with signals.handled(), open_server(store, config, port) as server:
            typer.echo(f"http://127.0.0.1:{server.server_port}/ shows {store.root}; Ctrl-C ends it")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return

    guard(run, debug=debug)


def report_lines(values: dict[str, Any]) -> list[str]:
    """What `report` prints: a summary, notices, and the path of the page last."""
    found = values["report"]
    measured = [clip.psnr for clip in found.decoded.clips if clip.psnr is not None]
    lines = [
        f"snapshot {found.snapshot} of {found.output}: {found.counts['rows']} rows, {found.left_out.rejected} of "
        f"{found.left_out.samples} inputs rejected"
    ]
    if measured:
        lines.append(f"  decoded   {len(measured)} clips, {sum(measured) / len(measured):.2f} dB on average")
    lines += [f"  note      {text}" for text in found.notices]
    lines += [f"  values    {values['values']}"]
    lines += [f"  stored    {values['stored']}"] if values["stored"] else []
    return [*lines, values["page"]]
