"""A run's folder: checkpoints that survive a kill at any moment, and the weights it publishes.

    FOLDER/recipe.yaml          what is being run
    FOLDER/metrics.jsonl        one line per logged step        (`model.training.journal`)
    FOLDER/tensorboard/         the same for TensorBoard
    FOLDER/sheets/              originals and reconstructions
    FOLDER/checkpoints/         everything a continuation needs, the last few
    FOLDER/lock                 held by the process that writes
    FOLDER/weights/             config.json and model.safetensors, what `--checkpoint` takes, and run.json: how they came about

Enters: a `TrainingRecipe`, states. Leaves: files that are whole or not there. One process of a run writes, all read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import is_zipfile

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from model.training.recipe import TrainingRecipe, differences, training_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

CHECKPOINT = re.compile(r"step-(\d{9})\.pt")
PARTIAL = ".partial"
PATIENCE_S = 10.0  # a process that was killed a moment ago may still be going


class RunFolder:
    """Paths and whole files of a run."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints, self.sheets, self.weights = (
            self.path / part for part in ("checkpoints", "sheets", "weights")
        )
        self.metrics, self.tensorboard = self.path / "metrics.jsonl", self.path / "tensorboard"
        self._recipe = self.path / "recipe.yaml"

    def begin(self, recipe: TrainingRecipe) -> None:
        """Makes the folder, or makes sure that it holds a run of this recipe; without a checkpoint it may become one.

        Raises:
            ValueError: it holds checkpoints of another recipe, something that is no run, or a run under way of another recipe.
        """
        if self._recipe.exists():
            changed = differences(self._begun(), recipe)
            if changed and self._saved():
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed)}); a run continues with what it was begun with: "
                    "restore that, or give a folder of its own (start: {weights: …} begins where another run ended)"
                )
            if changed:  # nothing was learned yet: a first attempt that failed is corrected in place
                with self.held():
                    self._put(recipe)
        else:
            # a kill while the recipe was written leaves this much of a folder
            partial = self._recipe.name + PARTIAL
            if self.path.exists() and any(path.name != partial for path in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run; give an empty folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._put(recipe)
        for folder in (self.checkpoints, self.sheets, self.weights):
            folder.mkdir(exist_ok=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else writes, for as long as the context lasts; a process that dies lets go.

        Raises:
            ValueError: another process has it, and still has after `PATIENCE_S`.
        """
        with (self.path / "lock").open("ab") as file:
            deadline = time.monotonic() + PATIENCE_S
            while not _locked(file):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.path} belongs to a run that is under way in another process; wait for it, stop it, or give another folder"
                    )
                time.sleep(0.1)
            yield

    def save(self, step: int, state: Mapping[str, Any], *, keep: int) -> None:
        """The state after `step` steps; all but the last `keep` are removed."""
        _whole(self.checkpoints / f"step-{step:09d}.pt", lambda path: torch.save(dict(state), path))
        for old in self._saved()[:-keep]:
            old.unlink()

    def last_step(self) -> int:
        """Steps of the newest checkpoint; 0 where there is none."""
        saved = self._saved()
        return _step(saved[-1]) if saved else 0

    def load(self, step: int, device: torch.device) -> dict[str, Any]:
        """The state after `step` steps. Only plain data and tensors are read, whatever the file holds.

        Raises:
            ValueError: the file was damaged after it was written.
        """
        path = self.checkpoints / f"step-{step:09d}.pt"
        if not is_zipfile(path):
            raise ValueError(
                f"{path} is damaged: {path.stat().st_size} bytes that are no whole checkpoint; remove it, and the run goes on from the one "
                "before it, or begins again where there is none"
            )
        state = torch.load(path, map_location=device, weights_only=True)
        return dict(state)

    def publish(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Weights as `--checkpoint FOLDER/weights` takes them; beside them `facts` (network, step, ...), recipe, data and curve."""
        text = json.dumps(config, indent=1)
        _whole(self.weights / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        metadata = {key: str(value) for key, value in facts.items()}
        _whole(self.weights / "model.safetensors", lambda path: save_file(tensors, path, metadata=metadata))
        told = {"recipe": self._begun().to_dict(), "data": self._data(), "loss": self.curve()}
        text = json.dumps({**facts, **told}, indent=1)
        _whole(self.weights / "run.json", lambda path: path.write_text(text, encoding="utf-8"))

    def curve(self, points: int = 100) -> list[dict[str, float]]:
        """The logged values as at most so many means over stretches of steps; `step` is the last of each."""
        lines = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        length = -(-len(lines) // points)
        return [_mean(lines[start : start + length]) for start in range(0, len(lines), length or 1)]

    def _data(self) -> Any:
        """What whoever began the run left in `data.json` about where its clips come from; None where nobody did."""
        path = self.path / "data.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _put(self, recipe: TrainingRecipe) -> None:
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        _whole(self._recipe, lambda path: path.write_text(text, encoding="utf-8"))

    def _begun(self) -> TrainingRecipe:
        return training_recipe(yaml.safe_load(self._recipe.read_text(encoding="utf-8")))

    def keep_lines(self, last: int) -> None:
        """Forgets logged steps after `last`, which will come again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
        text = "".join(f"{line}\n" for line in kept)
        _whole(self.metrics, lambda path: path.write_text(text, encoding="utf-8"))

    def clean(self) -> None:
        """Removes what a killed process left half written."""
        for left in self.path.rglob(f"*{PARTIAL}"):
            left.unlink()

    def _saved(self) -> list[Path]:
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else iter(())
        return sorted((path for path in found if CHECKPOINT.fullmatch(path.name)), key=_step)


def _locked(file: BinaryIO) -> bool:
    """Whether the file's lock is this process's now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1])


def _mean(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Of every value that all lines have, to five digits."""
    shared = [name for name, value in lines[0].items() if name != "step" and all(name in line for line in lines)]
    numbers = [name for name in shared if isinstance(lines[0][name], float)]
    means = {name: float(f"{sum(line[name] for line in lines) / len(lines):.5g}") for name in numbers}
    return {"step": lines[-1]["step"], **means}


def _whole(path: Path, write: Callable[[Path], object]) -> None:
    """Written aside, made durable and renamed: readers see the old file or the new one. Raises OSError where the disk does not take it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
    except (RuntimeError, SafetensorError) as error:
        # What torch and safetensors make of a full disk; torch's own text names a position in its archive and no reason.
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = disk_usage(path.parent).free
        raise OSError(f"{path} could not be written, on a disk with {free} bytes free ({error}); make room") from error
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)
