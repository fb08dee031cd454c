"""`lathe embed` and `lathe sidecar …`, and their results as text. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.maintenance_commands import WholeOutput
from pipeline.cli.terminal import (
    RESUMES,
    AsJson,
    Config,
    Debug,
    Device,
    Fingerprint,
    Output,
    Overrides,
    StoreSettings,
    counter,
    guard,
    show_result,
    storage_config,
)
from pipeline.units import size

if TYPE_CHECKING:
    from pipeline.storage import Store

sidecar = typer.Typer(
    help="Tensors beside the latents: import, list, verify.", no_args_is_help=True, rich_markup_mode=None
)
SetName = Annotated[str, typer.Option("--name", metavar="SET", help="Name of the sidecar set.")]


def embed(
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUTPUT[@N]", help="Output of encode, published; out@3 for snapshot 3."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Of texts: t5, umt5, clip, gemma, qwen2.5-vl. Of images, with --from: clip, siglip."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="Folder of the encoder as transformers saves it: path, s3://… or hf://owner/repo[/folder]."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of tokenizer or image processor. [default: the checkpoint's]")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sidecar set. [default: the encoder's]")] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            help="Texts: first, all, or sources of the loader, e.g. caption,captions.short,metadata.KEY. [default: first]"
        ),
    ] = None,
    from_column: Annotated[
        str | None, typer.Option("--from", metavar="COLUMN", help="Column of images instead of texts: first_frame.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Hidden states: -1 after the last norm, else an index. [default: -1]")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Prompt with {} in place of the caption. [default: {}]")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest text; the rest is cut off and counted. [default: clip 77, else 512]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of stored tensors. [default: bfloat16]")] = None,
    device: Device = None,
    executor: Annotated[
        str | None, typer.Option(help="Where encoders run: ray or inline (this process). [default: ray]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster. [default: RAY_ADDRESS, else a private Ray]")
    ] = None,
    fingerprint: Fingerprint = None,
    endpoint_url: StoreSettings = None,
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make text or image embeddings of published rows, as a sidecar set. Run again, it embeds only what is new."""

    def run() -> None:
        from pipeline.config import EmbedJob, build
        from pipeline.process import signals

        flags = {
            "output": output,
            "encoder": encoder,
            "checkpoint": checkpoint,
            "tokenizer": tokenizer,
            "name": name,
            "captions": captions,
            "from_column": from_column,
            "layer": layer,
            "template": template,
            "max_tokens": max_tokens,
            "dtype": dtype,
            "device": device,
            "executor": executor,
            "address": address,
            "fingerprint": fingerprint,
            "storage.endpoint_url": endpoint_url,
        }
        job = build(EmbedJob, flags, config_path=config, overrides=tuple(set_ or ()))
        # Ray prints the death of an actor on stdout, which is for the result.
        with signals.handled(), contextlib.redirect_stdout(sys.stderr):
            from pipeline.embedding.run import embed as make

            with counter() as show:
                report = make(job, show and (lambda made: show(_embedded(made))))
        show_result(report.to_dict(), embed_lines, as_json)

    guard(run, debug=debug, again=RESUMES)


@sidecar.command("import")
def import_(
    output: Output,
    table: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="Parquet or safetensors file with a row per id, caption or caption hash."),
    ],
    name: Annotated[str, typer.Option("--name", metavar="SET", help="Name of the sidecar set; may exist.")],
    about: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What made the tensors: encoder, layer, prompt. Part of the set's fingerprint."
        ),
    ] = "",
    by: Annotated[
        str | None,
        typer.Option(help="What names in a safetensors file are: id, caption or caption_hash. [default: id]"),
    ] = None,
    captions: Annotated[
        str, typer.Option(help="Texts that the table is of: as for embed, in a table by caption or caption_hash.")
    ] = "first",
    fingerprint: Fingerprint = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out rows of the table that no row of the output needs.")
    ] = False,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Take embeddings that others made, as a sidecar set. Ids, types and widths are checked before anything is written."""

    def run() -> None:
        from pipeline.embedding.importing import ImportRequest, import_table
        from pipeline.errors import ConfigError
        from pipeline.process import signals
        from pipeline.sidecars.names import check_set_name

        if by not in (None, "id", "caption", "caption_hash"):
            raise ConfigError(f"--by: expected id, caption or caption_hash, got {by!r}")
        sources = tuple(source.strip() for source in captions.split(","))
        request = ImportRequest(table, check_set_name(name), about, by, fingerprint, skip_unknown, sources)
        with signals.handled():
            report = import_table(output, request, storage_config(endpoint_url))
        show_result(report.to_dict(), import_lines, as_json)

    guard(run, debug=debug)


@sidecar.command("list")
def list_(
    output: WholeOutput, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Show the sidecar sets of an output. Lists tensors, versions, counts and the snapshots they cover."""

    def run() -> None:
        from pipeline.embedding.upkeep import list_sets

        show_result(list_sets(_open_whole(output, endpoint_url)), list_lines, as_json)

    guard(run, debug=debug)


