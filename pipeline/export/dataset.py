"""Rows of a published snapshot for an export, over the loader's `LatentDataset`."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.export.rows import Latent, Row, Source
from pipeline.format.stored import FIRST_FRAME
from pipeline.ledger.receipts import Ledger
from pipeline.loader.dataset import LatentDataset
from pipeline.operate.inspect import file_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.config import StorageConfig
    from pipeline.storage import Store

COLUMNS = (
    "width",
    "height",
    "fps",
    "duration_sec",
    "file_name",
    "metadata",
    "fingerprint",
    "captions",
    "caption_names",
)


class PublishedRows:
    """`Rows` of one snapshot. `source`: where they come from; `moments`: whether they have a log-variance."""

    def __init__(
        self,
        uri: str,
        where: str | None = None,
        *,
        fingerprint: str | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        """`uri` may end in `@3` for a snapshot. Raises as `LatentDataset.open`."""
        self._dataset = LatentDataset.open(uri, where=where, columns=COLUMNS, fingerprint=fingerprint, storage=storage)
        dataset = self._dataset
        metadata = file_metadata(dataset.store, dataset.files.value("key", 0))
        self.moments = dataset.spec.moments
        self.source = Source(
            uuid=Ledger(dataset.store).latent_set().uuid,
            uri=dataset.store.root,
            snapshot=dataset.snapshot or 0,
            spec=asdict(dataset.spec),
            network_class=metadata["encoder"].get("config", {}).get("_class_name"),
            applied=dataset.spec.normalised,
            where=where,
            stored=dataset.spec.stored,
        )

    @property
    def store(self) -> Store:
        """The output."""
        return self._dataset.store

    def __iter__(self) -> Iterator[Row]:
        """Every row once, file by file."""
        for number, position, row in self._dataset.placed():
            columns = row.columns
            channels, frames, height, width = row.shape
            yield Row(
                id=row.id,
                bucket=row.bucket,
                shape=(channels, frames, height, width),
                num_frames=row.num_frames,
                width=columns["width"],
                height=columns["height"],
                fps=columns["fps"],
                duration_s=columns["duration_sec"],
                caption=row.caption,
                file_name=columns["file_name"],
                source=f"{row.source_uri}#{row.source_key}",
                fingerprint=columns["fingerprint"],
                metadata=columns["metadata"],
                captions=tuple(columns["captions"]),
                caption_names=tuple(columns["caption_names"]),
                place=(number, position),
            )

    def carry(self, others: Sequence[str]) -> None:
        """Raises ConfigError if rows lack one of these paired videos."""
        self._dataset.carry(others)

    def latents(self, rows: Sequence[Row], others: Sequence[str] = ()) -> Iterator[Latent]:
        """Latents of `rows`; the loader's 32 MiB of tensors are in memory at a time. Raises as `carry`."""
        self._dataset.carry(others)
        for number, group in groupby(rows, key=lambda row: row.place[0]):
            items = list(group)
            places = np.array([item.place[1] for item in items])
            for item, row in zip(items, self._dataset.rows_of(number, places), strict=True):
                if row.latent is None or row.id != item.id:
                    raise InputError(f"{self.source.uri}: expected row {item.id}, found {row.id}; run the export again")
                yield Latent(row.latent, row.logvar, row.i2v_cond, row.columns.get(FIRST_FRAME), row.members)

    def close(self) -> None:
        """Closes open files."""
        self._dataset.close()
