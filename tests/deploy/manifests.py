"""Shared by the tests of this folder: the files under test, and parsing of commands by the real command line."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from typer.testing import CliRunner

from pipeline.cli import app as cli
from pipeline.config import build_job

if TYPE_CHECKING:
    import pytest

    from pipeline.config import EncodeJob

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
RAYJOB_PATH = DEPLOY / "rayjob.yaml"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load(path: Path) -> dict[str, Any]:
    """The only document of a YAML file."""
    return yaml.safe_load(path.read_text())


def pins() -> dict[str, str]:
    """`constraints.txt`: distribution -> exact version."""
    lines = [
        line for line in (DEPLOY / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")
    ]
    return dict(line.split("==") for line in lines)


def job_of(command: str, monkeypatch: pytest.MonkeyPatch) -> EncodeJob:
    """The job that `lathe encode …` or `python -m pipeline encode …` describes, by our own command line, not started."""
    words = shlex.split(command)
    program = ["lathe"] if words[0] == "lathe" else ["python", "-m", "pipeline"]
    assert words[: len(program)] == program, command
    jobs: list[EncodeJob] = []
    monkeypatch.setattr(
        cli,
        "_encode",
        lambda flags, config, overrides: jobs.append(build_job(flags, config_path=config, overrides=overrides)),
    )
    result = CliRunner().invoke(cli.app, words[len(program) :])
    assert result.exit_code == 0, f"{command}\n{result.output}"
    (job,) = jobs
    return job
