"""Shared by the tests of this folder: the files under test, and parsing of commands by the real command line."""

from __future__ import annotations

import copy
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.cli import nightly_command
from pipeline.config import build_job

if TYPE_CHECKING:
    import pytest

    from pipeline.config import EncodeJob

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RAYJOB_PATH = DEPLOY / "rayjob" / "rayjob.yaml"
JOB_PATH = DEPLOY / "job.yaml"
JOB_MOUNT = "/etc/lathe/job.yaml"  # where pods of the cluster find it
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: Path) -> dict[str, Any]:
    """The only document of a YAML file."""
    return yaml.safe_load(path.read_text())


def pins(name: str = "constraints.txt") -> dict[str, str]:
    """A file of exact versions in `deploy/`: distribution -> version."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def documents() -> list[tuple[Path, dict[str, Any]]]:
    """Every Kubernetes object of `deploy/`, with its file."""
    found = []
    for path in sorted(DEPLOY.rglob("*.yaml")):
        for item in yaml.safe_load_all(path.read_text()):
            if isinstance(item, dict) and item.get("kind", "Kustomization") != "Kustomization":
                found.append((path, item))
    return found


def patched(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """`document` after the JSON patch of a file, for operations add, replace and remove of members."""
    out = copy.deepcopy(document)
    for step in yaml.safe_load(path.read_text()):
        *parents, last = step["path"].strip("/").split("/")
        place: Any = out
        for name in parents:
            place = place[int(name) if isinstance(place, list) else name]
        assert (last in place) == (step["op"] != "add"), step
        if step["op"] == "remove":
            del place[last]
        else:
            place[last] = step["value"]
    return out


def night_of(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[EncodeJob, dict[str, int]]:
    """The job and the exit codes of `lathe nightly /etc/lathe/job.yaml …` with `deploy/job.yaml` there, not started."""
    program, name, path, *flags = shlex.split(command)
    assert (program, name, path) == ("lathe", "nightly", JOB_MOUNT)
    found: list[tuple[EncodeJob, dict[str, int]]] = []

    def run(path: str, flags: dict[str, Any], overrides: tuple[str, ...], codes: list[str], *_: Any, **__: Any) -> None:
        found.append((build_job(flags, config_path=path, overrides=overrides), nightly_command._codes(codes)))

    monkeypatch.setattr(nightly_command, "_run", run)
    result = CliRunner().invoke(cli.app, [name, str(JOB_PATH), *flags])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    (night,) = found
    return night


def job_of(command: str, monkeypatch: pytest.MonkeyPatch) -> EncodeJob:
    """The job that `lathe encode …` or `python -m pipeline encode …` describes, by our own command line, not started."""
    words = shlex.split(command)
    program = ["lathe"] if words[0] == "lathe" else ["python", "-m", "pipeline"]
    assert words[: len(program)] == program, command
    jobs: list[EncodeJob] = []

    def encode(flags: dict[str, Any], config: str | None, overrides: tuple[str, ...]) -> None:
        jobs.append(build_job(flags, config_path=config, overrides=overrides))
        raise typer.Exit(0)  # before --publish

    monkeypatch.setattr(cli, "_encode", encode)
    result = CliRunner().invoke(cli.app, words[len(program) :])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    (job,) = jobs
    return job
