"""Training runs small enough to finish in a second: the tiny LeanVAE, videos and images of 32 pixels, twelve steps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import yaml

from pipeline.training import run
from pipeline.training.job import build_train_job
from pipeline.training.progress_log import ProgressLog
from tests import forked_command
from tests.threads import one_thread
from tests.tiny_corpus import TINY_NETWORK

# Logged at steps 6 and 12, kept at 4, 8 and 12: a run that dies at a logged step has work to do again.
RECIPE = {
    "network": "leanvae",
    "config": TINY_NETWORK,
    "log_every": 6,
    "checkpoint_every": 4,
    "sheet_every": 100,
    "stages": [
        {
            "name": "reconstruction",
            "steps": 12,
            "learning_rate": 1e-3,
            "final_learning_rate": 1e-4,
            "objective": {"terms": {"mse": 1.0}},
            "groups": [
                {"frames": 5, "height": 32, "width": 32, "batch": 2},
                {"frames": 1, "height": 32, "width": 32, "batch": 2},
            ],
            "batches": 2,
        }
    ],
}


def write_job(path: Path, **values) -> Path:
    """A job of `RECIPE` in the file's folder, on the CPU."""
    job = {"recipe": RECIPE, "output": str(path.parent / "run"), "device": "cpu", "loaders": 0, **values}
    path.write_text(yaml.safe_dump(job))
    return path


def train(job: Path, *arguments, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`lathe train` in a process of its own."""
    return forked_command.run("train", job, *arguments, env={**(environment or os.environ), "OMP_NUM_THREADS": "1"})


def learn_here(job: Path) -> None:
    """The same in this process, silently."""
    built = build_train_job({}, config_path=str(job))
    with one_thread():
        run.learn(run.prepare(built, ProgressLog("none")), "cpu", lambda step, values: None)


def lines(folder: Path) -> list[dict]:
    """Metrics of the run in a folder, without durations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("stage", "seconds", "waited")} for line in lines]
