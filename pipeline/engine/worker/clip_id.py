"""Ids of latents, computed from the source object, the sample, the clip and the fingerprint only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.format.columns import readable_key
from pipeline.records import BASE, stable_hash

if TYPE_CHECKING:
    from pipeline.records import ClipPlan, Sample


def clip_id(sample: Sample, version: str, plan: ClipPlan, fingerprint: str) -> str:
    """Id of a clip's latent, the same in every run: a readable part of the key, the clip number, a digest of all the above, and the
    name of the variant unless it is `base`. Variants of a clip differ in that name only, see `split_id`.

    `version` is that of the sample's source object: the latents of a replaced or newly annotated input get new ids.
    """
    digest = stable_hash(
        [sample.uri, version, sample.key, plan.clip_index, plan.start, str(plan.bucket), fingerprint], digest_size=8
    )
    variant = "" if plan.variant == BASE else f"-{plan.variant}"
    return f"{readable_key(sample.key)}-{plan.clip_index:04d}-{digest}{variant}"
