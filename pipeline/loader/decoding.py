"""Tensors that are stored as int8 or compressed: their bytes are read into memory of their own, then decoded into that of the batch."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from pipeline.format.codec import decoded, is_plain, value_type
from pipeline.format.stored import FIRST_FRAME
from pipeline.records import LATENT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.errors import InputError
    from pipeline.loader.fetch import Fetcher, Wanted
    from pipeline.loader.file_index import FileIndex
    from pipeline.loader.spec import DatasetSpec


class Decoder:
    """Decoder of the tensors of one dataset, one that has `spec.storage`. Safe for several threads; zstd lets other threads run."""

    def __init__(self, spec: DatasetSpec) -> None:
        self._storage = spec.storage
        self._images = [which for which, name in enumerate(spec.stored) if name == FIRST_FRAME]
        self._kind = np.dtype(LATENT_DTYPES[value_type(spec.storage)])

    def length(self, index: FileIndex, row: int, tensor: int) -> int:
        """Bytes of the values of a tensor, or of an image file."""
        if tensor in self._images:
            return index.length(row, tensor)
        return prod(index.shape(row, tensor)) * self._kind.itemsize

    def stored(self, wanted: Iterable[Wanted], values: Sequence[memoryview]) -> list[memoryview]:
        """Memory for the stored bytes of `wanted`, by place; of images that of their values."""
        found = list(values)
        for item in wanted:
            if item.tensor not in self._images:
                found[item.place] = np.empty(item.length, np.uint8).data
        return found

    def decode(
        self, item: Wanted, stored: Sequence[memoryview], values: Sequence[memoryview], fetcher: Fetcher
    ) -> InputError | None:
        """Fills the memory of the values from the bytes that were read; the error if they are not such a tensor."""
        if item.tensor in self._images:
            return None
        shape = item.index.shape(item.row, item.tensor)
        try:
            found = decoded(stored[item.place], self._storage, shape)
        except ValueError as error:
            return fetcher.undecodable(item, error)
        np.frombuffer(values[item.place], self._kind).reshape(shape)[...] = found
        return None


def decoder_of(spec: DatasetSpec) -> Decoder | None:
    """The decoder of a dataset; None if its stored bytes are the values."""
    return None if is_plain(spec.storage) else Decoder(spec)
