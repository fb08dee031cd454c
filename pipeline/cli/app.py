"""Commands of `lathe`: encode, plan, inspect, verify, sample. Packages are imported when a command runs, so that `--help` is fast.

Exit codes: 0 done; 1 it was started and failed; 2 the command or configuration is wrong, nothing was started; 130 stopped by SIGINT,
SIGTERM or SIGHUP: running shards were finished, and the same command resumes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import (
    compact_command,
    export_command,
    maintenance_commands,
    network_commands,
    nightly_command,
    output_commands,
    report_commands,
    sidecar_commands,
    status_commands,
)
from pipeline.cli.terminal import (
    RESUMES,
    RETRY_REJECTS,
    AsJson,
    Checkpoint,
    Clips,
    Compile,
    Config,
    Crop,
    Debug,
    Device,
    EncodeCommand,
    Fps,
    Frames,
    Images,
    Model,
    Output,
    Overrides,
    Size,
    StoreSettings,
    Strict,
    TableOfAnnotations,
    Untrained,
    Variants,
    fail,
    guard,
    show,
    storage_config,
)
from pipeline.process import signals

if TYPE_CHECKING:
    from pipeline.config import EncodeJob

app = typer.Typer(
    name="lathe",
    help="Encode videos into VAE latents, each exactly once, from local files or S3.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command(cls=EncodeCommand)
def encode(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT... OUTPUT",
            help="Tar shards, videos or images (files, folders, globs, braces, @list.txt, s3://…), then the output folder or s3://bucket/prefix.",
        ),
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    annotations: TableOfAnnotations = None,
    crop: Crop = None,
    variants: Variants = None,
    images: Images = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="File format: parquet or tar. [default: parquet]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Type of stored latents: float16, bfloat16, float32 or int8. [default: float16]")
    ] = None,
    moments: Annotated[bool | None, typer.Option("--moments", help="Store the log-variance as well.")] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            help="What image-to-video models need besides: first_frame (an image) and i2v_cond (the latent of it and zeros).",
        ),
    ] = None,
    device: Device = None,
    executor: Annotated[
        str | None,
        typer.Option(
            help="Where encoders run: ray (a cluster or this machine) or inline (this process). [default: ray]"
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Address of the Ray cluster. [default: RAY_ADDRESS, else a private Ray on this machine]"),
    ] = None,
    compile_: Compile = None,
    progress: Annotated[
        str | None, typer.Option(help="Progress display: auto, rich, plain, json or none. [default: auto]")
    ] = None,
    retry_rejects: Annotated[
        str | None,
        typer.Option(
            RETRY_REJECTS,
            metavar="[REASON…]",
            help="Encode rejected inputs of finished shards again: those with these reasons, or, without reasons, those rejected by "
            "limits that this run has raised.",
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish the output as a snapshot if all went well; see `lathe publish`.")
    ] = False,
    strict: Strict = None,
    allow_empty: Annotated[
        bool | None,
        typer.Option("--allow-empty", help="Exit with code 0 although nothing was encoded. Otherwise: code 1."),
    ] = None,
    config: Config = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Encode a corpus of videos into files of latents. Run the same command again to resume."""
    *inputs, output = paths if paths and len(paths) > 1 else [*(paths or []), None]
    if paths and len(paths) == 1 and config is None:
        fail("encode takes INPUT... OUTPUT, got only one path; add the output folder or s3://bucket/prefix", 2)
    flags = {
        "inputs": inputs or None,
        "output": output,
        "model.name": model,
        "model.checkpoint": checkpoint,
        "model.untrained": untrained,
        "model.device": device,
        "clips.fps": fps,
        "clips.frames": frames,
        "clips.size": size,
        "clips.select": clips,
        "annotations": annotations,
        "clips.crop": crop,
        "clips.variants": variants,
        "images.policy": images,
        "write.format": format_,
        "write.dtype": dtype,
        "write.moments": moments,
        "write.store": store,
        "engine.executor": executor,
        "engine.address": address,
        "engine.compile": compile_,
        "progress": progress,
        "retry_rejects": retry_rejects,
        "strict": strict,
        "allow_empty": allow_empty,
    }

    def run() -> None:
        with signals.handled():  # before any slow step
            job = _encode(flags, config, tuple(set_ or ()))
            if publish:
                output_commands.publish_job(job)

    guard(run, debug=debug, again=RESUMES)


