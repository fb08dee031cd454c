"""Rows of one data file with their tensors, in bounded memory: neighbours are read together, every hash is checked."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pipeline.format.stored import FIRST_FRAME, I2V_COND, LATENT, LOGVAR, STORED
from pipeline.loader.columns import read_columns
from pipeline.loader.decoding import decoder_of
from pipeline.loader.fetch import READ_BYTES, Wanted, spans_of
from pipeline.loader.file_index import FileIndex
from pipeline.loader.row import Row, bytes_of, empty_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from pipeline.loader.dataset import LatentDataset


def rows_of_file(
    dataset: LatentDataset, number: int, index: FileIndex, positions: np.ndarray, *, tensors: bool = True
) -> Iterator[Row]:
    """Rows at these positions of a file, in the order given; at most 32 MiB of tensors (or one row) are held.

    Raises:
        InputError: a tensor whose bytes are not the recorded ones, a file that does not match its index.
    """
    columns = (
        read_columns(dataset.store, dataset.files, number, index, dataset.columns, positions).to_pydict()
        if dataset.columns
        else {}
    )
    if "metadata" in columns:
        columns["metadata"] = [json.loads(text) for text in columns["metadata"]]
    size = dataset.files.value("bucket", number).partition("x")[2]
    done = 0
    for part in _parts(dataset, index, positions.tolist()) if tensors else [positions.tolist()]:
        read = _read(dataset, number, index, part) if tensors else [{}] * len(part)
        for position, found in zip(part, read, strict=True):
            place, done = done, done + 1
            frames = int(index.num_frames[position])
            yield Row(
                id=str(index.text("id", position)),
                bucket=f"{frames}x{size}",
                num_frames=frames,
                caption=index.text("caption", position),
                shape=index.shape(position),
                source_uri=str(index.text("source_uri", position)),
                source_key=str(index.text("source_key", position)),
                latent=found.get(LATENT),
                logvar=found.get(LOGVAR),
                columns={name: values[place] for name, values in columns.items()} | _image(found),
                i2v_cond=found.get(I2V_COND),
                members={name: tensor for name, tensor in found.items() if name not in STORED},
            )


def _image(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {FIRST_FRAME: found[FIRST_FRAME].numpy().tobytes()} if FIRST_FRAME in found else {}


def _kinds(dataset: LatentDataset) -> dict[str, int]:
    """Names of what is read of a row, and their numbers in the index."""
    return {
        name: which
        for which, name in enumerate(dataset.spec.stored)
        if name in (LATENT, LOGVAR) or name in dataset.others
    }


def _read(dataset: LatentDataset, number: int, index: FileIndex, positions: list[int]) -> list[dict[str, torch.Tensor]]:
    kinds, dtype, decoder = _kinds(dataset), dataset.spec.dtype, decoder_of(dataset.spec)
    tensors = [
        {
            name: empty_tensor((index.length(position, which),), "uint8")
            if name == FIRST_FRAME
            else empty_tensor(index.shape(position, which), dtype)
            for name, which in kinds.items()
        }
        for position in positions
    ]
    values = [bytes_of(found[name]) for found in tensors for name in kinds]
    places = enumerate((position, which) for position in positions for which in kinds.values())
    wanted = [Wanted.of(number, index, position, which, place) for place, (position, which) in places]
    stored = values if decoder is None else decoder.stored(wanted, values)
    if cut := dataset.fetcher.read(spans_of(wanted), stored):
        raise dataset.fetcher.cut(cut[0])
    for item in wanted:
        if (damage := dataset.fetcher.damage(item, stored[item.place])) is not None:
            raise damage
        if decoder is not None and (damage := decoder.decode(item, stored, values, dataset.fetcher)) is not None:
            raise damage
    return tensors


def _parts(dataset: LatentDataset, index: FileIndex, positions: list[int]) -> Iterator[list[int]]:
    """Rows in parts of at most `READ_BYTES` of tensors; a larger one by itself."""
    kinds, decoder = _kinds(dataset).values(), decoder_of(dataset.spec)
    length_of = FileIndex.length if decoder is None else decoder.length
    part: list[int] = []
    size = 0
    for position in positions:
        length = sum(length_of(index, position, which) for which in kinds)
        if part and size + length > READ_BYTES:
            yield part
            part, size = [], 0
        part.append(position)
        size += length
    if part:
        yield part