@sidecar.command()
def verify(
    output: WholeOutput,
    name: Annotated[str, typer.Argument(metavar="SET[@N]", help="Name of the set; t5@3 for its version 3.")],
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read every file of a sidecar set and compare hashes. Exit code 1 if anything is wrong."""

    def run() -> None:
        from pipeline.embedding.upkeep import verify_set

        report = verify_set(_open_whole(output, endpoint_url), name)
        show_result(report, verify_lines, as_json)
        if report["num_damaged"]:
            raise typer.Exit(1)

    guard(run, debug=debug)


@sidecar.command()
def prune(
    output: WholeOutput,
    name: Annotated[str, typer.Argument(metavar="SET", help="Name of the set.")],
    grace_hours: Annotated[
        float,
        typer.Option(min=0, help="Age in hours from which files that the newest version does not name are deleted."),
    ] = 48.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would be removed; write nothing.")] = False,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Remove tensors that no row of the newest snapshot needs, such as those of rows that were taken down. Not beside embed."""

    def run() -> None:
        from pipeline.embedding.pruning import prune as remove
        from pipeline.process import signals

        storage, store = storage_config(endpoint_url), _open_whole(output, endpoint_url)
        with signals.handled():
            report = remove(store, name, storage, grace_s=grace_hours * 3600, dry_run=dry_run).to_dict()
        show_result({**report, "dry_run": dry_run}, prune_lines, as_json)

    guard(run, debug=debug)


def _open_whole(output: str, endpoint_url: str | None) -> Store:
    """Store of a latent set, named without a snapshot. Raises OutputError for another folder, ConfigError for `@N`."""
    from pipeline.ledger.addresses import check_whole_output
    from pipeline.ledger.receipts import Ledger
    from pipeline.storage import open_store

    store = open_store(check_whole_output(output), storage_config(endpoint_url))
    Ledger(store).latent_set()
    return store


def embed_lines(report: dict[str, Any]) -> list[str]:
    """Result of `lathe embed`."""
    what = f"{report['needed']} distinct texts" if report["captions"] else f"{report['needed']} images"
    lines = [
        f"sidecar set {report['name']}, version {report['version']}: {report['rows']} rows of snapshot {report['snapshot']} need {what}; "
        f"{report['present']} were there, {report['encoded']} were encoded"
        + (f", {report['by_others']} by another run" if report["by_others"] else "")
    ]
    lines += [f"  {name:<10} {kind}" for name, kind in report["tensors"].items()]
    if report["files"]:
        about = f"{report['files']} files, {size(report['bytes_written'])}, {report['tokens']} tokens"
        lines.append(f"  wrote      {about}, in {report['seconds']:.0f} s")
    if report["without_caption"]:
        lines.append(
            f"  without    {report['without_caption']} rows have no caption; they get the embedding of the empty one"
        )
    if report["truncated"]:
        lines.append(
            f"  truncated  {report['truncated']} texts were longer than max_tokens; the rest of them is not embedded"
        )
    lines.append(
        f'train with LatentLoader(…, sidecars=("{report["name"]}",)), or lathe export --sidecar {report["name"]}'
    )
    return lines


def import_lines(report: dict[str, Any]) -> list[str]:
    """Result of `lathe sidecar import`."""
    lines = [
        f"sidecar set {report['name']}, version {report['version']}: {report['imported']} rows imported by {report['by']}, "
        f"{report['present']} were there"
    ]
    lines += [f"  {name:<10} {kind}" for name, kind in report["tensors"].items()]
    if report["unknown"]:
        lines.append(
            f"  left out   {report['unknown']} rows of the table that no row of snapshot {report['snapshot']} needs"
        )
    if report["lacking"]:
        lines.append(
            f"  lacking    {report['lacking']} of {report['rows']} rows of snapshot {report['snapshot']} have no tensors yet"
        )
    return lines


def list_lines(sets: list[dict[str, Any]]) -> list[str]:
    """Result of `lathe sidecar list`."""
    if not sets:
        return ["no sidecar sets; `lathe embed` and `lathe sidecar import` make them"]
    lines = []
    for one in sets:
        newest = one["newest"]
        by = "caption" if one["key"] == "caption_hash" else "id"
        if newest is None:
            lines.append(f"{one['name']}: by {by}, not finished; run its command again")
            continue
        covered = ", ".join(sorted({str(item["snapshot"]) for item in newest["covers"]}, key=int)) or "none"
        lines.append(
            f"{one['name']}@{newest['number']}: {newest['rows']} rows by {by}, {newest['files']} files, {size(newest['num_bytes'])}; "
            f"complete for snapshots {covered}"
        )
        lines += [f"  {name:<10} {kind}" for name, kind in one["tensors"].items()]
    return lines


def verify_lines(report: dict[str, Any]) -> list[str]:
    """Result of `lathe sidecar verify`."""
    about = f"{report['name']}@{report['version']}: {report['rows']} rows in {report['files']} files, {size(report['bytes'])}"
    if not report["num_damaged"]:
        return [f"{about}: all as they were written"]
    lines = [f"{about}: {report['num_damaged']} files are damaged", *(f"  {text}" for text in report["damaged"])]
    folder = f"_sidecars/{report['name']}"
    return [
        *lines,
        f"restore them; or delete their receipts in {folder}/receipts/, and {folder}/versions/, which names them, "
        "and run the command that made the set again",
    ]


def prune_lines(report: dict[str, Any]) -> list[str]:
    """Result of `lathe sidecar prune`."""
    done = "would be removed from" if report["dry_run"] else "removed from"
    lines = [
        f"{report['name']}: {report['pruned']} rows that nothing needs {done} {report['rewritten']} files; "
        f"{report['rows']} rows, version {report['version']}"
    ]
    if report["deleted"]:
        about = f"{report['deleted']} old files, {size(report['deleted_bytes'])}"
        lines.append(f"  deleted    {about}, and {report['versions_deleted']} versions that named them")
    if report["waiting"]:
        lines.append(
            f"  waiting    {report['waiting']} old files stay for readers of older versions; run again after the grace time"
        )
    return lines


def _embedded(report: Any) -> str:
    return f"{report.encoded} embedded, {report.tokens} tokens, {size(report.bytes_written)}"
