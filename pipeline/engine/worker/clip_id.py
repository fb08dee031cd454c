"""Ids of latents: functions of the source object, the sample, the clip and the fingerprint alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.records import stable_hash

if TYPE_CHECKING:
    from pipeline.records import ClipPlan, Sample


def clip_id(sample: Sample, etag: str, plan: ClipPlan, fingerprint: str) -> str:
    """The same in every run: a readable piece of the key, the clip number, and a digest of what it is.

    `etag` is of the object the sample came from: a replaced input gives new latents new ids.
    """
    digest = stable_hash(
        [sample.uri, etag, sample.key, plan.index, plan.start, str(plan.bucket), fingerprint], digest_size=8
    )
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[-64:].strip("_") or "clip"
    return f"{readable}-{plan.index:04d}-{digest}"
