"""Inputs of a job as they are now, as shards: listed, with everything in their identity that decides their rows.

Takes a job and its `Annotations`. Adds to the digests of tables those of spans in the JSON beside plain videos, which a build with spans
reads once per run: they decide which clips are cut, and are not in the video's own etag (ADR 23).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.corpus import resolve_inputs
from pipeline.reader.sidecars import read_sidecars
from pipeline.reader.texts import parse_metadata
from pipeline.records import MISSING, stable_hash

if TYPE_CHECKING:
    from pipeline.config import EncodeJob
    from pipeline.corpus import Annotations, PassedOver
    from pipeline.records import Shard, SourceObject

WORKERS = 16  # threads that read JSON; each waits for a store


def list_shards(job: EncodeJob, annotations: Annotations, passed_over: PassedOver | None = None) -> list[Shard]:
    """Shards of all inputs.

    Raises:
        InputError, ConfigError, AccessError: as `resolve_inputs`.
        StorageUnavailable: the store failed.
    """
    shards = resolve_inputs(job.inputs, job.storage, passed_over, job.images.policy, annotations, job.member_rule)
    if not job.clips.in_spans:
        return shards
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="spans") as pool:
        plain = [source for shard in shards if shard.kind == "files" for source in shard.objects]
        found = iter(list(pool.map(lambda source: _with_spans(source, job), plain)))
    return [
        replace(shard, objects=tuple(next(found) for _ in shard.objects)) if shard.kind == "files" else shard
        for shard in shards
    ]


def _with_spans(source: SourceObject, job: EncodeJob) -> SourceObject:
    # A text that the store refuses to read is a warning of the build.
    texts = () if source.etag == MISSING else read_sidecars(source, job.storage, lambda: None)
    metadata = next((parse_metadata(data).values for extension, data in texts if extension == "json"), {})
    spans = metadata.get(job.clips.spans_field)
    return source if spans is None else replace(source, annotations=stable_hash([source.annotations, spans]))
