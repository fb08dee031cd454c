"""Open video of an attempt: its clips on their way through the network, each with the clips of its paired videos.

Takes encoded chunks; gives the `LatentClip`s of a clip once all its variants, and of each all members, are encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.engine.worker.latent_spool import LatentSpool, to_storage
from pipeline.records import LatentClip, is_mask

if TYPE_CHECKING:
    from pipeline.encoder import Encoded
    from pipeline.engine.worker.attempt import ShardAttempt
    from pipeline.engine.worker.batching import ClipRun
    from pipeline.records import ClipPlan, FrameChunk, Sample, VideoInfo

Track = tuple[int, str]
"""Number of a clip, and name of the paired video it is cut from: empty for the main one."""


@dataclass(eq=False, slots=True)
class OpenVideo:
    """A video of which clips are expected. `encoded`: by clip, until all its tracks are."""

    sample: Sample
    info: VideoInfo
    plans: dict[int, ClipPlan]
    runs: dict[Track, ClipRun] = field(default_factory=dict)
    encoded: dict[int, list[OpenClip]] = field(default_factory=dict)
    ended: bool = False

    @property
    def tracks(self) -> int:
        """Videos that go through the network: the main one and its members, but for masks."""
        return 1 + sum(not is_mask(member.name) for member in self.sample.members)


@dataclass(eq=False, slots=True)
class OpenClip:
    """Token of a `ClipRun`: the attempt and the spools that its latents go to."""

    attempt: ShardAttempt
    video: OpenVideo
    plan: ClipPlan
    member: str  # the paired video it is cut from; empty: the main one
    mean: LatentSpool
    logvar: LatentSpool | None
    cond: LatentSpool | None
    masks: dict[str, LatentSpool] = field(default_factory=dict)
    first_frame: bytes | None = field(default=None, repr=False)
    frames: int = 0
    damaged: int = 0  # of these frames
    end_s: float = 0.0

    def store(self, chunk: FrameChunk, encoded: Encoded, dtype: str) -> None:
        """Adds the latents of a chunk in the storage type. Raises StorageUnavailable for the local disk."""
        pieces = [(self.mean, encoded.mean_Cthw), (self.logvar, encoded.logvar_Cthw), (self.cond, encoded.cond_Cthw)]
        for name, mask_1thw in chunk.masks.items():
            pieces.append((self.masks.setdefault(name, LatentSpool(self.attempt.spool_dir)), mask_1thw))
        for spool, values in pieces:
            if spool is not None and values is not None:
                spool.append(to_storage(values, dtype))
        self.first_frame = self.first_frame or chunk.first_frame
        self.frames += len(chunk.pts_s)
        self.damaged += chunk.damaged
        self.end_s = chunk.pts_s[-1]

    def finished(self, dtype: str) -> list[LatentClip]:
        """Called after the last chunk: all variants of the clip, in the order of their plans, or nothing while a track of one misses."""
        done = self.video.encoded.setdefault(self.plan.clip_index, [])
        done.append(self)
        if len(done) < self.video.tracks * self.plan.variants:
            return []
        del self.video.encoded[self.plan.clip_index]
        main = sorted((clip for clip in done if not clip.member), key=lambda clip: clip.plan.index)
        return [
            clip._with([other for other in done if other.plan is clip.plan and other.member], dtype) for clip in main
        ]

    def _with(self, others: list[OpenClip], dtype: str) -> LatentClip:
        info = self.video.info
        frames = self.damaged + sum(other.damaged for other in others)
        damaged = (f"damaged_frames:{frames}",) if frames else ()
        members = {other.member: other.mean for other in others} | self.masks
        return LatentClip(
            id=self.attempt.clip_id(self.video.sample, self.plan),
            # A row may wait long for its row group; the encoded video must not wait with it.
            sample=self.video.sample.texts_of(self.plan.span),
            info=replace(info, warnings=(*info.warnings, *self.plan.warnings, *damaged)),
            plan=self.plan,
            num_frames=self.frames,
            end_s=self.end_s,
            latent_CTHW=self.mean.finish(),
            logvar_CTHW=None if self.logvar is None else self.logvar.finish(),
            dtype=dtype,
            cond_CTHW=None if self.cond is None else self.cond.finish(),
            first_frame=self.first_frame,
            members={name: spool.finish() for name, spool in members.items()},
        )
