"""`lathe plan`: the corpus listed, each sample's headers read, the plan drawn. A composition of corpus, reader and plan.

Enters: an `EncodeJob` (its output is not touched). Leaves: a `CorpusPlan`. Nothing is written and no latent is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.clips import resolve_rules
from pipeline.corpus import resolve_inputs
from pipeline.encoder import known_spec
from pipeline.errors import ConfigError
from pipeline.plan import CorpusPlan, LatentSize, plan_corpus
from pipeline.reader import ShardReader
from pipeline.records import Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import EncodeJob
    from pipeline.records import Reject, Shard

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def plan_job(job: EncodeJob) -> CorpusPlan:
    """What encoding `job` would do, from headers.

    Raises:
        UsageError: as `encode` would, for the same job.
    """
    spec = known_spec(job.model)
    if spec is None:
        raise ConfigError(
            f"model.name: {job.model.name!r} is a family; a plan needs its configuration (model.config) or a registered network"
        )
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    latent = LatentSize(
        channels=spec.latent_channels,
        bytes_per_element=ELEMENT_BYTES[job.write.dtype],
        time_stride=spec.time_stride,
        space_stride=spec.space_stride,
        tensors=2 if job.write.moments else 1,
        lead_frames=spec.lead_frames,
    )
    counters: dict[str, int] = {}
    items = _samples(resolve_inputs(job.inputs, job.storage), job, counters)
    return plan_corpus(items, rules, job.decode, latent, counters)


def _samples(shards: list[Shard], job: EncodeJob, counters: dict[str, int]) -> Iterator[Sample | Reject]:
    for shard in shards:
        with ShardReader(shard, job.storage, max_video_bytes=job.decode.max_video_bytes, counters=counters) as reader:
            for item in reader:
                yield item
                if isinstance(item, Sample):
                    reader.release(item)
