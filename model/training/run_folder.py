"""Folder of a training run: checkpoints that survive a kill at any moment, and the published weights.

    FOLDER/recipe.yaml          the recipe
    FOLDER/metrics.jsonl        one line per logged step        (`model.training.metrics_log`)
    FOLDER/tensorboard/         the same for TensorBoard
    FOLDER/sheets/              originals and reconstructions
    FOLDER/checkpoints/         everything a continuation needs, the last few
    FOLDER/lock                 held by the process that writes
    FOLDER/weights/             config.json and model.safetensors, for `--checkpoint`, and run.json: how they were made

Files are written atomically. One process of a run writes, all read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage
from statistics import fmean
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
FULL_BYTES = 1024 * 1024  # a disk with less free is full: what could not be written has taken the rest
PATIENCE_S = 10.0  # a killed process may take a moment to end


class RunFolder:
    """Paths of a run's folder, and atomic writing of its files."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.checkpoints, self.sheets, self.weights = (
            self.path / part for part in ("checkpoints", "sheets", "weights")
        )
        self.metrics, self.tensorboard = self.path / "metrics.jsonl", self.path / "tensorboard"
        self._recipe = self.path / "recipe.yaml"

    def prepare(self, recipe: TrainingRecipe) -> None:
        """Creates the folder, or checks that it holds a run of this recipe. A run without a checkpoint takes over the recipe.

        Raises:
            ValueError: it holds checkpoints of another recipe, is not a run's folder, or another recipe's run is in progress.
        """
        if self._recipe.exists():
            changed = differences(self._saved_recipe(), recipe)
            if changed and self._saved_checkpoints():
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changed)}); a run continues with its own recipe only: "
                    "restore it, or give a new folder (start: {weights: …} continues from another run's weights)"
                )
            if changed:  # nothing was learned yet, so a failed first attempt may be corrected in place
                with self.locked():
                    self._write_recipe(recipe)
        else:
            # left behind by a kill while the recipe was written
            partial = self._recipe.name + PARTIAL
            if self.path.exists() and any(path.name != partial for path in self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and is not a run's folder; give an empty folder")
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_recipe(recipe)
        for folder in (self.checkpoints, self.sheets, self.weights):
            folder.mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Context that locks the folder for writing; the lock ends with the process.

        Raises:
            ValueError: another process holds the lock, and still does after `PATIENCE_S`.
        """
        with (self.path / "lock").open("ab") as file:
            deadline = time.monotonic() + PATIENCE_S
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{self.path} is in use by a run in another process; wait for it, stop it, or give another folder"
                    )
                time.sleep(0.1)
            yield

    def save(self, step: int, state: Mapping[str, Any], *, keep: int) -> None:
        """Saves the state after `step` steps, and removes all but the last `keep` checkpoints."""
        _write_atomically(self.checkpoints / f"step-{step:09d}.pt", lambda path: torch.save(dict(state), path))
        for old in self._saved_checkpoints()[:-keep]:
            old.unlink()

    def last_step(self) -> int:
        """Step of the newest checkpoint; 0 if there is none."""
        saved = self._saved_checkpoints()
        return _step(saved[-1]) if saved else 0

    def load(self, step: int) -> dict[str, Any]:
        """State after `step` steps, on the CPU. Reads only plain data and tensors, whatever the file contains.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.checkpoints / f"step-{step:09d}.pt"
        if not is_zipfile(path):
            raise ValueError(
                f"{path} is damaged ({path.stat().st_size} bytes, not a complete checkpoint); remove it, and the run continues from the "
                "previous one, or starts again if there is none"
            )
        # On a GPU the state would be there twice, and Adam's step counts would stay: every step would wait for each of them.
        state = torch.load(path, map_location="cpu", weights_only=True)
        return dict(state)

    def publish(self, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Writes weights for `--checkpoint FOLDER/weights`, and run.json with `facts` (network, step, ...), recipe, data and loss curve."""
        text = json.dumps(config, indent=1)
        _write_atomically(self.weights / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
        tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
        metadata = {key: str(value) for key, value in facts.items()}
        _write_atomically(self.weights / "model.safetensors", lambda path: save_file(tensors, path, metadata=metadata))
        record = {"recipe": self._saved_recipe().to_dict(), "data": self._data(), "loss": self.curve()}
        text = json.dumps({**facts, **record}, indent=1)
        _write_atomically(self.weights / "run.json", lambda path: path.write_text(text, encoding="utf-8"))

    def curve(self, points: int = 100) -> list[dict[str, float]]:
        """Logged values as at most `points` means over ranges of steps; `step` is the last of each range."""
        lines = [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]
        length = -(-len(lines) // points)
        return [_mean(lines[start : start + length]) for start in range(0, len(lines), length or 1)]

    def _data(self) -> Any:
        """Content of `data.json`, where the caller may describe the source of clips; None if there is none."""
        path = self.path / "data.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _write_recipe(self, recipe: TrainingRecipe) -> None:
        text = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
        _write_atomically(self._recipe, lambda path: path.write_text(text, encoding="utf-8"))

    def _saved_recipe(self) -> TrainingRecipe:
        return training_recipe(yaml.safe_load(self._recipe.read_text(encoding="utf-8")))

    def drop_lines_after(self, last: int) -> None:
        """Removes logged steps after `last`, which will be repeated."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last]
        text = "".join(f"{line}\n" for line in kept)
        _write_atomically(self.metrics, lambda path: path.write_text(text, encoding="utf-8"))

    def remove_partial_files(self) -> None:
        """Removes files that a killed process left incomplete."""
        for left in self.path.rglob(f"*{PARTIAL}"):
            left.unlink()

    def _saved_checkpoints(self) -> list[Path]:
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else iter(())
        return sorted((path for path in found if CHECKPOINT.fullmatch(path.name)), key=_step)


def _try_lock(file: BinaryIO) -> bool:
    """Tries to lock the file; True if this process now holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint, step-NNNNNNNNN.pt")
    return int(match[1])


def _mean(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Mean of every value over the lines that have it, to five digits."""
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float):
                found.setdefault(name, []).append(value)
    return {"step": lines[-1]["step"], **{name: float(f"{fmean(values):.5g}") for name, values in found.items()}}


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes to a temporary file, syncs and renames it: readers see the old or the new file. Raises OSError if the disk refuses it."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
    except (RuntimeError, SafetensorError) as error:
        # errors of torch and safetensors for a full disk; torch's text names a position in its archive and no reason
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        free = disk_usage(path.parent).free
        failed = OSError(
            f"{path} could not be written ({error}); the disk has {free} bytes free. Free some space and run again"
        )
        failed.errno = errno.ENOSPC if free < FULL_BYTES else errno.EIO  # callers retry failures that may pass
        raise failed from error
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)
