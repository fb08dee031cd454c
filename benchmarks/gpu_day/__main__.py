"""Command line of the GPU day: runs sections in order and writes `report.json`; `benchmarks/gpu_day.sh` calls it once a section.

    python -m benchmarks.gpu_day --out FOLDER [--sections facts,encode] [--seconds 60] [--rehearse]

A process for each section. An error that makes CUDA unusable, or a measurement that hangs, ends the process; the next one goes on with the
section after that measurement. Exit codes: 0, or 3 if a measurement failed; 2: no CUDA device; others: the section is unfinished.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

BEGUN = time.monotonic()  # importing torch takes seconds of the section
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the pipeline does; libgomp reads it when torch loads

import torch

from benchmarks.gpu_day import checks, encode_table, machine_facts, nvdec, suspicions, training_step
from benchmarks.gpu_day.report import Report
from benchmarks.gpu_day.settings import REHEARSAL, Settings
from benchmarks.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SECTIONS: dict[str, Callable[[Report, Settings, Machine], None]] = {
    "facts": machine_facts.run,
    "tests": checks.run_tests,
    "check": checks.run_check,
    "encode": encode_table.run,
    "nvdec": nvdec.run,
    "suspicions": suspicions.run,
    "training": training_step.run,
    "profile": encode_table.profile_best,
}

FAILED = 3


def main(arguments: Sequence[str] | None = None, begun: float | None = None) -> int:
    """Exit code. `begun`: time (`time.monotonic`) from which `--seconds` count [default: now]."""
    begun = time.monotonic() if begun is None else begun
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of report.json")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=540, help="after these no further measurement begins")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    args = parser.parse_args(arguments)
    settings = REHEARSAL if args.rehearse else Settings()
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; run this on a machine with one, or use --rehearse", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    # One thread for tiny sizes: on busy cores more threads wait for each other 50 times as long as they compute.
    machine = Machine(settings.device, 1 if args.rehearse else min(os.cpu_count() or 1, 16))
    report = Report(args.out / "report.json", begun + args.seconds, settings.limit_s, machine.wait)
    for name in args.sections.split(","):
        report.begin(name)
        SECTIONS[name](report, settings, machine)
        report.finish()
    return FAILED if report.errors else 0


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
