"""Log of a training run: metrics as JSON lines and for TensorBoard, and picture sheets as PNG, in the run's folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from model.sheets import write_sheet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from model.training.run_folder import RunFolder


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard's files; only the process that writes the run's folder has one."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        """`step`: steps done already; lines of later steps are removed, because they will be repeated.

        Raises:
            ModuleNotFoundError: TensorBoard is not installed; the message says what to install.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"training writes TensorBoard logs, but {error.name} is not installed; pip install 'lathe[training]'",
                name=error.name,
            ) from error
        folder.drop_lines_after(step)
        self._folder = folder
        self._lines = folder.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def values(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Logs values of step `step` (from 1)."""
        line = {"step": step, "stage": stage} | {name: float(value) for name, value in values.items()}
        self._lines.write(f"{json.dumps(line)}\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sheet(self, step: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], titles: Sequence[str]) -> None:
        """Writes a sheet of originals and reconstructions, uint8 `3 T H W`."""
        write_sheet(self._folder.sheets / f"step-{step:09d}.png", pairs, titles)

    def flush(self) -> None:
        """Writes buffered values to disk."""
        self._board.flush()

    def close(self) -> None:
        """Closes both logs."""
        self._lines.close()
        self._board.close()
