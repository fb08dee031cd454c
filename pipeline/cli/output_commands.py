"""Commands about published outputs: publish, snapshots, diff, stats. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is instant.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.terminal import (
    AsJson,
    Debug,
    Images,
    Output,
    StoreSettings,
    TableOfAnnotations,
    guard,
    json_text,
    show_result,
    storage_config,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import EncodeJob
    from pipeline.errors import PublishFailed
    from pipeline.operate.publish import Progress


def open_numbered(output: str, endpoint_url: str | None) -> tuple[Any, int | None]:
    """Store and snapshot number of `OUTPUT[@N]`; no number: None."""
    from pipeline.ledger.addresses import open_output

    return open_output(output, storage_config(endpoint_url))


def publish(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or s3://bucket/prefix that encode wrote.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[INPUT...]", help="The inputs as they are now, to know what is gone or not encoded yet."
        ),
    ] = None,
    images: Images = None,
    fingerprint: Annotated[
        str | None, typer.Option(metavar="PREFIX", help="Only latents of this fingerprint. [default: all]")
    ] = None,
    removed: Annotated[str, typer.Option(help="keep or drop inputs that are gone; drop needs INPUT...")] = "keep",
    max_removed: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest fraction of inputs or rows that --removed drop takes out at once."),
    ] = 0.5,
    partial: Annotated[
        bool, typer.Option("--partial", help="Publish although shards are not done; they are recorded.")
    ] = False,
    reject_budget: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Largest fraction of damaged inputs. [default: that of --config, or 0.05]"),
    ] = None,
    max_drift: Annotated[
        float,
        typer.Option(min=0, help="Largest change of a channel's mean or standard deviation, in standard deviations."),
    ] = 0.5,
    canary: Annotated[int, typer.Option(min=0, help="Clips that are encoded again and compared; 0: none.")] = 4,
    psnr_floor: Annotated[float, typer.Option(help="Lowest mean PSNR of these clips, dB.")] = 15.0,
    ssim_floor: Annotated[float, typer.Option(help="Lowest mean SSIM of these clips.")] = 0.3,
    checkpoint: Annotated[
        str | None, typer.Option(help="Where the latents' weights are now. [default: as recorded]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N, for these clips.")] = "auto",
    delta: Annotated[
        bool, typer.Option("--delta/--no-delta", help="Write the Delta Lake view of Parquet outputs as well.")
    ] = True,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild",
            help="Pass over snapshots that are damaged, read the receipts they cover again, go on without lost receipts.",
        ),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Store a page on the snapshot in the output as well; see `lathe report`.")
    ] = False,
    annotations: TableOfAnnotations = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config", metavar="JOB.yaml", help="Job of the build: its inputs, annotations, columns and reject budget."
        ),
    ] = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check an output and publish it as the next immutable snapshot. Exit code 1, and nothing published, if a check fails."""
    reached: list[Progress] = []

    def run() -> None:
        from pipeline.ledger.addresses import check_whole_output

        root = check_whole_output(output)  # before the slow imports
        from pipeline.config import build_job
        from pipeline.errors import ConfigError, PublishFailed, ViewNotWritten
        from pipeline.operate.publish import Progress, PublishOptions, list_inputs
        from pipeline.operate.publish import publish as make_snapshot
        from pipeline.operate.publish_checks import Limits
        from pipeline.storage import open_store

        for name, floor, unit in (
            ("--psnr-floor", psnr_floor, "a number of dB"),
            ("--ssim-floor", ssim_floor, "a number"),
        ):
            if not math.isfinite(floor):
                raise ConfigError(f"{name}: expected {unit}, got {floor}")
        if removed not in ("keep", "drop"):
            raise ConfigError(f"--removed: expected keep or drop, got {removed!r}")
        if annotations and not (inputs or config):
            raise ConfigError("--annotations needs the inputs that it annotates: lathe publish OUTPUT INPUT…")
        job = None
        if inputs or config:
            named = {"inputs": inputs, "output": root, "annotations": annotations, "images.policy": images}
            job = build_job(named | {"storage.endpoint_url": endpoint_url}, config_path=config)
        storage = job.storage if job is not None else storage_config(endpoint_url)
        store = open_store(root, storage)
        check = None
        if canary:  # its import takes seconds
            from pipeline.look.canary import canary_check

            floors = {"psnr_floor": psnr_floor, "ssim_floor": ssim_floor}
            check = canary_check(storage, clips=canary, checkpoint=checkpoint, device=device, **floors)
        limits = Limits(drift=max_drift, removed=max_removed)
        if (budget := job.reject_budget if reject_budget is None and job is not None else reject_budget) is not None:
            limits = replace(limits, reject_budget=budget)
        options = PublishOptions(
            fingerprint=fingerprint,
            removed="drop" if removed == "drop" else "keep",
            partial=partial,
            limits=limits,
            job=None if job is None else {"inputs": list(job.inputs)},
            delta=delta,
            rebuild=rebuild,
        )
        listing = None if job is None else lambda: list_inputs(job, store)
        try:
            reached.append(Progress())
            published = make_snapshot(store, options, listing=listing, canary=check, progress=reached[0])
        except ViewNotWritten as error:
            show_published(error.published, as_json, error=str(error))
            raise
        except PublishFailed as error:
            show_failed(error, as_json)
            raise
        page = _report(store, published, storage, as_json, checkpoint, device) if report else None
        show_published(published, as_json, page=page)

    guard(run, debug=debug, again=lambda: interrupted(reached, output))


