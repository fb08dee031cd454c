"""The command line: parse, call, exit code. Rooms are imported when a command runs, so that `--help` is instant.

Exit codes: 0 done; 1 the build failed; 2 the command or configuration is wrong, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

app = typer.Typer(
    name="lathe",
    help="Videos in, VAE latents out: exactly, exactly once, at the speed of decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any knob, by name; repeatable.")
]
Config = Annotated[
    str | None, typer.Option("--config", metavar="JOB.yaml", help="Job file; flags and --set win over it.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Fps = Annotated[str | None, typer.Option(help="Target frames per second, or 'source'. [default: source]")]
Frames = Annotated[str | None, typer.Option(help="Clip length(s), such as 17 or 17,49,81. [default: 17]")]
Size = Annotated[
    str | None, typer.Option(metavar="HxW", help="Bucket size(s) HxW[,HxW…], or area:HxW. [default: 256x256]")
]
Clips = Annotated[str | None, typer.Option(help="head, tile, slide:STRIDE, uniform:N or whole. [default: head]")]
Model = Annotated[str | None, typer.Option(help="Network; `lathe models` lists them. [default: leanvae-dim16]")]
Checkpoint = Annotated[str | None, typer.Option(help="Weights: path, s3://… or hf://owner/repo/file.")]
Untrained = Annotated[int | None, typer.Option(metavar="SEED", help="Random weights, for trials only.")]
ComputeDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: by device]")]
StoreSettings = Annotated[str | None, typer.Option("--endpoint-url", help="S3 endpoint other than AWS.")]


@app.command()
def encode(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT... OUTPUT", help="Shards or videos, then the output.")
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    format_: Annotated[str | None, typer.Option("--format", help="parquet or tar. [default: parquet]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored type: float16, bfloat16 or float32. [default: float16]")
    ] = None,
    moments: Annotated[bool | None, typer.Option("--moments", help="Store the log-variance too.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    executor: Annotated[str | None, typer.Option(help="ray or inline. [default: ray]")] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster to join. [default: RAY_ADDRESS, else a private Ray]")
    ] = None,
    progress: Annotated[str | None, typer.Option(help="auto, rich, plain, json or none. [default: auto]")] = None,
    config: Config = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Encode a corpus of videos into latent shards. Run the same command again to resume."""
    from pipeline.config import build_job

    *inputs, output = paths if paths and len(paths) > 1 else [*(paths or []), None]
    if paths and len(paths) == 1 and config is None:
        _fail("encode takes INPUT... OUTPUT, got only one path; add the output folder or s3://bucket/prefix", 2)
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
        "write.format": format_,
        "write.dtype": dtype,
        "write.moments": moments,
        "engine.executor": executor,
        "engine.address": address,
        "progress": progress,
    }
    _guard(lambda: _encode(build_job(flags, config_path=config, overrides=tuple(set_ or ()))), debug=debug)


def _encode(job: Any) -> None:
    from pipeline.engine import driver
    from pipeline.errors import LatheError
    from pipeline.progress import display_for

    display = display_for(job.progress)
    report = None
    try:
        report = driver.encode(job, display)
    except LatheError as error:
        report = getattr(error, "report", None)
        raise
    finally:
        display.close(report)


