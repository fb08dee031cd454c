"""`lathe nightly`. `pipeline.cli.app` registers it. Packages are imported when it runs, so that `--help` is fast."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pipeline.cli.terminal import RESUMES, AsJson, Debug, Overrides, fail_with, guard, show_result, stopped
from pipeline.process import signals

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.engine.driver.progress import BuildProgress, Display
    from pipeline.engine.driver.report import BuildReport
    from pipeline.errors import ConfigError
    from pipeline.nightly.night import Night

REJECTED_SHOWN = 5


def nightly(
    job: Annotated[str, typer.Argument(metavar="JOB.yaml", help="Job file, as for encode --config.")],
    inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[INPUT...]", help="Inputs instead of those of the job.")
    ] = None,
    max_hours: Annotated[float | None, typer.Option(help="Hours after which no further shard is started.")] = None,
    max_shards: Annotated[int | None, typer.Option(help="Most shards of this night.")] = None,
    max_gpu_hours: Annotated[
        float | None, typer.Option(help="Hours of all encoders together, after which no further shard is started.")
    ] = None,
    removed: Annotated[str | None, typer.Option(help="keep or drop inputs that are gone. [default: keep]")] = None,
    accept_fingerprint: Annotated[
        bool,
        typer.Option(
            "--accept-new-fingerprint", help="Encode although settings or versions that change latents have changed."
        ),
    ] = False,
    accept_corpus: Annotated[
        bool, typer.Option("--accept-new-corpus", help="Encode although the output has none of these inputs.")
    ] = False,
    exit_code: Annotated[
        list[str] | None,
        typer.Option(metavar="OUTCOME=N", help="Exit code of an outcome, e.g. budget=0 or nothing=10; repeatable."),
    ] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Encode what is new or changed in the inputs of a job and publish it. One run at a time; see docs/nightly.md.

    Exit codes: 0 done, or nothing to do; 1 failed; 2 refused, nothing was started; 3 stopped by a limit; 4 a check of the data failed;
    5 another run holds the lease; 130 stopped by a signal.
    """
    flags = {
        "inputs": inputs or None,
        "nightly.max_hours": max_hours,
        "nightly.max_shards": max_shards,
        "nightly.max_gpu_hours": max_gpu_hours,
        "nightly.removed": removed,
        "nightly.new_corpus": "accept" if accept_corpus else None,
    }

    def run() -> None:
        with signals.handled():
            _run(job, flags, tuple(set_ or ()), exit_code or [], as_json, debug, accept_fingerprint=accept_fingerprint)

    guard(run, debug=debug, again=RESUMES)


def _run(
    path: str,
    flags: dict[str, Any],
    overrides: tuple[str, ...],
    exit_codes: list[str],
    as_json: bool,
    debug: bool,
    *,
    accept_fingerprint: bool,
) -> None:
    from pipeline.config import build_job
    from pipeline.errors import ConfigError, LatheError

    codes = _codes(exit_codes)
    try:
        job = build_job(flags, config_path=path, overrides=overrides)  # before the slow imports
    except ConfigError as error:
        _refuse(error, codes["refused"], as_json, debug)
    try:
        night = _night(path, job, as_json, accept_fingerprint=accept_fingerprint)
    except BaseException as error:
        if (failed := getattr(error, "night", None)) is None:
            raise
        code = codes[failed.outcome]
        _show(failed, code, as_json)
        if isinstance(error, KeyboardInterrupt):
            stopped("stopped; the same command resumes", code)
        if isinstance(error, LatheError):
            fail_with(error, code, debug=debug)
        raise
    code = codes[night.outcome]
    _show(night, code, as_json)
    if night.outcome == "interrupted":
        stopped(night.message, code)
    if code:
        raise typer.Exit(code)


def _refuse(error: ConfigError, code: int, as_json: bool, debug: bool) -> NoReturn:
    """Ends a command whose job file is wrong. Its report names no output and is shown as JSON only."""
    from pipeline.nightly.night import new_night

    if as_json:
        night = new_night(output="")
        night.end(error, time.monotonic())
        _show(night, code, as_json)
    fail_with(error, code, debug=debug)


def _night(path: str, job: EncodeJob, as_json: bool, *, accept_fingerprint: bool) -> Night:
    """Runs a night. Errors have the `Night` as their attribute `night`."""
    from pipeline.cli.progress import display_for
    from pipeline.nightly.run import nightly as run_night

    # Its JSON lines would be on stdout, between which a reader of `--json` expects one object.
    display = display_for("plain" if as_json and job.progress == "json" else job.progress)
    shown = _WithoutReport(display) if as_json else display
    return run_night(job, shown, accept_fingerprint=accept_fingerprint, command=f"lathe nightly {path}")


def _codes(given: list[str]) -> dict[str, int]:
    """Exit codes by outcome, with those that the user gave.

    Raises:
        ConfigError: an unknown outcome, or not a number from 0 to 255.
    """
    from pipeline.errors import ConfigError
    from pipeline.nightly.night import EXIT_CODES

    codes: dict[str, int] = {str(outcome): code for outcome, code in EXIT_CODES.items()}
    for text in given:
        outcome, _, number = text.partition("=")
        if outcome not in codes or not (number.isascii() and number.isdigit() and int(number) <= 255):
            raise ConfigError(
                f"--exit-code {text}: expected OUTCOME=N with N from 0 to 255; outcomes: {', '.join(codes)}"
            )
        codes[outcome] = int(number)
    return codes


def _show(night: Night, code: int, as_json: bool) -> None:
    show_result({**night.to_dict(), "exit_code": code}, night_lines, as_json)


def night_lines(night: dict[str, Any]) -> list[str]:
    """The dictionary of a `Night` as lines of text."""
    from pipeline.cli.snapshot_wording import check_lines
    from pipeline.units import duration

    lines = [f"night {night['night']}: {night['outcome']}"]
    if night["published"]:
        changes = night["changes"]
        lines.append(
            f"  snapshot  {night['snapshot']}: inputs +{changes['inputs_added']} -{changes['inputs_removed']}, "
            f"{changes['inputs_replaced']} replaced; rows +{changes['rows_added']} -{changes['rows_dropped']}"
        )
    elif night["snapshot"] is None:
        lines.append("  snapshot  nothing was published")
    if night["page"] is not None:
        lines.append(f"  page      {night['page']}")
    lines += check_lines(night["checks"])
    if night["shards_todo"]:
        lines.append(
            f"  shards    {night['shards_todo']} to do: {night['shards_done']} done, {night['shards_left']} left"
        )
    lines += [f"  failed    {name}: {why}" for name, why in night["failed"].items()]
    if night["rejects"]:
        lines.append("  rejects   " + ", ".join(f"{reason} {n}" for reason, n in night["rejects"].items()))
    for item in night["rejected"][:REJECTED_SHOWN]:
        lines.append(f"            {item['uri']} {item['key'] or ''}: {item['reason']}, {item['message']}")
    cost = night["cost"]
    lines.append(
        f"  cost      {cost['gpu_s']:.0f} GPU-seconds, {cost['core_s']:.1f} core-seconds, {duration(cost['wall_s'])}"
    )
    lines += [f"  note      {text}" for text in night["notices"]]
    return lines + ([f"  reason    {night['message']}"] if night["outcome"] == "budget" else [])


class _WithoutReport:
    """Display of a build whose report is part of a larger one."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def notice(self, text: str) -> None:
        self._display.notice(text)

    def update(self, progress: BuildProgress) -> None:
        self._display.update(progress)

    def close(self, report: BuildReport | None) -> None:
        self._display.close(None)
