"""Counts of one shard attempt: every sample and every clip with its outcome.

Takes the reports of decoders, network and writer. Gives `Counts` and rejects in which `samples = encoded + rejected` and
`clips_planned = clips + clips_rejected` hold by construction. No threads, no I/O.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.records import Counts, Reject, warning_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pipeline.records import OpenedVideo, Sample, VideoCounts


@dataclass(slots=True)
class SampleAccount:
    """One sample's clips, by number: handed to the writer, written, failed."""

    sample: Sample
    num_bytes: int = 0  # in its source
    buckets: tuple[str, ...] = ()  # of its planned clips
    video: VideoCounts = field(default_factory=dict)  # its length and size, once it was opened
    warnings: set[str] = field(default_factory=set)  # of its clips
    earlier: set[int] = field(default_factory=set)  # an earlier receipt holds them: neither written nor counted again
    handed_over: set[int] = field(default_factory=set)  # the writer has not answered yet
    written: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    rejects: list[Reject] = field(default_factory=list)
    ended: bool = False

    @property
    def planned(self) -> int:
        """Number of its clips."""
        return len(self.buckets)

    @property
    def closed(self) -> bool:
        """Whether no further report about the sample follows."""
        return self.ended and len(self.earlier) + len(self.written) + len(self.failed) >= self.planned

    @property
    def bytes_done(self) -> int:
        """`num_bytes` once the sample has ended, before that in proportion to clips that need no more frames."""
        if self.ended:
            return self.num_bytes
        settled = len(self.earlier) + len(self.handed_over) + len(self.written) + len(self.failed)
        return self.num_bytes * min(settled, self.planned) // max(1, self.planned)


