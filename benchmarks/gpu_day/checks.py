"""Tests that need a GPU, and the properties of `lathe check` for three networks in the dtypes of builds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import model
from model.losslessness import examine

if TYPE_CHECKING:
    from benchmarks.gpu_day.report import Report
    from benchmarks.gpu_day.settings import Settings
    from benchmarks.machine import Machine

ROOT = Path(__file__).resolve().parents[2]
CHECKED_DTYPES = ("bfloat16", "float32")
KEPT_OUTPUT = 6000  # characters at the end of pytest's output
SUMMARY_S = 4.0  # for pytest, interrupted, to say what failed


def gpu_test_files() -> list[str]:
    """Files of tests with the marker `gpu`. Only these are collected: others import packages that such a machine lacks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def run_tests(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `tests`: `pytest -m gpu` where a skipped test is a failed test; on a CPU it only collects."""
    collect_only = not machine.cuda
    report.measure("pytest -m gpu", lambda: run_pytest(collect_only=collect_only, until=report.until), slow=True)


def run_pytest(*, collect_only: bool, until: float) -> dict[str, Any]:
    """Exit code and end of the output. Raises RuntimeError if a test failed, was skipped, or none was found, or the time was spent."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *gpu_test_files()]
    command += ["--collect-only", "-q"] if collect_only else ["--durations=10"]
    left = max(1.0, until - time.monotonic())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would pytest
    environment = os.environ | {"REQUIRE_CUDA": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        output, in_time = _output(process, left)
    print(output, flush=True)
    if not in_time:
        raise RuntimeError(f"pytest did not end in {left:.0f} s: {output[-KEPT_OUTPUT:]}")
    if process.returncode:
        raise RuntimeError(f"pytest exited with {process.returncode}: {output[-KEPT_OUTPUT:]}")
    return {"exit_code": process.returncode, "output": output[-KEPT_OUTPUT:]}


def _output(process: subprocess.Popen[str], seconds: float) -> tuple[str, bool]:
    """All that the process printed, and whether it ended in time. One that did not is interrupted, so that pytest lists what failed."""
    try:
        return process.communicate(timeout=seconds)[0], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=SUMMARY_S)[0], False
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()[0], False


def run_check(report: Report, settings: Settings, machine: Machine) -> None:
    """Section `check`."""
    for dtype in CHECKED_DTYPES:
        for network in settings.checked:
            report.measure(f"{network} {dtype}", lambda n=network, d=dtype: check(n, d, settings, machine))


def check(network: str, dtype: str, settings: Settings, machine: Machine) -> dict[str, Any]:
    """Findings of `lathe check`. Raises RuntimeError if one exceeds what the network claims."""
    config = settings.config(network)
    vae = model.load(network, config=config, untrained=0, device=machine.device, dtype=dtype)
    with torch.inference_mode():
        findings = list(examine(vae, height=settings.check_size, width=settings.check_size))
    failed = [asdict(finding) for finding in findings if not finding.ok]
    if failed:
        raise RuntimeError(f"{network} {dtype} on {machine.device}: {failed}")
    largest = {
        direction: max(f.difference / max(f.magnitude, 1e-30) for f in findings if f.direction == direction)
        for direction in ("encode", "decode")
    }
    return {"properties": len(findings), "largest_relative_difference": largest}