@app.command()
def plan(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Shards or videos.")],
    model: Model = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    dtype: Annotated[str | None, typer.Option(help="Stored type. [default: float16]")] = None,
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say, from headers only, which buckets would fill, what would be dropped and why, and how much would be written."""

    def run() -> None:
        from pipeline.config import build_job
        from pipeline.survey import plan_job

        flags = {
            "inputs": inputs,
            "output": ".",
            "model.name": model,
            "clips.fps": fps,
            "clips.frames": frames,
            "clips.size": size,
            "clips.select": clips,
            "write.dtype": dtype,
        }
        result = plan_job(build_job(flags, config_path=config, overrides=tuple(set_ or ())))
        _show(result.to_dict(), "plan_lines", as_json)

    _guard(run, debug=debug)


@app.command()
def status(output: str, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """How far an output is: shards, clips, rejects, and whether a build is running."""

    def run() -> None:
        from pipeline.audit import status as room

        _show(room.status(_store(output, endpoint_url)), "status_lines", as_json)

    _guard(run, debug=debug)


@app.command()
def inspect(target: str, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """What is in a latent file or an output: network, fingerprint, buckets, counts, statistics."""

    def run() -> None:
        from pipeline.audit import inspect as room

        _show(room.inspect_path(target, _storage_config(endpoint_url)), "inspect_lines", as_json)

    _guard(run, debug=debug)


@app.command()
def verify(output: str, endpoint_url: StoreSettings = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Check hashes, counts, values and receipts of an output against its files. Exit code 1 if anything is wrong."""

    def run() -> None:
        from pipeline.audit import verify as room

        report = room.verify_output(_store(output, endpoint_url))
        _show(report.to_dict(), "verify_lines", as_json)
        if not report.ok:
            raise typer.Exit(1)

    _guard(run, debug=debug)


@app.command()
def sample(
    folder: str,
    seed: Annotated[int, typer.Option(help="Another seed, another corpus.")] = 0,
    layout: Annotated[str, typer.Option(help="tar (WebDataset shards) or files.")] = "tar",
    debug: Debug = False,
) -> None:
    """Make a small varied corpus of real encoded videos, so that the first run needs nothing from outside."""

    def run() -> None:
        from pipeline.errors import ConfigError
        from pipeline.sample_corpus import make_samples

        if layout not in ("tar", "files"):
            raise ConfigError(f"--layout: expected tar or files, got {layout!r}")
        summary = make_samples(folder, seed=seed, layout="tar" if layout == "tar" else "files")
        typer.echo(str(summary))

    _guard(run, debug=debug)


@app.command()
def train(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Recipe, data, output.")],
    output: Annotated[str | None, typer.Option(help="Folder of the run, instead of the job's.")] = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train a network, from videos or without any. Run the same command again to go on after a kill."""

    def run() -> None:
        from pipeline.training import run as room
        from pipeline.training.job import build_train_job
        from pipeline.training.telling import Telling

        wanted = build_train_job({"output": output}, config_path=job, overrides=tuple(set_ or ()))
        telling = Telling(wanted.progress)
        prepared = room.prepare(wanted, telling)
        if wanted.distributed:
            from pipeline.engine import ray_training

            weights = ray_training.train(prepared, telling)
        else:
            weights = room.learn(prepared, room.definite_device(wanted.device), telling.step)
        telling.end(prepared, weights)

    _guard(run, debug=debug)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="One network, with everything known about it.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the networks that can be named with --model, or tell all about one."""

    def run() -> None:
        from model import registry
        from pipeline.errors import ConfigError

        try:
            cards = {own: registry.card(own) for own in ([registry.resolve(name)] if name else registry.names())}
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _show(cards, "model_lines" if name else "models_lines", as_json)

    _guard(run, debug=debug)


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Network; `lathe models` lists them.")],
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    compute_dtype: ComputeDtype = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Frame size to try.")] = "64x64",
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure on your weights and machine that chunks, batches and interleaving change no latent. Exit code 1 if one does."""

    def run() -> None:
        from pipeline.config import build_job
        from pipeline.encoder.examination import check_network

        flags = {
            "inputs": ["."],
            "output": ".",
            "model.name": model,
            "model.checkpoint": checkpoint,
            "model.untrained": untrained,
            "model.device": device,
            "model.compute_dtype": compute_dtype,
        }
        job = build_job(flags, config_path=config, overrides=tuple(set_ or ()))
        verdict = check_network(job.model, size)
        _show(verdict, "check_lines", as_json)
        if not verdict["ok"]:
            raise typer.Exit(1)

    _guard(run, debug=debug)


@app.command()
def evaluate(
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder for numbers, plots and pictures.")],
    inputs: Annotated[list[str] | None, typer.Argument(metavar="INPUT...", help="Shards or videos.")] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]")] = None,
    compute_dtype: ComputeDtype = None,
    lpips: Annotated[list[str] | None, typer.Option(metavar="FILE", help="LPIPS-VGG; twice: VGG16, heads.")] = None,
    i3d: Annotated[str | None, typer.Option(metavar="FILE", help="I3D weights, for rFVD.")] = None,
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how well a network gives videos back: PSNR, SSIM and more per clip and bucket, with plots and a sheet of pictures."""
    flags: dict[str, Any] = {"inputs": inputs, "output": output, "model.name": model, "model.checkpoint": checkpoint}
    flags |= {"model.untrained": untrained, "model.device": device, "model.compute_dtype": compute_dtype}
    flags |= {"clips.fps": fps, "clips.frames": frames, "clips.size": size, "clips.select": clips}

    def run() -> None:
        from pipeline.evaluation.evaluate import command

        command(flags, config, tuple(set_ or ()), lpips or (), i3d, as_json, typer.echo)

    _guard(run, debug=debug)


@app.command("convert-checkpoint")
def convert_checkpoint(
    source: str,
    target: str,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle SOURCE: runs whatever code it contains.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Rewrite a checkpoint as safetensors, which can be loaded without running code."""

    def run() -> None:
        from model import checkpoint
        from pipeline.errors import CheckpointError

        try:
            checkpoint.convert(source, target, trust_pickle=trust_pickle)
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: the hub
            raise CheckpointError(str(error)) from error
        typer.echo(target)

    _guard(run, debug=debug)


def _storage_config(endpoint_url: str | None) -> Any:
    from pipeline.config import StorageConfig, validate

    return validate(StorageConfig, {"endpoint_url": endpoint_url})


def _store(output: str, endpoint_url: str | None) -> Any:
    from pipeline.storage import open_store

    return open_store(output, _storage_config(endpoint_url))


def _show(values: dict[str, Any], wording: str, as_json: bool) -> None:
    from pipeline import wording as room

    typer.echo(json.dumps(values, indent=1, default=str) if as_json else "\n".join(getattr(room, wording)(values)))


def _guard(call: Callable[[], None], *, debug: bool) -> None:
    """Runs a command; one of our own errors becomes one line and its exit code."""
    from pipeline.errors import LatheError

    try:
        call()
    except LatheError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; the same command resumes", 130)
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None


def _fail(message: str, code: int) -> None:
    typer.echo(f"lathe: error: {message}", err=True)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of `lathe` and `python -m pipeline`."""
    app()
