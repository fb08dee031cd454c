"""What a run tells: a line per logged step as JSON and for TensorBoard, and now and then a picture sheet.

Enters: the values of a step. Leaves: lines, curves, PNG files in the run's folder. A run that goes on after a kill leaves no step twice.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from model.sheets import write_sheet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from model.training.run_folder import RunFolder


class Journal:
    """Appends to `metrics.jsonl` and to TensorBoard's files. The process that writes a run's folder has one."""

    def __init__(self, folder: RunFolder, step: int) -> None:
        """`step`: steps done already; later lines are forgotten.

        Raises:
            ModuleNotFoundError: TensorBoard is not installed; says what to install.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"training writes logs for TensorBoard and {error.name} is not installed; pip install 'lathe[training]'",
                name=error.name,
            ) from error
        folder.keep_lines(step)
        self._folder = folder
        self._lines = folder.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=step + 1)

    def values(self, step: int, stage: str, values: Mapping[str, float]) -> None:
        """Of step `step` (from 1)."""
        line = {"step": step, "stage": stage} | {name: float(value) for name, value in values.items()}
        self._lines.write(f"{json.dumps(line)}\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def sheet(self, step: int, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], titles: Sequence[str]) -> None:
        """Originals and reconstructions, uint8 `3 T H W`."""
        write_sheet(self._folder.sheets / f"step-{step:09d}.png", pairs, titles)

    def flush(self) -> None:
        """Everything told so far can be read."""
        self._board.flush()

    def close(self) -> None:
        """Nothing more will be told."""
        self._lines.close()
        self._board.close()
