"""Entry point of `lathe plan`: lists the corpus, opens each video in a decoder process as `lathe encode` does, sums up.

Takes an `EncodeJob`, whose output is not touched. Gives a `Forecast`, the same in every run. Writes nothing and loads no network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.corpus import PassedOver, job_annotations, resolve_inputs
from pipeline.encoder import known_spec
from pipeline.engine.decoders.losses import Restarted
from pipeline.engine.decoders.sample_stream import SampleStream
from pipeline.errors import AccessError, ConfigError, LatheError, NotFound, SourceChanged, SourceRefused
from pipeline.forecast.compile_forecast import compile_choice, forecast_compiling
from pipeline.forecast.totals import Forecast, ForecastTotals, LatentSize
from pipeline.format.stored import FIRST_FRAME, is_tensor, stored_names
from pipeline.format.tensors import STORAGE_TYPES
from pipeline.records import OpenedVideo, Reject
from pipeline.video.clips import resolve_rules
from pipeline.video.image_rules import with_images

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.config import EncodeJob
    from pipeline.records import Sample

UNREADABLE = (
    AccessError,
    NotFound,
    SourceChanged,
    SourceRefused,
)  # errors of a plain file without which the build continues


def forecast_job(job: EncodeJob) -> Forecast:
    """What encoding `job` would do, from headers.

    Raises:
        UsageError: the errors of `encode` for the same job.
        StorageUnavailable, SourceChanged, SourceRefused: a tar or the store cannot be read.
        WorkerLost: decoders were killed from outside too often.
        BuildError: decoder processes die on start-up.
    """
    spec = known_spec(job.model)
    if spec is None:
        raise ConfigError(
            f"model.name: {job.model.name!r} is a family of networks; a plan needs its whole configuration (model.config) or a "
            "registered network"
        )
    rules = resolve_rules(job.clips, spec.time_stride, spec.space_stride, spec.network, spec.lead_frames)
    rules = with_images(rules, job.images, job.clips, spec.network)
    latent = LatentSize(
        channels=spec.latent_channels,
        bytes_per_element=STORAGE_TYPES[job.write.dtype].num_bytes,
        time_stride=spec.time_stride,
        space_stride=spec.space_stride,
        tensors=sum(map(is_tensor, stored_names(moments=job.write.moments, store=job.write.store))),
        lead_frames=spec.lead_frames,
        first_frames=FIRST_FRAME in job.write.store,
    )
    totals = ForecastTotals(rules, latent)
    unreadable: list[str] = []

    def goes_on(error: Exception) -> bool:
        if not isinstance(error, UNREADABLE):
            return False
        unreadable.append(f"not planned: {error}")
        return True

    with job_annotations(job) as tables:
        shards = resolve_inputs(
            job.inputs, job.storage, passed_over := PassedOver(), job.images.policy, tables, job.member_rule
        )
        if job.strict:
            passed_over.refuse()
        choice = compile_choice(job, spec, rules, shards)
        with SampleStream(
            job, shards, rules, 0, "", headers_only=True, goes_on=goes_on, with_rows=tables.with_rows
        ) as stream:
            for outcome in _in_order(stream):
                if isinstance(outcome, tuple):
                    totals.opened(*outcome)
                elif isinstance(outcome, Reject):
                    totals.rejected(outcome)
    totals.warn(stream.counters)
    if job.write.compression != "none":
        totals.notice(f"latents are counted before compression by {job.write.compression}")
    for text in sorted(unreadable):
        totals.notice(text)
    found = totals.result()
    return replace(
        found, passed_over=passed_over.to_dict(), compile=forecast_compiling(choice, job, spec, found.buckets)
    )


def _in_order(stream: SampleStream) -> Iterator[tuple[Sample, OpenedVideo] | Reject | LatheError]:
    """Outcome of each sample in the order of the corpus, although decoders answer in any order."""
    opened: dict[int, tuple[Sample, OpenedVideo]] = {}
    ended: dict[int, tuple[Sample, OpenedVideo] | Reject | LatheError] = {}
    following = 0
    for event in stream:
        number, what = event.number, event.what
        if isinstance(what, OpenedVideo) and event.sample is not None:
            opened[number] = replace(event.sample, video=b""), what
        elif isinstance(what, Reject | LatheError):
            ended[number] = what
        elif not isinstance(what, Restarted):
            ended[number] = opened.pop(number)
        while following in ended:
            yield ended.pop(following)
            following += 1
