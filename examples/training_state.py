"""State of a training run: process group, averaged weights, checkpoints, log.

A checkpoint holds network, optimizer, averaged weights and loader together, in one file that is replaced atomically: after a kill at any
moment, all four are of the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank of this process, number of processes, device of this one."""

    rank: int
    world: int
    device: torch.device

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over all ranks; all must call it."""
        value = value.detach().double()
        if self.world > 1:
            dist.all_reduce(value)
        return float(value) / self.world

    def gather(self, value: Any) -> list[Any]:
        """Values of all ranks in order; all must call it."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The process group of `torchrun` (NCCL on GPUs, Gloo on CPUs); a group of one without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), world, device)
    finally:
        dist.destroy_process_group()


class AveragedWeights:
    """Exponential moving average of a network's weights, float32. Samples are drawn with it."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().float().clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Takes the weights after `step` steps in. The decay grows to its value, so that the first weights are soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in network.state_dict().items():
            self.values[name].lerp_(value.float(), 1 - decay)


class RunFolder:
    """Files of a run: `checkpoint.pt`, `log.jsonl`, and what is made from them. Rank 0 writes, all ranks read."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder)
        self.checkpoint = self.path / "checkpoint.pt"
        self.log = self.path / "log.jsonl"

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces the checkpoint: a reader sees the old one or the new one, also after a crash of the machine."""
        replace_file(self.checkpoint, lambda path: torch.save(dict(state), path))

    def load(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The checkpoint, on the CPU; None if there is none yet.

        Raises:
            ConfigError: it was made with other `settings`.
        """
        if not self.checkpoint.exists():
            return None
        # On a GPU the state would be there twice, and AdamW's step counts would stay: every step would wait for each of them.
        state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        differing = [name for name in settings if state["settings"].get(name) != settings[name]]
        if differing:
            shown = ", ".join(f"{name} {state['settings'].get(name)}, now {settings[name]}" for name in differing)
            raise ConfigError(
                f"{self.checkpoint} was made with other settings ({shown}); use the same, or another run folder"
            )
        return state

    def cut_log(self, step: int) -> None:
        """Removes log lines after `step`: a killed run logs steps that its checkpoint does not hold, and they are run again."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        replace_file(self.log, lambda path: path.write_text(text, encoding="utf-8"))

    def read_log(self) -> list[dict[str, Any]]:
        """Whole lines of the log; a kill may leave half a line at its end."""
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a new file with `write(path)`, syncs it, and gives it the name `path`."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)  # the new name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