def _encode(flags: dict[str, Any], config: str | None, overrides: tuple[str, ...]) -> EncodeJob:
    from pipeline.cli.progress import display_for
    from pipeline.config import build_job
    from pipeline.engine.driver import encode as driver

    display = display_for((job := build_job(flags, config_path=config, overrides=overrides)).progress)
    report = None
    try:
        report = driver.encode(job, display)
    except BaseException as error:  # a KeyboardInterrupt has a report as well
        report = getattr(error, "report", None)
        raise
    finally:
        display.close(report)
    return job


@app.command()
def plan(
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="Tar shards or videos, as for encode.")
    ] = None,
    model: Model = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    annotations: TableOfAnnotations = None,
    crop: Crop = None,
    variants: Variants = None,
    images: Images = None,
    dtype: Annotated[str | None, typer.Option(help="Type of stored latents. [default: float16]")] = None,
    compile_: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Plan for a network run through torch.compile: auto, on or off. auto: where it pays in a new output. [default: auto]",
        ),
    ] = None,
    strict: Strict = None,
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what encode would do, from headers only. Lists clips in each bucket, dropped inputs with reasons, bytes of latents."""

    def run() -> None:
        from pipeline.config import build_job
        from pipeline.forecast.survey import forecast_job

        flags = {
            "inputs": inputs or None,
            "output": ".",
            "model.name": model,
            "clips.fps": fps,
            "clips.frames": frames,
            "clips.size": size,
            "clips.select": clips,
            "annotations": annotations,
            "clips.crop": crop,
            "clips.variants": variants,
            "images.policy": images,
            "write.dtype": dtype,
            "engine.compile": compile_,
            "strict": strict,
        }
        with signals.handled():  # SIGTERM as well ends decoders and deletes temporary files
            result = forecast_job(build_job(flags, config_path=config, overrides=tuple(set_ or ())))
        show(result.to_dict(), "plan_lines", as_json)

    guard(run, debug=debug, again="nothing was written; the same command starts over")


app.command()(status_commands.status)


@app.command()
def inspect(
    target: Annotated[
        str,
        typer.Argument(metavar="FILE|OUTPUT[@N]", help="Latent file, or an output of encode; out@3 for snapshot 3."),
    ],
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a latent file or output contains. Lists network, fingerprint, buckets, counts and statistics."""

    def run() -> None:
        from pipeline.operate.inspect import inspect_path

        show(inspect_path(target, storage_config(endpoint_url)), "inspect_lines", as_json)

    guard(run, debug=debug)


@app.command()
def verify(output: Output, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check the files of an output. Compares hashes, counts, values and receipts; exit code 1 if anything is wrong."""

    def run() -> None:
        from pipeline.operate.verify import verify_output

        store, number = output_commands.open_numbered(output, endpoint_url)
        report = verify_output(store, snapshot=number)
        show(report.to_dict(), "verify_lines", as_json)
        if not report.ok:
            raise typer.Exit(1)

    guard(run, debug=debug)


@app.command()
def sample(
    folder: Annotated[str, typer.Argument(help="New folder for the videos.")],
    seed: Annotated[int, typer.Option(help="Seed of the corpus; another seed gives other videos.")] = 0,
    layout: Annotated[str, typer.Option(help="tar (WebDataset shards) or files (plain videos).")] = "tar",
    debug: Debug = False,
) -> None:
    """Make a small corpus for a first run. It contains varied videos and needs no download."""

    def run() -> None:
        from pipeline.errors import ConfigError
        from pipeline.sample_corpus import make_samples

        if layout not in ("tar", "files"):
            raise ConfigError(f"--layout: expected tar or files, got {layout!r}")
        summary = make_samples(folder, seed=seed, layout="tar" if layout == "tar" else "files")
        typer.echo(str(summary))

    guard(run, debug=debug)


app.command()(status_commands.why)
app.command()(nightly_command.nightly)
app.command()(output_commands.publish)
app.command()(output_commands.snapshots)
app.command()(output_commands.diff)
app.command()(output_commands.stats)
app.command()(report_commands.report)
app.command()(report_commands.serve)
app.command()(maintenance_commands.takedown)
app.command()(maintenance_commands.gc)
app.command()(compact_command.compact)
app.command()(export_command.export)
app.command()(sidecar_commands.embed)
app.add_typer(sidecar_commands.sidecar, name="sidecar")
app.command()(network_commands.train)
app.command()(network_commands.models)
app.command()(network_commands.check)
app.command()(network_commands.evaluate)
app.command()(network_commands.preview)
app.command("convert-checkpoint")(network_commands.convert_checkpoint)
