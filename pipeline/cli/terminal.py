"""Options that commands share, printing of results, errors and exit codes (listed in `app`).

Packages are imported when a command runs, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from pipeline.process.signals import EXIT_CODE
from pipeline.units import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.errors import LatheError

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="SECTION.KEY=VALUE", help="Set any option of the configuration by its name; repeatable."
    ),
]
Config = Annotated[
    str | None, typer.Option("--config", metavar="JOB.yaml", help="Job file; flags and --set override it.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Fps = Annotated[str | None, typer.Option(help="Target frames per second, or 'source'. [default: source]")]
Frames = Annotated[
    str | None, typer.Option(help="Frames of a clip, one or several lengths: 17 or 17,49,81. [default: 17]")
]
Size = Annotated[
    str | None,
    typer.Option(metavar="HxW", help="Frame sizes of the buckets, HxW[,HxW…], or area:HxW. [default: 256x256]"),
]
Clips = Annotated[
    str | None,
    typer.Option(
        help="Which clips of a video: head, tile, slide:STRIDE, uniform:N, whole; or spans[:RULE]: inside annotated spans. [default: head]"
    ),
]
TableOfAnnotations = Annotated[
    str | None,
    typer.Option(
        "--annotations",
        metavar="TABLE",
        help="Table (.parquet, .csv, .tsv, .jsonl) with captions, fields and spans of the inputs, by source and key.",
    ),
]
Crop = Annotated[
    str | None,
    typer.Option(
        help="What of a frame fills its bucket: center, top, random:K (K crops of each clip) or letterbox (cuts off black bars). "
        "[default: center]"
    ),
]
Variants = Annotated[
    str | None, typer.Option(help="More rows of each clip: flip (mirrored left to right). [default: none]")
]
Images = Annotated[
    str | None,
    typer.Option(
        help="Still images, as clips of one frame: keep (beside videos), skip or only; sizes: images.size. [default: skip]"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="Network; `lathe models` lists them. [default: leanvae-dim16; without --checkpoint, the network whose weights come with Lathe]"
    ),
]
Checkpoint = Annotated[str | None, typer.Option(help="Weights of the network: path, s3://… or hf://owner/repo/file.")]
Untrained = Annotated[int | None, typer.Option(metavar="SEED", help="Random weights of this seed, for trials only.")]
Device = Annotated[str | None, typer.Option(help="Device of the network: auto, cpu, cuda or cuda:N. [default: auto]")]
ComputeDtype = Annotated[
    str | None, typer.Option(help="Type of the computation: float32, bfloat16 or float16. [default: by device]")
]
Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        help="Run the network through torch.compile: auto, on or off. auto: as the output was begun, in a new one where it pays. "
        "[default: auto]",
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Exit with code 2 if a folder, pattern or list contains objects that would not be encoded.",
    ),
]
Fingerprint = Annotated[
    str | None, typer.Option(help="First digits of the fingerprint of the latents, where there are several.")
]
RESUMES = "the same command resumes"  # `again` of `guard`, for commands that go on where they were stopped
Output = Annotated[
    str,
    typer.Argument(metavar="OUTPUT[@N]", help="Folder or s3://bucket/prefix that encode wrote; out@3 for snapshot 3."),
]
StoreSettings = Annotated[str | None, typer.Option("--endpoint-url", help="URL of an S3 service other than AWS.")]


RETRY_REJECTS = "--retry-rejects"


class EncodeCommand(typer.core.TyperCommand):
    """Command whose option `--retry-rejects` takes any number of reasons, or none. Typer has no option with an optional value.

    All words after the option, up to the next option, are reasons; so inputs and output must stand before it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Joins the option and its reasons into one argument."""
        return super().parse_args(ctx, _with_joined_reasons(args))


def _with_joined_reasons(args: list[str]) -> list[str]:
    if RETRY_REJECTS not in args:
        return args
    at = args.index(RETRY_REJECTS)
    end = at + 1
    while end < len(args) and not args[end].startswith("-"):
        if not re.fullmatch(r"[a-z0-9_]+(,[a-z0-9_]+)*", args[end]):
            fail(
                f"{RETRY_REJECTS}: {args[end]!r} is not a reason such as too_long; inputs and output must stand before the option",
                2,
            )
        end += 1
    return [*args[:at], f"{RETRY_REJECTS}={','.join(args[at + 1 : end])}", *args[end:]]


def storage_config(endpoint_url: str | None) -> Any:
    """The storage section for a command without a job. Raises ConfigError for an invalid endpoint."""
    from pipeline.config import StorageConfig, validate

    return validate(StorageConfig, {"endpoint_url": endpoint_url})


def show(values: dict[str, Any], lines_of: str, as_json: bool) -> None:
    """Prints a result: as JSON, or as the lines that the function `lines_of` of `pipeline.cli.wording` makes."""
    from pipeline.cli import wording

    show_result(values, getattr(wording, lines_of), as_json)


def show_result(values: Any, lines: Callable[[Any], list[str]], as_json: bool) -> None:
    """Prints a result on stdout: as JSON, or as the lines that `lines` makes of it."""
    typer.echo(json_text(values) if as_json else "\n".join(map(printable, lines(values))))


def json_text(values: Any, indent: int | None = 1) -> str:
    """`values` as JSON for other programs, on one line without `indent`. Numbers that are not finite are null, as JSON lacks them."""
    try:
        return json.dumps(values, indent=indent, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(values), indent=indent, default=str, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def guard(
    call: Callable[[], None], *, debug: bool, again: str | Callable[[], str] = "run the same command again"
) -> None:
    """Runs a command; a `LatheError` becomes one line and its exit code. `again`: advice to the user after an interruption, or a
    function that gives it.
    """
    from pipeline.errors import Interrupted, LatheError

    try:
        call()
    except Interrupted as error:
        stopped(str(error))
    except LatheError as error:
        fail_with(error, error.exit_code, debug=debug)
    except KeyboardInterrupt:
        stopped(f"stopped; {again if isinstance(again, str) else again()}")
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None


@contextlib.contextmanager
def counter() -> Iterator[Callable[[str], None] | None]:
    """Shows a line on stderr that overwrites itself and ends with the block; None where stderr is not a terminal."""
    shown = False

    def show(text: str) -> None:
        nonlocal shown
        shown = True
        typer.echo(f"\r{text}", nl=False, err=True)

    try:
        yield show if sys.stderr.isatty() else None
    finally:
        if shown:
            typer.echo(err=True)


def stopped(message: str, code: int = EXIT_CODE) -> NoReturn:
    """Prints one line on stderr and ends a command that a signal stopped."""
    from pipeline.cli.progress import say

    say(f"lathe: {message}")
    raise typer.Exit(code)


def fail_with(error: LatheError, code: int, *, debug: bool) -> NoReturn:
    """As `fail`, with the error; with `debug` its traceback is printed before."""
    if debug:
        traceback.print_exception(error)
    fail(str(error), code)


def fail(message: str, code: int) -> NoReturn:
    """Prints one line on stderr and ends the command with exit code `code`."""
    typer.echo(f"lathe: error: {printable(message)}", err=True)
    raise typer.Exit(code)
