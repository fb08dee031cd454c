"""Annotations of samples: takes what a `ShardReader` yields, `Shard.rows` and the clip options; yields samples with captions, metadata and
spans as annotated.

Rows of tables win over texts beside the video. A sample that several different rows describe is rejected: the first one could be wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.reader.spans import MOST_SPANS, listed_captions, spans_of, spans_of_rows
from pipeline.reader.texts import Caption, Metadata, caption_text, distinct, parse_metadata
from pipeline.records import Reject, Sample
from pipeline.records.annotation_rows import unpacked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.config import ClipConfig
    from pipeline.reader import ShardReader
    from pipeline.records import Shard

Rows = dict[tuple[str, str], list[bytes]]


def annotated(reader: ShardReader, shard: Shard, clips: ClipConfig) -> Iterator[Sample | Reject]:
    """The samples of a shard with their annotations, and rejects; those of rows without a sample at the end."""
    if not shard.rows and not clips.in_spans:
        yield from reader
        return
    alone = shard.kind == "files"  # a plain video is the only sample of its object: rows need no key
    rows: Rows = {}
    for row in unpacked(shard.rows):
        rows.setdefault((row.uri, "" if alone else row.key), []).append(row.text)
    rejected: set[tuple[str, str]] = set()  # a second video of a key is rejected before the sample of the first one
    for item in reader:
        if isinstance(item, Sample):
            made = _annotate(item, rows.pop((item.uri, "" if alone else item.key), []), clips)
            if isinstance(made, Reject):
                reader.release(item)
            yield made
        else:
            if item.uri is not None and item.key is not None and (item.uri, item.key) in rows:
                rejected.add((item.uri, item.key))
            yield item
    if not alone:
        yield from _without_sample(place for place in rows if place not in rejected)


def _without_sample(places: Iterable[tuple[str, str]]) -> Iterator[Reject]:
    for uri, key in places:
        text = "rows of a table name it, and the tar has no such sample"
        if not key:
            text = "rows of a table name this tar without a key; add a column 'key' with the keys of its samples"
        yield Reject(key, "read", "unmatched_row", text, policy=True, uri=uri)


def _annotate(sample: Sample, rows: list[bytes], clips: ClipConfig) -> Sample | Reject:
    parsed = [parse_metadata(text) for text in dict.fromkeys(rows)]
    of_spans = [row for row in parsed if clips.in_spans and _has_span(row)]
    whole = [row for row in parsed if not (clips.in_spans and _has_span(row))]
    if len(whole) > 1:
        message = (
            f"{len(whole)} different rows of a table are about this sample; expected one"
            f"{'' if clips.in_spans else ', or --clips spans with a start and an end in each'}. Keep one of them"
        )
        return Reject(sample.key, "read", "ambiguous_rows", message, policy=False, uri=sample.uri)
    if whole:
        sample = _merged(sample, whole[0])
    if not clips.in_spans:
        return sample
    metadata = dict(sample.metadata)
    value = metadata.pop(clips.spans_field, None)
    if of_spans:
        sample = replace(sample, warnings=tuple(dict.fromkeys([*sample.warnings, *_warnings(of_spans)])))
        spans, texts = spans_of_rows([row.values for row in of_spans], clips)
    else:
        captions = listed_captions(metadata.get("caption"))
        spans, texts = spans_of(value, captions, clips)
        if captions is not None and spans:
            sample = _without_list(
                sample, metadata, used=len(captions) == len(spans), found=f"{len(captions)}/{len(spans)}"
            )
    if len(spans) > MOST_SPANS:
        message = f"{len(spans)} annotated spans, the limit is {MOST_SPANS}; split the video"
        return Reject(sample.key, "read", "too_many_spans", message, policy=True, uri=sample.uri)
    return replace(sample, metadata=metadata, time_spans=spans, span_texts=texts)


def _without_list(sample: Sample, metadata: dict[str, Any], *, used: bool, found: str) -> Sample:
    """The sample without the caption that is a list of its spans' captions as text; without the list in `metadata` if spans have it."""
    listed = metadata.pop("caption") if used else metadata["caption"]
    kept = sample.named_captions
    if isinstance(listed, str):
        text = caption_text(listed)
        kept = tuple(named for named in kept if named[1] != text)
    warnings = sample.warnings if used else (*sample.warnings, f"span_captions:{found}")
    return replace(sample, caption=kept[0][1] if kept else None, captions=kept, warnings=warnings)


def _has_span(row: Metadata) -> bool:
    return row.values.get("start") is not None or row.values.get("end") is not None


def _warnings(rows: list[Metadata]) -> list[str]:
    return [text for row in rows for text in (*row.warnings, *(each for one in row.captions for each in one.warnings))]


def _merged(sample: Sample, row: Metadata) -> Sample:
    own = distinct(row.captions)
    captions = distinct(Caption(text, name=name) for name, text in (*own, *sample.named_captions))
    warnings = tuple(dict.fromkeys([*sample.warnings, *_warnings([row])]))
    metadata = {**sample.metadata, **row.values}
    caption = captions[0][1] if captions else None
    return replace(sample, caption=caption, captions=captions, metadata=metadata, warnings=warnings)
