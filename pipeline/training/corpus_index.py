"""Index of the videos of a corpus: object, offset and size of each, so that any can be read without the others.

Made in one pass of the pipeline's reader and stored as Parquet with the run. It is made again if an object's size or etag changed,
or objects were added or removed.
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
    """Location of a video: its sample's key, and its bytes within an object."""

    key: str
    source: SourceObject
    start: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether the object contains only the video."""
        return self.start == 0 and self.size == self.source.size

    @property
    def name(self) -> str:
        """Name for error messages: the object's URI, with the key if it is inside a shard."""
        return self.source.uri if self.whole else f"{self.source.uri}/{self.key}"


class CorpusIndex:
    """Locations in the order of the corpus. Pickles; takes the memory of its columns."""

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
    """Loads the index at `path` if it fits the shards as they are now; otherwise makes a new one and stores it there.

    Samples without a video, and rejects of the reader, are added to `unusable`.

    Raises:
        InputError: a compressed tar, or shards without any video.
        StorageUnavailable, SourceChanged: errors of the reader.
    """
    listing = _listing(shards, limits)
    if path.exists():
        # Dictionaries of several row groups may differ; one read unifies them.
        table = pq.read_table(path)
        if table.schema.metadata.get(LISTING) == listing:
            return CorpusIndex(table.cast(SCHEMA).replace_schema_metadata(None))
        notice("the corpus has changed since this run started; the run continues with the new one")
    notice(f"reading {len(shards)} shards once, to index their videos")
    unusable.clear()
    places = list(_places(shards, storage, limits, unusable))
    if not places:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in unusable.counts().items())
        raise InputError(f"data.inputs: no video in {len(shards)} shards{f': {reasons}' if reasons else ''}")
    rows = [(p.key, p.source.uri, p.source.etag, p.source.size, p.start, p.size) for p in places]
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    partial = path.with_name(f"{path.name}.partial")
    pq.write_table(table.replace_schema_metadata({LISTING: listing}), partial, compression="zstd")
    partial.replace(path)
    return CorpusIndex(table)


def _listing(shards: Sequence[Shard], limits: DecodeConfig) -> bytes:
    """Hash of everything an index depends on."""
    objects = [[source.uri, source.size, source.etag] for shard in shards for source in shard.objects]
    return stable_hash([objects, limits.max_video_bytes]).encode()


def _places(
    shards: Sequence[Shard], storage: StorageConfig, limits: DecodeConfig, unusable: Unusable
) -> Iterator[Place]:
    for shard in shards:
        objects = {source.uri: source for source in shard.objects}
        for item in read_samples(shard, storage, max_video_bytes=limits.max_video_bytes):
            if isinstance(item, Reject):
                unusable.add(item.uri or shard.name, item.key or "", item.reason, item.message, found="index")
            else:
                yield _place(item, objects[item.uri])


def _place(sample: Sample, source: SourceObject) -> Place:
    if sample.span is None:
        raise InputError(
            f"{source.uri} holds {sample.key!r} compressed or sparse; training reads videos in random order, which needs a plain tar: "
            "unpack it (gunzip, bunzip2, unxz), its videos are compressed already"
        )
    return Place(sample.key, source, *sample.span)