def _report(store: Any, published: Any, storage: Any, as_json: bool, checkpoint: str | None, device: str) -> str:
    """URI of the page on the snapshot, made unless one is stored.

    Raises:
        BuildError: it cannot be made; the snapshot is published, which is printed.
    """
    from pipeline.errors import BuildError, LatheError
    from pipeline.format.layout import snapshot_page_key
    from pipeline.report.written import make_stored_report, stored_page

    number = published.snapshot.number
    try:
        if stored_page(store, number) is not None:
            return str(store.uri(snapshot_page_key(number)))
        return make_stored_report(store, number, storage, checkpoint=checkpoint, device=device)
    except LatheError as error:
        show_published(published, as_json, error=str(error))
        raise BuildError(
            f"snapshot {number} is published, the page on it was not made: {error}; then: lathe report {store.root}@{number} --store"
        ) from error


def publish_job(job: EncodeJob) -> None:
    """What `encode --publish` does after the build: publishes its output with its inputs as the listing."""
    from pipeline.errors import PublishFailed
    from pipeline.look.canary import canary_check
    from pipeline.operate.publish import PublishOptions, list_inputs
    from pipeline.operate.publish import publish as make_snapshot
    from pipeline.operate.publish_checks import Limits
    from pipeline.storage import open_store

    store = open_store(job.output, job.storage)
    options = PublishOptions(limits=Limits(reject_budget=job.reject_budget), job=job.model_dump(mode="json"))
    check = canary_check(job.storage, checkpoint=job.model.checkpoint, device=job.model.device)
    try:
        published = make_snapshot(store, options, listing=lambda: list_inputs(job, store), canary=check)
    except PublishFailed as error:
        if job.progress == "json":
            _show_event("publish_failed", failed_values(error))
        else:
            show_failed(error, False)
        raise
    if job.progress == "json":
        _show_event("published", published_values(published))
    else:
        show_published(published, False)


def _show_event(event: str, values: dict[str, Any]) -> None:
    """Prints one line of the JSON lines of `--progress json`."""
    typer.echo(json_text({"event": event, **values}, indent=None))


def interrupted(reached: Sequence[Progress], output: str) -> str:
    """What an interrupted publisher did."""
    progress = reached[0] if reached else None
    if progress is None or progress.creating is None:
        return "nothing was published; run the same command again"
    if progress.created:
        return (
            f"snapshot {progress.creating} is published; run the same command again to bring the Delta view up to date"
        )
    return f"snapshot {progress.creating} may be published: `lathe snapshots {output}` lists it if it is"


