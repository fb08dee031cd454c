"""Rows of a dataset as a map-style `torch.utils.data.Dataset`, for a plain `DataLoader` with worker processes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.loader.dataset import LatentDataset


class LatentRows(Dataset[dict[str, Any]]):
    """Item i is the i-th row in file order: `id`, `caption` ("" if there is none), `bucket`, `num_frames`, `latent` (`C t h w` as stored),
    `logvar` where moments are stored, and the columns of the dataset, also `i2v_cond` and paired videos (tensors) and
    `first_frame` (an image file). Rows taken down later keep their numbers: make it anew to hide them.
    """

    def __init__(self, dataset: LatentDataset) -> None:
        # A copy: takedowns that a loader applies to `dataset` would give other rows to these numbers.
        self._dataset = copy.copy(dataset)
        self._ends = np.cumsum(self._dataset.row_counts())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """One row. Raises IndexError behind the last."""
        return self.__getitems__([i])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows; those of one file are read together."""
        rows = np.array([range(len(self))[i] for i in numbers], np.int64)
        files = np.searchsorted(self._ends, rows, side="right")
        found: list[dict[str, Any]] = [{}] * len(rows)
        for number in np.unique(files).tolist():
            places = np.flatnonzero(files == number)
            first = self._ends[number - 1] if number else 0
            for place, row in zip(places.tolist(), self._dataset.rows_of(number, rows[places] - first), strict=True):
                item = {"id": row.id, "caption": row.caption or "", "bucket": row.bucket, "num_frames": row.num_frames}
                item |= {**row.columns, "latent": row.latent}
                more = {"logvar": row.logvar, "i2v_cond": row.i2v_cond, **row.members}
                found[place] = item | {name: tensor for name, tensor in more.items() if tensor is not None}
        return found
