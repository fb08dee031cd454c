"""Units of work: what the rows of a snapshot need and a set does not have yet, in groups that one attempt encodes and stores.

Texts are collected in the order of the files, each distinct one once. Memory: a hash of each distinct text (some 80 bytes), one unit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError
from pipeline.sidecars.names import encodable, key_of
from pipeline.sidecars.versions import Coverage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.loader.captions import CaptionRule
    from pipeline.loader.dataset import LatentDataset

FIRST, ALL = "first", "all"


class TextUnit(NamedTuple):
    """Distinct texts."""

    texts: tuple[str, ...]

    @property
    def keys(self) -> list[bytes]:
        """Keys of the rows that are made of them."""
        return [key_of(text) for text in self.texts]


class ImagePlace(NamedTuple):
    """An image file inside a data file of the output: bytes `[offset, offset + length)` of the object `key`."""

    id: str
    key: str
    offset: int
    length: int
    hash: str  # BLAKE2b-128, hex


class ImageUnit(NamedTuple):
    """Images of rows."""

    images: tuple[ImagePlace, ...]

    @property
    def keys(self) -> list[bytes]:
        """Keys of the rows that are made of them."""
        return [key_of(image.id) for image in self.images]


@dataclass(slots=True)
class Survey:
    """What the walk over the rows has met so far. `missing`: what the set lacked; `present`: what it had."""

    rows: int = 0
    without_caption: int = 0
    present: int = 0
    missing: int = 0
    seen: set[bytes] = field(default_factory=set, repr=False)


def caption_sources(captions: tuple[str, ...]) -> tuple[str, ...]:
    """`captions` of a job as columns: `first`, `all`, or names as they are."""
    if captions == (FIRST,):
        return ("caption",)
    if captions == (ALL,):
        return ("caption", "captions")
    return captions


def coverage_of(dataset: LatentDataset, captions: tuple[str, ...]) -> Coverage | None:
    """What a set covers that has the tensors of all rows that `dataset` shows. None where rows were taken down since the snapshot:
    `lathe takedown --undo` shows them again, without tensors.
    """
    if len(dataset) < sum(dataset.buckets.values()):
        return None
    return Coverage(dataset.snapshot or 0, captions, dataset.spec.fingerprint)


def text_units(
    dataset: LatentDataset, rule: CaptionRule, done: set[bytes], size: int, survey: Survey
) -> Iterator[TextUnit]:
    """Texts that are not `done`, `size` in a unit, the empty one among them. `dataset`: with the rule's columns. `survey` is added to."""
    waiting: list[str] = []
    for text in _texts(dataset, rule, survey):
        key = key_of(text)
        if key in survey.seen:
            continue
        survey.seen.add(key)
        if key in done:
            survey.present += 1
            continue
        survey.missing += 1
        waiting.append(encodable(text))
        if len(waiting) == size:
            yield TextUnit(tuple(waiting))
            waiting = []
    if waiting:
        yield TextUnit(tuple(waiting))


def _texts(dataset: LatentDataset, rule: CaptionRule, survey: Survey) -> Iterator[str]:
    yield ""  # for rows without a caption, and for captions that are dropped in training
    for _, _, row in dataset.placed():
        found = rule.candidates(row.caption, row.columns)
        survey.rows += 1
        survey.without_caption += not found
        yield from found


def image_units(
    dataset: LatentDataset, column: str, done: set[bytes], size: int, survey: Survey
) -> Iterator[ImageUnit]:
    """Images of a column of rows that are not `done`, `size` in a unit. Adds to `survey`.

    Raises:
        InputError: the output does not have the column.
    """
    waiting: list[ImagePlace] = []
    for number, rows in groupby(dataset.placed(), key=lambda each: each[0]):
        places = _places(dataset, number, column)
        for _, _, row in rows:
            survey.rows += 1
            if key_of(row.id) in done:
                survey.present += 1
                continue
            survey.missing += 1
            waiting.append(places[row.id])
            if len(waiting) == size:
                yield ImageUnit(tuple(waiting))
                waiting = []
    if waiting:
        yield ImageUnit(tuple(waiting))


def _places(dataset: LatentDataset, number: int, column: str) -> dict[str, ImagePlace]:
    """Where the images of a file lie, by id of the row."""
    names = [f"{column}_{part}" for part in ("offset", "length", "hash")]
    table = dataset.indexes.columns(number, ["id", *names])
    key = dataset.files.value("key", number)
    if missing := [name for name in names if name not in table.column_names]:
        raise InputError(
            f"{dataset.store.uri(key)} has no column {column} (its index lacks {missing[0]}); "
            f"encode with --store {column}, or import embeddings with `lathe sidecar import`"
        )
    columns = [table[name].to_pylist() for name in ("id", *names)]
    return {name: ImagePlace(name, key, *place) for name, *place in zip(*columns, strict=True)}
