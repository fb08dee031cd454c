"""Where every video of a corpus lies, so that any of them can be had without reading the others.

Enters: shards. Leaves: a `CorpusIndex`, made in one pass of the pipeline's own reader and kept as Parquet with the run. It is as good as
the objects it was made from: when one of them has another size or etag, or there are more or fewer of them, it is made again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.reader import read_samples
from pipeline.records import Reject, SourceObject, stable_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from pipeline.config import DecodeConfig, StorageConfig
    from pipeline.records import Sample, Shard
    from pipeline.training.unusable import Unusable

LISTING = b"lathe.listing"
TEXT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    {"key": pa.string(), "uri": TEXT, "etag": TEXT, "object_bytes": pa.int64(), "start": pa.int64(), "size": pa.int64()}
)


class Place(NamedTuple):
    """A video: its sample's key, and which bytes of which object it is."""

    key: str
    source: SourceObject
    start: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether the object is the video and nothing else."""
        return self.start == 0 and self.size == self.source.size

    @property
    def name(self) -> str:
        """What an error message calls it: its URI, with the key inside of a shard."""
        return self.source.uri if self.whole else f"{self.source.uri}/{self.key}"


class CorpusIndex:
    """Places in the order of the corpus. Pickles, in the memory its columns take."""

    def __init__(self, table: pa.Table) -> None:
        """`table` has the columns of `SCHEMA`."""
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, number: int) -> Place:
        key, uri, etag, object_bytes, start, size = (column[number].as_py() for column in self._table.columns)
        return Place(key, SourceObject(uri, object_bytes, etag), start, size)


def corpus_index(
    shards: Sequence[Shard],
    path: Path,
    storage: StorageConfig,
    limits: DecodeConfig,
    unusable: Unusable,
    notice: Callable[[str], None],
) -> CorpusIndex:
    """The index at `path` if it is one of these shards as they are now, else a new one, put there.

    Samples without a video, and what the reader rejects, go to `unusable`.

    Raises:
        InputError: a compressed tar; shards without a single video.
        StorageUnavailable, SourceChanged: as the reader.
    """
    listing = _listing(shards, limits)
    if path.exists():
        # Dictionaries of several row groups may differ; one read unifies them.
        table = pq.read_table(path)
        if table.schema.metadata.get(LISTING) == listing:
            return CorpusIndex(table.cast(SCHEMA).replace_schema_metadata(None))
        notice("the corpus is not the one this run began with: it goes on with the new one")
    notice(f"reading {len(shards)} shards once, to know where their videos lie")
    unusable.forget()
    places = list(_places(shards, storage, limits, unusable))
    if not places:
        told = ", ".join(f"{reason} ({count})" for reason, count in unusable.tally().items())
        raise InputError(f"data.inputs: not a single video in {len(shards)} shards{f': {told}' if told else ''}")
    rows = [(p.key, p.source.uri, p.source.etag, p.source.size, p.start, p.size) for p in places]
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    partial = path.with_name(f"{path.name}.partial")
    pq.write_table(table.replace_schema_metadata({LISTING: listing}), partial, compression="zstd")
    partial.replace(path)
    return CorpusIndex(table)


def _listing(shards: Sequence[Shard], limits: DecodeConfig) -> bytes:
    """What decides about an index, as a hash."""
    objects = [[source.uri, source.size, source.etag] for shard in shards for source in shard.objects]
    return stable_hash([objects, limits.max_video_bytes]).encode()


def _places(
    shards: Sequence[Shard], storage: StorageConfig, limits: DecodeConfig, unusable: Unusable
) -> Iterator[Place]:
    for shard in shards:
        objects = {source.uri: source for source in shard.objects}
        for item in read_samples(shard, storage, max_video_bytes=limits.max_video_bytes):
            if isinstance(item, Reject):
                unusable.add(item.uri or shard.name, item.key or "", item.reason, item.message)
            else:
                yield _place(item, objects[item.uri])


def _place(sample: Sample, source: SourceObject) -> Place:
    if sample.span is None:
        raise InputError(
            f"{source.uri} holds {sample.key!r} compressed or with holes; training reads videos at random, which needs a plain tar: "
            "unpack it (gunzip, bunzip2, unxz), the videos inside are compressed already"
        )
    return Place(sample.key, source, *sample.span)
