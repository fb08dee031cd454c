"""Commands about networks: train, models, check, evaluate, preview, convert-checkpoint. `pipeline.cli.app` registers them.

Packages are imported when a command runs, so that `--help` is fast.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.terminal import (
    AsJson,
    Checkpoint,
    Clips,
    ComputeDtype,
    Config,
    Debug,
    Device,
    Fps,
    Frames,
    Model,
    Output,
    Overrides,
    Size,
    StoreSettings,
    Untrained,
    guard,
    show,
    show_result,
    storage_config,
)


def train(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Job file: recipe, data, output.")],
    output: Annotated[str | None, typer.Option(help="Folder of the run. [default: that of the job file]")] = None,
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Train a network on videos or on synthetic scenes. Run the same command again to resume."""

    def run() -> None:
        from pipeline.training import run as training_run
        from pipeline.training.job import build_train_job
        from pipeline.training.progress_log import ProgressLog

        wanted = build_train_job({"output": output}, config_path=job, overrides=tuple(set_ or ()))
        progress_log = ProgressLog(wanted.progress)
        device = None if wanted.distributed else training_run.definite_device(wanted.device)
        prepared = training_run.prepare(wanted, progress_log)
        if device is None:
            from pipeline.engine.ray import training as ray_training

            weights = ray_training.train(prepared, progress_log)
        else:
            weights = training_run.learn(prepared, device, progress_log.step)
        progress_log.end(prepared, weights)

    guard(run, debug=debug, again="the same command continues from the last checkpoint")


def models(
    name: Annotated[str | None, typer.Argument(help="Network to describe in full.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the networks for --model, or one of them. With a name, prints its full description."""

    def run() -> None:
        from model import registry
        from pipeline.errors import ConfigError

        try:
            cards = {own: registry.card(own) for own in ([registry.resolve(name)] if name else registry.names())}
        except ValueError as error:
            raise ConfigError(str(error)) from None
        show(cards, "model_lines" if name else "models_lines", as_json)

    guard(run, debug=debug)


def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Network; `lathe models` lists them.")],
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    size: Annotated[str, typer.Option(metavar="HxW", help="Frame size of the check.")] = "64x64",
    compile_: Annotated[
        str | None,
        typer.Option(
            "--compile",
            help="Check the network as compiled builds run it (on), or eagerly (off, auto). [default: that of the job file]",
        ),
    ] = None,
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check that chunking changes no latent. Tries chunks, batches and interleaving on this machine; exit code 1 if one does."""

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
            "engine.compile": compile_,
        }
        job = build_job(flags, config_path=config, overrides=tuple(set_ or ()))
        verdict = check_network(job.model, size, compiled=job.engine.compile == "on", threads=job.engine.threads)
        show(verdict, "check_lines", as_json)
        if not verdict["ok"]:
            raise typer.Exit(1)

    guard(run, debug=debug)


def evaluate(
    output: Annotated[str, typer.Option(metavar="FOLDER", help="New folder for tables, plots and pictures.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="INPUT...", help="Tar shards or videos, as for encode.")
    ] = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    untrained: Untrained = None,
    fps: Fps = None,
    frames: Frames = None,
    size: Size = None,
    clips: Clips = None,
    device: Device = None,
    compute_dtype: ComputeDtype = None,
    lpips: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Weights of LPIPS, AlexNet or VGG16: one file, or twice for features and heads."
        ),
    ] = None,
    i3d: Annotated[str | None, typer.Option(metavar="FILE", help="Weights of I3D, for rFVD.")] = None,
    fvd: Annotated[
        str,
        typer.Option(
            metavar="tf|styleganv|videogpt",
            help="Protocol of rFVD: windows of 16 whole frames, or whole clips cropped as those codes do.",
        ),
    ] = "tf",
    config: Config = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how well a network reconstructs. Writes PSNR, SSIM and more per clip and bucket, with plots and a picture sheet."""
    flags: dict[str, Any] = {"inputs": inputs, "output": output, "model.name": model, "model.checkpoint": checkpoint}
    flags |= {"model.untrained": untrained, "model.device": device, "model.compute_dtype": compute_dtype}
    flags |= {"clips.fps": fps, "clips.frames": frames, "clips.size": size, "clips.select": clips}

    def run() -> None:
        from pipeline.cli.evaluation_wording import evaluation_lines
        from pipeline.config import build_job
        from pipeline.evaluation import evaluate

        job = build_job(flags, config_path=config, overrides=tuple(set_ or ()))
        summary = evaluate.evaluate(
            job, lpips=lpips or (), i3d=i3d, fvd=fvd, news=lambda text: typer.echo(text, err=True)
        )
        show_result(summary, evaluation_lines, as_json)

    guard(run, debug=debug, again="an evaluation cannot be resumed: give another --output, or empty this one")


def preview(
    output: Output,
    sheet: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png",
            help="Picture sheet to write. [default: preview.png in OUTPUT, or in the current folder if that is remote]",
        ),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Largest number of clips.")] = 6,
    checkpoint: Annotated[
        str | None, typer.Option(help="Weights that made the latents. [default: their recorded place]")
    ] = None,
    device: Annotated[str, typer.Option(help="Device of the network: auto, cpu, cuda or cuda:N.")] = "auto",
    endpoint_url: StoreSettings = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Decode a few latents to a picture sheet. The original frames are above; the last line printed is the path of the sheet."""

    def run() -> None:
        from pipeline.cli.preview_wording import preview_lines
        from pipeline.look.preview import preview as show_clips

        storage = storage_config(endpoint_url)
        description = show_clips(output, storage, sheet=sheet, clips=clips, checkpoint=checkpoint, device=device)
        show_result(description, preview_lines, as_json)

    guard(run, debug=debug)


def convert_checkpoint(
    source: Annotated[str, typer.Argument(help="Checkpoint: path or hf://owner/repo/file.")],
    target: Annotated[str, typer.Argument(help="New .safetensors file.")],
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="Unpickle SOURCE, which runs any code it contains.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Type of the stored floats: float32, bfloat16 or float16. [default: unchanged]")
    ] = None,
    debug: Debug = False,
) -> None:
    """Rewrite a checkpoint as safetensors. These can be loaded without running code."""

    def run() -> None:
        from model import checkpoint
        from pipeline.errors import CheckpointError

        try:
            checkpoint.convert(source, target, trust_pickle=trust_pickle, dtype=dtype)
        except (ValueError, OSError) as error:
            raise CheckpointError(str(error)) from error
        typer.echo(target)

    guard(run, debug=debug)
