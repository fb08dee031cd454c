"""The Makefile, checked with `make -n` (nothing runs): commands of each target against the real command line."""

import os
import re
import shlex
import subprocess

import pytest
import typer

from model import registry
from pipeline.cli import app as cli
from pipeline.config import EMBEDDED
from tests.deploy.manifests import ROOT, job_of, pins


def make(*arguments):
    """A make of its own, also when the suite is run by one."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    }
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


def dry(*arguments, **variables):
    """Lines that make would run; -B: as on a fresh clone, where nothing is there yet."""
    result = make("-n", "-B", *arguments, *(f"{name}={value}" for name, value in variables.items()))
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_demo_runs_every_step(monkeypatch, tmp_path):
    lines = dry("demo", DEMO=tmp_path / "demo")
    commands = [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/lathe ")]
    assert [command[0] for command in commands] == [
        "sample",
        "encode",
        "verify",
        "inspect",
        "status",
        "preview",
        "publish",
        "report",
    ]
    for name, *arguments in commands:
        typer.main.get_command(cli.app).commands[name].make_context(name, list(arguments))
    job = job_of(shlex.join(["lathe", *commands[1]]), monkeypatch)
    # It shows the main road: Ray, and no weights to fetch, for some come along.
    assert (job.engine.executor, job.model.name, job.model.checkpoint, job.model.untrained) == (
        "ray",
        EMBEDDED,
        None,
        None,
    )
    assert registry.embedded(EMBEDDED) == f"embedded://{EMBEDDED}"
    assert job.inputs == (str(tmp_path / "demo" / "corpus"),)
    assert commands[-1] == ["report", f"{tmp_path}/demo/latents@1", "--html", f"{tmp_path}/demo/report.html"]
    assert lines[-1].startswith(".venv/bin/lathe report ")  # which ends with the path of the page
    assert commands[-3] == [
        "preview",
        str(tmp_path / "demo" / "latents"),
        "--sheet",
        str(tmp_path / "demo" / "preview.png"),
    ]
    from examples import train_dit  # imports diffusers, which the other workers of a test run need not do

    (training,) = (line.partition(" -m examples.train_dit ")[2] for line in lines if "examples.train_dit" in line)
    options = train_dit.parse(shlex.split(training))
    assert (options.output, options.run) == (f"{tmp_path}/demo/latents@1", f"{tmp_path}/demo/run")


def test_setup_installs_the_pinned_torch_first():
    text = "\n".join(dry("setup"))
    torch, rest = text.index("pip install 'torch=="), text.index("-e '.[dev]'")
    assert torch < rest
    assert set(re.findall(r"'torch==([\d.]+)", text)) == {pins()["torch"]}
    assert "-c deploy/constraints.txt" in text


def test_setup_is_done_once_per_change(tmp_path):
    stamp = tmp_path / "installed"
    stamp.touch()
    assert "pip" not in make("-n", "setup", f"INSTALLED={stamp}").stdout
    os.utime(stamp, (0, 0))  # older than pyproject.toml
    assert "pip install" in make("-n", "setup", f"INSTALLED={stamp}").stdout


def test_old_python_is_named_and_no_environment_made(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac\n')
    old.chmod(0o755)
    stamp = tmp_path / "installed"
    result = make("setup", f"PYTHON={old}", f"INSTALLED={stamp}")
    assert result.returncode != 0
    assert "needs python3 >= 3.11, got Python 3.9.2" in result.stderr
    assert not stamp.exists()


def test_the_tests_come_after_all_four_checks():
    lines = dry("test")
    tools = ["ruff format --check .", "ruff check .", "mypy", "lint-imports", "python -m pytest"]
    places = [next(i for i, line in enumerate(lines) if line.startswith(f".venv/bin/{tool}")) for tool in tools]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "target", ["help", "setup", "demo", "test", "check", "fix", "docs", "bench", "fuzz", "chaos", "wheels", "clean"]
)
def test_help_names_every_target(target):
    listed = make("help").stdout
    assert re.search(rf"^  make {target} +\S", listed, re.MULTILINE)
    assert dry(target)


def test_wheels_leaves_the_folder_alone_that_the_gpu_day_reads(monkeypatch):
    """`benchmarks/gpu_day.sh` takes WHEELS from the environment, where it may still be set."""
    monkeypatch.setenv("WHEELS", "/somewhere/mine")
    lines = dry("wheels")
    assert "/somewhere/mine" not in "\n".join(lines)
    assert re.search(r" -d \S+ .*\bdiffusers\b", " ".join(lines))  # of the tests of Wan
    assert [line for line in lines if line.startswith("rm -") and "wheels" in line] == [
        'rm -f "build/gpu-day-wheels"/*.whl',
        'rm -f "build/gpu-day-wheels"/numpy-*.whl "build/gpu-day-wheels"/safetensors-*.whl "build/gpu-day-wheels"/hf_xet-*.whl',
    ]


def test_ci_runs_the_make_targets():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")
