"""`lathe export`. `pipeline.cli.app` registers it. Packages are imported when it runs, so that `--help` is fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.terminal import (
    RESUMES,
    AsJson,
    Debug,
    Output,
    StoreSettings,
    counter,
    guard,
    show_result,
    storage_config,
)
from pipeline.units import quantity

if TYPE_CHECKING:
    from collections.abc import Callable


def export(
    output: Output,
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="New folder, or one that an earlier export of this output made.")
    ],
    to: Annotated[
        str,
        typer.Option("--to", help="Trainer: fastvideo, ltx2, musubi, automodel, megatron-bridge, or wds (plain tars)."),
    ],
    as_model: Annotated[
        str | None,
        typer.Option(
            "--as", metavar="MODEL", help="Model of the trainer; custom for one of your own. [default: by the network]"
        ),
    ] = None,
    text_embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="TABLE.parquet", help="Text embeddings by id, caption or caption hash; see docs/export.md."
        ),
    ] = None,
    sidecar: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET|NAME=SET.TENSOR",
            help="Text embeddings from a sidecar set of the output, e.g. t5 or clip_embedding=clip.pooled; repeatable.",
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="FILTER", help='Rows to export, e.g. "fps >= 24 and metadata.score > 5".')
    ] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="First digits of the fingerprint to export, where there are several.")
    ] = None,
    normalize: Annotated[
        str | None,
        typer.Option(help="Values for wds and --as custom: model (the network's constants applied) or none (raw)."),
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONTENT=SUFFIX",
            help="wds: member of a sample, e.g. latent=latent.pt, caption=prompt.txt, metadata=json, text=embed.pt; repeatable.",
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="wds: type of latents and texts. [default: as stored]")] = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write published latents in the format of a trainer. Run again, it adds what is new and removes what is gone."""

    def run() -> None:
        from pipeline.cli.export_wording import export_lines
        from pipeline.export.targets import Request, export_output
        from pipeline.process import signals

        request = Request(
            to,
            as_model,
            normalize,
            tuple(member or ()),
            dtype,
            text_embeddings,
            tuple(sidecar or ()),
            where,
            fingerprint,
        )
        with signals.handled(), counter() as show:
            report = export_output(output, directory, request, storage_config(endpoint_url), _progress(show))
        values = report.to_dict()
        show_result(values, export_lines, as_json)

    guard(run, debug=debug, again=RESUMES)


def _progress(show: Callable[[str], None] | None) -> Callable[[int, int], None] | None:
    return show and (lambda written, total: show(f"{written} of {quantity(total, 'row')} written"))