class ShardAccounts:
    """Open samples of an attempt, and the sums over closed ones. Used by one thread; `open` and `bytes_done` may come from others.

    `source_bytes` gives the size of a sample in its source.
    """

    def __init__(self, source_bytes: Callable[[Sample], int] = lambda sample: 0) -> None:
        self._source_bytes = source_bytes
        self._closed_bytes = 0  # source bytes of closed samples
        self._open: dict[int, SampleAccount] = {}
        self._counts = Counts()
        self._rejects: list[Reject] = []
        self._warnings: Counter[str] = Counter()  # encoded samples by kind of warning, and those without a caption
        self.encoded: list[Sample] = []  # closed samples with clips, without their videos
        self.videos: dict[str, Counter[str]] = {}  # by URI: entries of `Receipt.videos`

    @property
    def all_closed(self) -> bool:
        """Whether no sample is open."""
        return not self._open

    @property
    def bytes_done(self) -> int:
        """Source bytes of samples that need no more frames, see `SampleAccount.bytes_done`."""
        return self._closed_bytes + sum(account.bytes_done for account in list(self._open.values()))

    def open(self, sample: Sample) -> SampleAccount:
        """Account of the sample; created if there is none."""
        if sample.index not in self._open:
            self._open[sample.index] = SampleAccount(sample, self._source_bytes(sample))
        return self._open[sample.index]

    def opened(self, sample: Sample, opened: OpenedVideo, earlier: set[int]) -> None:
        """Records that the decoder opened the video: its clips, and rejects of others. `earlier` clips are in another receipt."""
        account = self.open(sample)
        account.buckets, account.video = tuple(plan.bucket.name for plan in opened.clips), opened.info.counted()
        account.earlier = set(earlier)
        # Opened again after a crash: clips that failed before stay failed, with their reasons.
        account.rejects = [*opened.rejects, *(reject for reject in account.rejects if reject.clip is not None)]

    def has_clip(self, sample: Sample, clip: int) -> bool:
        """Whether the clip needs no more frames: it is with the writer, written, failed, or in an earlier receipt."""
        account = self.open(sample)
        return any(clip in clips for clips in (account.handed_over, account.written, account.failed, account.earlier))

    def handed_over(self, sample: Sample, clip: int, warnings: Iterable[str] = ()) -> None:
        """Records that the writer got the clip. `warnings`: those of its row, without those of the sample."""
        account = self.open(sample)
        account.handed_over.add(clip)
        account.warnings.update(warnings)

    def written(self, sample: Sample, clip: int, num_frames: int) -> None:
        """Records that the writer wrote the clip."""
        account = self.open(sample)
        account.handed_over.discard(clip)
        account.written.add(clip)
        self._counts += Counts(frames=num_frames)
        self._settle(account)

    def failed(self, sample: Sample, clip: int, reject: Reject) -> None:
        """Records that a planned clip will not be written."""
        account = self.open(sample)
        account.handed_over.discard(clip)
        if clip not in account.failed:
            account.failed.add(clip)
            account.rejects.append(replace(reject, buckets={account.buckets[clip]: 1}))
        self._settle(account)

    def ended(self, sample: Sample) -> None:
        """Records that all chunks of the sample have arrived; its last clips may still be in the network or with the writer."""
        account = self.open(sample)
        account.ended = True
        self._settle(account)

    def rejected(self, sample: Sample, reject: Reject) -> None:
        """Records that the rest of the sample was rejected: every clip that the writer does not have fails with it."""
        account = self.open(sample)
        lost = set(range(account.planned)) - account.written - account.handed_over - account.earlier - account.failed
        buckets = dict(Counter(account.buckets[clip] for clip in sorted(lost)))
        account.rejects.append(replace(reject, clips_lost=len(lost), buckets=buckets))
        account.video = account.video or reject.video
        account.failed |= lost
        account.ended = True
        self._settle(account)

    def begun(self, sample: Sample) -> bool:
        """Whether a clip of the sample is with the writer or written."""
        account = self.open(sample)
        return bool(account.handed_over or account.written)

    def forget(self, sample: Sample) -> None:
        """Drops an open sample without any clip with the writer, as if it had never been read."""
        del self._open[sample.index]

    def totals(self, without_sample: Iterable[Reject]) -> tuple[Counts, tuple[Reject, ...]]:
        """Counts and rejects of the shard, once `all_closed`; `without_sample` are the reader's.

        Raises:
            ValueError: the counts do not add up.
        """
        counts, rejects = self._counts, list(self._rejects)
        for reject in without_sample:
            rejects.append(reject)
            is_sample, damaged = int(reject.key is not None), int(not reject.policy)
            regions = damaged * (1 - is_sample)
            counts += Counts(samples=is_sample, rejected=is_sample, damaged=damaged, damaged_regions=regions)
        counts.check()
        rejects.sort(
            key=lambda reject: (reject.key or "", reject.clip if reject.clip is not None else -1, reject.reason)
        )
        return counts, tuple(rejects)

    def warnings_with(self, counters: dict[str, int]) -> dict[str, int]:
        """`Receipt.warnings`; `counters` are the reader's, for the whole shard (none in a retry, which reads it again)."""
        return dict(sorted((self._warnings + Counter(counters)).items()))

    def _settle(self, account: SampleAccount) -> None:
        if account.ended:  # clips may wait long to be written; the encoded videos must not wait with them
            account.sample = replace(account.sample, video=b"", members=())
        if not account.closed:
            return
        sample = account.sample
        kept = bool(account.written or account.earlier)
        if not kept and not account.rejects:
            message = "the clip rules cut nothing from it"
            account.rejects.append(Reject(sample.key, "clips", "no_clips", message, policy=True, uri=sample.uri))
        for number, reject in enumerate(account.rejects):
            self._rejects.append(replace(reject, video={} if kept or number else account.video))
        self._counts += Counts(
            samples=1,
            encoded=int(kept),
            rejected=int(not kept),
            clips_planned=account.planned - len(account.earlier),
            clips=len(account.written),
            clips_rejected=len(account.failed),
            damaged=int(any(not reject.policy for reject in account.rejects)),
        )
        if account.written:
            self.encoded.append(sample.texts_of(None))
            if not account.earlier:
                self._warnings.update(warning_kinds(sample, account.warnings))
                self.videos.setdefault(sample.uri, Counter()).update(account.video)
        del self._open[sample.index]
        self._closed_bytes += account.num_bytes  # after it is not open any more: `bytes_done` must not count it twice
