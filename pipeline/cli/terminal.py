"""How every command talks: its options, its answers, its errors. Rooms are imported when a command runs, so that `--help` is instant.

Exit codes: 0 done; 1 it was started and failed; 2 the command or configuration is wrong, nothing was started; 130 stopped by SIGINT,
SIGTERM or SIGHUP.
"""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from pipeline.process.signals import EXIT_CODE

if TYPE_CHECKING:
    from collections.abc import Callable

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
Model = Annotated[
    str | None,
    typer.Option(
        help="Network; `lathe models` lists them. [default: leanvae-dim16; with no weights given, the one that has its own]"
    ),
]
Checkpoint = Annotated[str | None, typer.Option(help="Weights: path, s3://… or hf://owner/repo/file.")]
Untrained = Annotated[int | None, typer.Option(metavar="SEED", help="Random weights, for trials only.")]
ComputeDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: by device]")]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        help="Refuse (exit code 2) folders, patterns and lists that hold anything that would be passed over.",
    ),
]
StoreSettings = Annotated[str | None, typer.Option("--endpoint-url", help="S3 endpoint other than AWS.")]


RETRY_REJECTS = "--retry-rejects"


class EncodeCommand(typer.core.TyperCommand):
    """Command whose option `--retry-rejects` takes any number of reasons, or none: typer has no option with an optional value.

    All words behind the option, up to the next option, are reasons: inputs and output stand before it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Joins the option and its reasons to one argument."""
        return super().parse_args(ctx, _with_joined_reasons(args))


def _with_joined_reasons(args: list[str]) -> list[str]:
    if RETRY_REJECTS not in args:
        return args
    at = args.index(RETRY_REJECTS)
    end = at + 1
    while end < len(args) and not args[end].startswith("-"):
        if not re.fullmatch(r"[a-z0-9_]+(,[a-z0-9_]+)*", args[end]):
            fail(
                f"{RETRY_REJECTS}: {args[end]!r} is not a reason such as too_long; inputs and output stand before the option",
                2,
            )
        end += 1
    return [*args[:at], f"{RETRY_REJECTS}={','.join(args[at + 1 : end])}", *args[end:]]


def storage_config(endpoint_url: str | None) -> Any:
    """The storage section of a command without a job. Raises ConfigError for an endpoint that is none."""
    from pipeline.config import StorageConfig, validate

    return validate(StorageConfig, {"endpoint_url": endpoint_url})


def show(values: dict[str, Any], wording: str, as_json: bool) -> None:
    """Prints an answer: as JSON, or in the words of the function `wording` of `pipeline.cli.wording`."""
    from pipeline.cli import wording as room

    typer.echo(json.dumps(values, indent=1, default=str) if as_json else "\n".join(getattr(room, wording)(values)))


def guard(call: Callable[[], None], *, debug: bool, again: str = "the same command resumes") -> None:
    """Runs a command; one of our own errors becomes one line and its exit code. `again`: what to do after an interruption."""
    from pipeline.errors import Interrupted, LatheError

    try:
        call()
    except Interrupted as error:
        stopped(str(error))
    except LatheError as error:
        if debug:
            raise
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        stopped(f"stopped; {again}")
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None


def stopped(message: str) -> None:
    """One line on stderr, and the end of a command that a signal stopped."""
    from pipeline.cli.progress import say

    say(f"lathe: {message}")
    raise typer.Exit(EXIT_CODE)


def fail(message: str, code: int) -> None:
    """One line on stderr, and the end of the command."""
    typer.echo(f"lathe: error: {message}", err=True)
    raise typer.Exit(code)
