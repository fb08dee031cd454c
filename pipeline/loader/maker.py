"""Batches of one dataset: rows of the order in, a `Batch` out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from operator import is_not
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.format.stored import FIRST_FRAME, I2V_COND, LATENT, STORED, tensor_shape
from pipeline.loader.batch import Batch
from pipeline.loader.crops import Crop, Window
from pipeline.loader.draws import key_of, whole
from pipeline.loader.epoch import RowsOfBucket
from pipeline.loader.rules import Pack
from pipeline.records import is_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor

    import torch

    from pipeline.ledger.takedowns import Takedowns
    from pipeline.loader.buckets import Bucket
    from pipeline.loader.captions import CaptionRule
    from pipeline.loader.dataset import LatentDataset
    from pipeline.loader.order import GlobalBatch
    from pipeline.loader.packing import Sequence as Packed
    from pipeline.loader.reading import BatchReader, ReadPlan, Tensors
    from pipeline.loader.rules import Grid
    from pipeline.loader.sidecars import SidecarJoin
    from pipeline.loader.slots import Slot, SlotFinder
    from pipeline.loader.stats import LoaderStats
    from pipeline.loader.values import Values

Share = RowsOfBucket | list["Packed"]


@dataclass(slots=True)
class Prepared:
    """A rank's share of a batch before its tensors are read. `takedowns`: of the dataset when the slots were found. `facts`: fields of the
    `Batch` that do not depend on tensors; None where columns of the files must be read for them, and after a batch was made of them.
    """

    batch: GlobalBatch
    share: Share
    takedowns: Takedowns
    slots: list[Slot]
    plan: ReadPlan
    facts: dict[str, Any] | None


class BatchMaker:
    """Makes batches of one dataset. `patch`: latent frames, rows and columns of a token. Safe for several threads."""

    def __init__(
        self,
        dataset: LatentDataset,
        buckets: dict[str, Bucket],
        finder: SlotFinder,
        reader: BatchReader,
        values: Values,
        captions: CaptionRule,
        pool: Executor,
        stats: LoaderStats,
        *,
        seed: int,
        crop: Crop | None,
        patch: Grid,
        pad_multiple: int = 1,
        join: SidecarJoin | None = None,
        verify_join: bool = False,
    ) -> None:
        self._dataset, self._buckets, self._finder = dataset, buckets, finder
        self._reader, self._values, self._captions = reader, values, captions
        self._pool, self._stats, self._seed, self._crop, self._pad = pool, stats, seed, crop, pad_multiple
        self._draws = values.draws or captions.draws or isinstance(crop, Window)
        self._tokens = {  # patches of a latent in time, height and width
            name: tuple(-(-size // step) for size, step in zip(bucket.grid, patch, strict=True))
            for name, bucket in buckets.items()
        }
        self._fps: dict[int, float | None] = {}
        self._join, self._verify_join = join, verify_join
        self._columns = (*dataset.columns, *(name for name in captions.columns if name not in dataset.columns))

    def prepare(self, batch: GlobalBatch, share: Share, *, held: bool = False) -> Prepared | None:
        """Finds the rows of a share. With `held` None if an index of a file would have to be read.

        Raises:
            InputError: an index that is missing or not the recorded one; a bucket without a row left.
        """
        takedowns = self._dataset.takedowns
        slots = self._slots(share, batch.epoch, held=held)
        if slots is None:
            return None
        rates = [self._rate(slot.file) for slot in slots]
        known = not self._columns and None not in rates
        facts = self._facts(slots, [{"fps": rate} for rate in rates], batch, share) if known else None
        apart = self._crop is not None
        plan = self._reader.plan(slots, apart=apart, alike=not apart and isinstance(share, RowsOfBucket))
        return Prepared(batch, share, takedowns, slots, plan, facts)

    def is_current(self, prepared: Prepared) -> bool:
        """Whether no takedown was applied since."""
        return prepared.takedowns is self._dataset.takedowns

    def make(self, prepared: Prepared) -> Batch:
        """Reads what was prepared. Raises as `BatchReader.read`."""
        batch, share, slots = prepared.batch, prepared.share, prepared.slots.copy()
        facts, prepared.facts = prepared.facts, None  # the batch belongs to the caller, who may change it
        packed = not isinstance(share, RowsOfBucket)
        # Beside the tensors: over a network each takes a round trip.
        columns = None if facts else self._read_columns(slots)
        blocks = self._reader.read(slots, prepared.plan, batch.epoch)
        if taken_down := sum(slot.draws > 0 for slot in prepared.slots):
            self._stats.add(taken_down=taken_down)
        # A damaged row was replaced by another one.
        replaced = any(map(is_not, slots, prepared.slots))
        if facts is None or replaced:
            list(columns or ())
            facts = self._facts(slots, [self._scalars(slot) for slot in slots], batch, share)
        keys = self._keys([slot.id for slot in slots], batch.epoch) if self._draws else [0] * len(slots)
        others = dict(zip(reversed(self._dataset.others), reversed(blocks), strict=False))
        with self._values.copying():
            latents = self._latents(slots, blocks[: len(blocks) - len(others)], keys, packed=packed)
            more = {
                name: self._latents(slots, [block], keys, packed=packed, name=name)
                for name, block in others.items()
                if name != FIRST_FRAME
            }
        made = Batch(
            latents=latents,
            **facts,
            i2v_cond=more.get(I2V_COND),
            members={name: more[name] for name in self._dataset.others if name not in STORED},
        )
        if FIRST_FRAME in others:
            made.columns[FIRST_FRAME] = [image.numpy().tobytes() for image in others[FIRST_FRAME].apart]
        if self._join is not None:
            with self._values.copying():
                made.sidecars = self._join.tensors(
                    made.ids, made.captions, self._pool, self._values.move, verify=self._verify_join
                )
        if not isinstance(share, RowsOfBucket):
            self._describe_packing(made, share, [self._tokens[slot.bucket] for slot in slots])
        return made

    def _slots(self, share: Share, epoch: int, *, held: bool) -> list[Slot] | None:
        """Rows of a share in order, after takedowns."""
        if isinstance(share, RowsOfBucket):
            return self._finder.find(share.bucket, share.rows, epoch, held=held)
        names = [name for sequence in share for name in sequence.buckets]
        rows = np.concatenate([sequence.rows for sequence in share])
        slots: list[Slot | None] = [None] * len(names)
        for name in dict.fromkeys(names):
            places = [i for i, other in enumerate(names) if other == name]
            found = self._finder.find(name, rows[places], epoch, held=held)
            if found is None:
                return None
            for place, slot in zip(places, found, strict=True):
                slots[place] = slot
        return [slot for slot in slots if slot is not None]

    def _keys(self, ids: list[str], epoch: int) -> list[int]:
        """Keys of the draws of rows in an epoch."""
        return [key_of(self._seed, self._dataset.identity, epoch, name) for name in ids]

    def _facts(
        self, slots: list[Slot], scalars: list[dict[str, Any]], batch: GlobalBatch, share: Share
    ) -> dict[str, Any]:
        """Fields of the `Batch` that do not depend on tensors. `scalars`: `fps` and columns of each slot."""
        ids = [slot.id for slot in slots]
        keys = self._keys(ids, batch.epoch) if self._captions.draws else [0] * len(ids)
        frames = [self._buckets[slot.bucket].shape.frames for slot in slots]
        fps = [row["fps"] for row in scalars]
        # an image lasts no time
        seconds = [count / rate if rate else 0.0 for count, rate in zip(frames, fps, strict=True)]
        columns = self._dataset.columns
        return {
            "ids": ids,
            "captions": self._captions.chosen(
                [slot.index.text("caption", slot.position) for slot in slots], scalars, keys
            ),
            "bucket": slots[0].bucket if isinstance(share, RowsOfBucket) else [slot.bucket for slot in slots],
            "num_frames": _tensor(frames, np.int64),
            "fps": _tensor(fps, np.float64),
            "duration_s": _tensor(seconds, np.float64),
            "num_tokens": _tensor([prod(self._tokens[slot.bucket]) for slot in slots], np.int64),
            "is_image": max(frames) == 1,
            "metadata": [row.get("metadata") or {} for row in scalars] if "metadata" in columns else [],
            "columns": {name: [row[name] for row in scalars] for name in columns if name != "metadata"},
            "dataset": batch.dataset,
            "step": batch.step,
            "epoch": batch.epoch,
        }

    def _latents(
        self, slots: list[Slot], blocks: list[Tensors], keys: list[int], *, packed: bool, name: str = LATENT
    ) -> torch.Tensor | list[torch.Tensor]:
        values, plain = self._values, name not in STORED and is_mask(name)
        if packed:
            found = []
            for i, slot in enumerate(slots):
                mean, *logvar = [values.move(self._cut(slot, keys[i], part.part(i), name)) for part in blocks]
                found.append(values.finish(mean, logvar[0] if logvar else None, keys[i : i + 1], 0, plain=plain))
            return found
        mean, *logvar = [values.move(self._stacked(slots, keys, part, name)) for part in blocks]
        return values.finish(mean, logvar[0] if logvar else None, keys, 1, plain=plain)

    def _stacked(self, slots: list[Slot], keys: list[int], part: Tensors, name: str) -> torch.Tensor:
        """One tensor of all slots: the block that they were read into, or copies of what a crop leaves of each."""
        if part.whole is not None:
            return part.whole
        return self._reader.stacked([self._cut(*each, name) for each in zip(slots, keys, part.apart, strict=True)])

    def _cut(self, slot: Slot, key: int, part: torch.Tensor, name: str) -> torch.Tensor:
        """`C T h w` of a slot after the crop."""
        latent = self._values.typed(part, tensor_shape(name, slot.index.shape(slot.position)))
        frames = self._buckets[slot.bucket].grid[0]
        more = latent.shape[1] - frames
        if self._crop is None or more == 0:
            return latent
        start = whole(key_of(key, "window"), more + 1) if isinstance(self._crop, Window) else 0
        return latent[:, start : start + frames]

    def _read_columns(self, slots: list[Slot]) -> Iterator[object]:
        """Starts to read columns that are not in memory, of all files (or rows of tars) at once; to be exhausted before `_scalars`."""
        scalars = self._dataset.scalars
        one_of_each = {scalars.unit(slot.file, slot.position): slot for slot in slots}.values()
        missing = [slot for slot in one_of_each if not scalars.holds(slot.file, self._read_of(slot), slot.position)]
        return self._pool.map(self._scalars, missing)

    def _scalars(self, slot: Slot) -> dict[str, Any]:
        """`fps` and the columns that are asked for. `fps` is in the manifest where all rows of a file have the same."""
        read = self._dataset.scalars.row(slot.file, slot.index, self._read_of(slot), slot.position)
        return {"fps": self._rate(slot.file), **read}

    def _rate(self, file: int) -> float | None:
        """Frames a second of all rows of a file, None where they vary."""
        if file not in self._fps:
            low, high = json.loads(self._dataset.files.value("ranges", file)).get("fps", (0.0, 1.0))
            self._fps[file] = float(low) if low == high else None
        return self._fps[file]

    def _read_of(self, slot: Slot) -> tuple[str, ...]:
        """Columns to read of a file."""
        if self._rate(slot.file) is None and "fps" not in self._columns:
            return (*self._columns, "fps")
        return self._columns

    def _describe_packing(self, batch: Batch, share: Sequence[Packed], tokens: list[tuple[int, ...]]) -> None:
        at = 0
        for sequence in share:
            count = len(sequence.rows)
            grids = _tensor(tokens[at : at + count], np.int64)
            bounds = [0, *np.cumsum([prod(one) for one in tokens[at : at + count]]).tolist()]
            padded = -(-bounds[-1] // self._pad) * self._pad
            batch.sequences.append(count)
            batch.grid_sizes.append(grids)
            batch.cu_seqlens.append(_tensor(bounds + ([padded] if padded > bounds[-1] else []), np.int32))
            at += count


def patch_of(rule: Any) -> Grid:
    """Latent frames, rows and columns of a token."""
    return getattr(rule, "patch", None) or (1, 2, 2)


def padding_of(rule: Any) -> int:
    """Tokens of which each packed sequence is a multiple."""
    return rule.pad_multiple if isinstance(rule, Pack) else 1


def _tensor(values: list[Any], kind: Any) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(values, kind))