def show_published(published: Any, as_json: bool, error: str | None = None, page: str | None = None) -> None:
    """Prints a `Published`. `error`: what failed afterwards. `page`: URI of the page on the snapshot."""
    from pipeline.cli.snapshot_wording import published_lines

    values = published_values(published)
    if error is not None:
        values["error"] = error
    if page is not None:
        values["page"] = page
    show_result(values, published_lines, as_json)


def published_values(published: Any) -> dict[str, Any]:
    """A `Published`, JSON-ready."""
    import json

    record = json.loads(published.snapshot.to_json())
    delta = None if published.delta is None else published.delta.to_dict()
    return {"made": published.made, "notices": published.notices, "delta": delta, "snapshot": record}


def show_failed(error: PublishFailed, as_json: bool) -> None:
    """Prints the checks of a snapshot that was not published, with their numbers. The error itself goes to stderr, by `guard`."""
    from pipeline.cli.snapshot_wording import check_lines

    values = failed_values(error)
    if as_json:
        typer.echo(json_text(values))
    elif values["checks"]:
        typer.echo("\n".join(check_lines(values["checks"])))


def failed_values(error: PublishFailed) -> dict[str, Any]:
    """The checks of a snapshot that was not published, JSON-ready."""
    from dataclasses import asdict

    return {"made": False, "error": str(error), "checks": [asdict(check) for check in error.checks]}


def snapshots(
    output: Output, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False
) -> None:
    """List the snapshots of an output, or one of them (exit code 1 if it is damaged): when each was made, what it holds, what changed."""

    def run() -> None:
        import json

        from pipeline.cli.snapshot_wording import snapshots_lines
        from pipeline.errors import OutputError
        from pipeline.ledger.receipts import Ledger
        from pipeline.ledger.snapshots import Snapshots

        store, number = open_numbered(output, endpoint_url)
        Ledger(store).latent_set()
        found = Snapshots(store)
        records, damaged = [], []
        for each in found.numbers() if number is None else [number]:
            try:
                records.append(json.loads(found.read(each).to_json()))
            except OutputError as error:
                damaged.append({"number": each, "error": str(error)})
        values = {"output": store.root, "snapshots": records, "damaged": damaged}
        show_result(values, snapshots_lines, as_json)
        if number is not None and damaged:
            raise typer.Exit(1)

    guard(run, debug=debug)


def diff(
    a: Annotated[str, typer.Argument(metavar="OUTPUT@A", help="Earlier snapshot.")],
    b: Annotated[str, typer.Argument(metavar="OUTPUT@B", help="Later snapshot; the newest without a number.")],
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare two snapshots: files, rows and sources added, replaced and dropped."""

    def run() -> None:
        from pipeline.cli.snapshot_wording import diff_lines
        from pipeline.operate.diff import diff as compare

        values = compare(open_numbered(a, endpoint_url), open_numbered(b, endpoint_url))
        show_result(values, diff_lines, as_json)

    guard(run, debug=debug)


def stats(
    output: Output,
    clips: Annotated[int, typer.Option(min=1, help="Clips of each bucket that are read for histograms.")] = 256,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png", help="Histograms per channel and bucket.")] = None,
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Values of stored latents per channel and bucket, the scale and shift they suggest, and the network's own constants."""

    def run() -> None:
        from pipeline.cli.snapshot_wording import stats_lines
        from pipeline.operate.statistics import statistics
        from pipeline.operate.statistics_plot import plot_statistics

        store, number = open_numbered(output, endpoint_url)
        values = statistics(store, number, clips=clips)
        if plot is not None:
            newest = max(values["fingerprints"].values(), key=lambda item: item["exact"]["values_per_channel"])
            plot_statistics(newest, plot)
        show_result(values, stats_lines, as_json)

    guard(run, debug=debug)
