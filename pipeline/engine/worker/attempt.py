"""One attempt at one shard, from fetch to receipt.

Takes a shard. Ends with a committed receipt (or another attempt's, if that was first) or with an exception. It has two threads:
`ShardReading` reads samples, `ClipWriting` writes clips and commits. The encode loop waits for neither. `ShardAccounts` counts.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.encoder.environment import environment
from pipeline.engine.worker.clip_writing import ClipWriting
from pipeline.engine.worker.progress_counter import ProgressCounter
from pipeline.engine.worker.sample_account import ShardAccounts
from pipeline.engine.worker.shard_reading import ShardReading
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.engine.worker.shard_scope import ShardScope
from pipeline.errors import LatheError, SourceChanged, SourceRefused, StorageUnavailable
from pipeline.ledger.receipts import Ledger
from pipeline.process import kill_points as drill
from pipeline.process.scratch import ScratchFolder
from pipeline.records import Counts, Receipt, Timings
from pipeline.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import ChannelStats, ClipPlan, LatentClip, OpenedVideo, Reject, Sample, Shard, WrittenFile
    from pipeline.storage import Store

JOIN_S = 5.0  # for a thread to stop


class ShardAttempt:
    """See the module. Methods are called by one thread, the encode loop's; `next_sample` and `backlogged` by the feed's.

    Args:
        shard: what to encode.
        context: how.
        store: the output.
        wake: called, from any thread, when `poll` may have a new result.
        progress: counts what moves: bytes fetched, written, read back and uploaded, and the commit.
        blamed: its videos that ended workers.

    Raises:
        StorageUnavailable: the scratch folder cannot be made.
        RuntimeError: the machine starts no further thread.
    """

    def __init__(
        self,
        shard: Shard,
        context: BuildContext,
        store: Store,
        wake: Callable[[], None],
        progress: ProgressCounter | None = None,
        blamed: tuple[BlamedVideo, ...] = (),
    ) -> None:
        job = context.job
        self.shard = shard
        self.shard_id = shard.id(context.fingerprint)
        self.name = f"{context.build}{secrets.token_hex(4)}"
        self._scope = ShardScope(shard, context.fingerprint, job.engine.shard_video_s)
        self.etags = self._scope.fetched_etags
        self._context = context
        self._wake = wake
        self._drill = job.drill
        self._progress = progress or ProgressCounter()
        self._started = time.monotonic()
        self._store = store
        self._ledger = Ledger(store, job.drill, context.layout)
        self.encode_s = 0.0
        self.decode_wait_s = 0.0
        self.fetch_wait_s = 0.0
        self.decode_cpu_s = 0.0
        self._accounts = ShardAccounts(self._scope.source_bytes)
        self._error: BaseException | None = None
        self._result: ShardResult | None = None
        self._finishing = False
        self._commit_begun = False  # a receipt that names our files may exist, even if the store answered with an error
        self._scratch = ScratchFolder()
        self.spool_dir = Path(self._scratch.path)
        self._writer = ShardWriter(
            store,
            self.spool_dir,
            job.write,
            shard_id=self.shard_id,
            attempt=self.name,
            fingerprint=context.fingerprint,
            metadata=context.file_metadata(),
            layout=context.layout,
            drill=job.drill,
            progress=self._progress.add,
            members=job.member_rule.names,
            unpaired=job.member_rule.unpaired,
        )
        self._writing = ClipWriting(
            self._writer, f"write-{self.name}", finished=self._commit, failed=self.fail, wake=wake
        )
        self._reading = ShardReading(
            self._scope,
            job,
            self._progress,
            f"read-{self.name}",
            dropped={
                (video.uri, video.key): f"it ended its worker {video.deaths} times; the last: {video.why}"
                for video in blamed
                if video.drop
            },
            begin=self._begin,
            failed=self.fail,
            wake=wake,
        )
        self._apart = {(video.uri, video.key) for video in blamed}
        self._ending: threading.Thread | None = None
        try:
            self._writing.start()
            self._reading.thread.start()
        except RuntimeError:
            self._writing.stop()
            self._close()
            raise

    # --- called by the feed -------------------------------------------------------------------------------------------

    def next_sample(self) -> Sample | None:
        """A sample to decode, or None if there is none right now: still being fetched, `backlogged`, or all given out."""
        sample = None if self.backlogged else self._reading.next_sample()
        if sample is not None:
            self._accounts.open(sample)  # here: `poll` must not commit while a decoder has it
        return sample

    @property
    def backlogged(self) -> bool:
        """Whether decoding should pause because writing or the store is slower than the network."""
        return self._writing.backlogged

    @property
    def waiting_for_fetch(self) -> bool:
        """Whether a decoder that asked now would get nothing because storage has not delivered yet."""
        return self._reading.waiting_for_fetch

    @property
    def bytes_done(self) -> int:
        """Source bytes of samples that need no more frames, from any thread; at most `shard.num_bytes`.

        A sample whose clips are done in part counts in proportion. In a compressed tar the videos may be larger than the tar.
        """
        return min(self.shard.num_bytes, self._accounts.bytes_done + self._reading.rejected_bytes)

    @property
    def bytes_in(self) -> int:
        """Bytes received from storage, from any thread."""
        return self._reading.reader.received_bytes

    @property
    def bytes_out(self) -> int:
        """Bytes of files sent to storage, from any thread."""
        return self._writer.sent_bytes

    # --- called by the encode loop ------------------------------------------------------------------------------------

    def opened(self, sample: Sample, opened: OpenedVideo) -> None:
        """A decoder has opened the video. Clips that an earlier receipt holds are not encoded again."""
        self._scope.opened(sample, opened)
        earlier = self._scope.earlier_clips(sample, opened)
        self._accounts.opened(sample, opened, earlier)

    def clip_id(self, sample: Sample, plan: ClipPlan) -> str:
        """Id of the latent of a clip."""
        return self._scope.clip_id(sample, plan)

    def apart(self, sample: Sample) -> bool:
        """Whether the sample is encoded in steps of its own: a worker ended in a step with it."""
        return (sample.uri, sample.key) in self._apart

    def has_clip(self, sample: Sample, clip: int) -> bool:
        """Whether this clip needs no more frames (its video was decoded again after a crash)."""
        return self._accounts.has_clip(sample, clip)

    def clip_done(self, *variants: LatentClip) -> None:
        """Hands a finished clip to the writing thread, all its variants together. Never waits, see `backlogged`."""
        for latent in variants:
            self._accounts.handed_over(latent.sample, latent.plan.index, latent.info.warnings)
        self._writing.put(*variants)

    def clip_failed(self, sample: Sample, clip: int, reject: Reject) -> None:
        """A planned clip that could not be decoded."""
        self._accounts.failed(sample, clip, reject)

    def sample_ended(self, sample: Sample) -> None:
        """All chunks of the sample have arrived (its last clips may still be in the network)."""
        self._reading.reader.release(sample)
        self._accounts.ended(sample)

    def sample_rejected(self, sample: Sample, reject: Reject) -> None:
        """The rest of the sample was rejected: every clip that is not with the writer yet fails with it."""
        self._reading.reader.release(sample)
        self._accounts.rejected(sample, reject)

    def sample_failed(self, sample: Sample, error: LatheError) -> None:
        """Excludes a plain file whose reading failed before any of its clips was with the writer; anything else fails the attempt."""
        storage = isinstance(error, StorageUnavailable | SourceRefused | SourceChanged)
        if storage and not self._accounts.begun(sample) and self._scope.set_aside(sample.uri, error):
            self._accounts.forget(sample)
            self._reading.reader.release(sample)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the attempt, from any thread: `poll` raises the first error."""
        self._error = self._error or error

    def poll(self) -> ShardResult | None:
        """The result once the receipt is committed, else None. Raises what ended the attempt."""
        if self._error is not None:
            raise self._error
        for outcome in self._writing.outcomes():
            if outcome.reject is None:
                self._accounts.written(outcome.sample, outcome.clip, outcome.num_frames)
            else:
                self._accounts.failed(outcome.sample, outcome.clip, outcome.reject)
        if self._reading.all_read and self._accounts.all_closed and not self._finishing:
            self._finishing = True
            self._writing.finish()  # no sample is open: write out and commit
        return self._result

    def abort(self) -> None:
        """Begins to stop the threads and to delete spooled and uploaded files. Does not wait, see `ended`."""
        if self._ending is not None:
            return
        self.fail(RuntimeError("aborted"))
        self._reading.stop()
        self._writing.stop()
        self._ending = threading.Thread(target=self._clean_up, name=f"end-{self.name}", daemon=True)
        self._ending.start()

    def ended(self, wait_s: float = 0.0) -> bool:
        """Whether `abort` has finished, after waiting up to `wait_s`."""
        if self._ending is None:
            return False
        self._ending.join(wait_s)
        return not self._ending.is_alive()

    def _clean_up(self) -> None:
        """A thread that does not stop (the store hangs) is left running: no receipt will name what it may still write."""
        try:
            self._reading.close()
            self._reading.thread.join(JOIN_S)
            written = self._writing.join(JOIN_S)
            self._close()
            if written and not self._commit_begun:
                self._writer.abort()
        except LatheError as error:
            # The store that failed the attempt often refuses to delete as well. The files become orphans, which no receipt names.
            if self._error is not None:
                self._error.add_note(f"files of the attempt were left behind: {error}")
        finally:
            self._wake()

    def _close(self) -> None:
        self._reading.close()
        self._scratch.close()

    # --- the reading thread -------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Whether the shard must be read: a second build, or the try before this one, may have committed since it was handed out."""
        if (receipt := self._ledger.find(self.shard_id)) is not None:
            self._end_with(receipt)
            return False
        self._scope.load_earlier(self._ledger, self._store)
        return True

    def _end_with(self, receipt: Receipt) -> None:
        self._reading.stop()
        self._writing.stop()
        self._writing.join(JOIN_S)
        self._close()
        timings = Timings(total_s=round(time.monotonic() - self._started, 4))
        self._result = self._result_of(receipt, timings)

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _commit(self, files: tuple[WrittenFile, ...], stats: ChannelStats | None) -> None:
        receipt = self._receipt(files, stats, *self._accounts.totals(self._reading.rejects()))
        drill.fire(self._drill, "before_commit")
        self._commit_begun = True
        winner = self._ledger.commit(receipt)
        self._progress.add()
        drill.fire(self._drill, "after_commit")
        notes: tuple[str, ...] = ()
        if winner.attempt != self.name:
            try:
                drill.fire(self._drill, "in_clean_up")
                self._writer.abort()
            except LatheError as error:  # the shard is done; no receipt names our files
                notes = (f"another attempt was first, and our files could not be deleted: {error}",)
        result = self._result_of(winner, receipt.timings)
        self._close()
        self._result = replace(
            result, refused=self._scope.refused, left=self._scope.left(), aside=self._scope.aside(), notes=notes
        )

    def _receipt(
        self,
        files: tuple[WrittenFile, ...],
        stats: ChannelStats | None,
        counts: Counts,
        rejects: tuple[Reject, ...],
    ) -> Receipt:
        timings = Timings(
            fetch_s=round(self.fetch_wait_s, 4),
            decode_wait_s=round(self.decode_wait_s, 4),
            encode_s=round(self.encode_s, 4),
            write_s=round(self._writing.write_s, 4),
            total_s=round(time.monotonic() - self._started, 4),
            decode_cpu_s=round(self.decode_cpu_s, 4),
        )
        # A receipt covers what was read. Files that were refused or replaced are left to the next run.
        shard = replace(self.shard, objects=self._scope.covered(), rows=b"")
        context, reader = self._context, self._reading.reader
        digests = {**self._scope.digests, **reader.digests}
        return Receipt(
            format_version=context.layout.version,
            shard_id=shard.id(context.fingerprint),
            shard=shard,
            fingerprint=context.fingerprint,
            fingerprint_parts=context.fingerprint_parts,
            attempt=self.name,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            files=files,
            counts=counts,
            rejects=rejects,
            stats=stats,
            timings=timings,
            notes={
                "environment": environment(context.device, compiled=context.compiled),
                "reader": reader.counters,
                "spec": context.spec,
            },
            limits=context.job.limits(),
            digests={source.uri: digests[source.uri] for source in shard.objects if source.uri in digests},
            empty=self._scope.empty(self._accounts.encoded),
            warnings=self._accounts.warnings_with(reader.counters if self.shard.retry is None else {}),
            recovered=self._scope.recovered(self._accounts.encoded),
            videos=tuple(dict(self._accounts.videos.get(source.uri, {})) for source in shard.objects),
        )

    def _result_of(self, receipt: Receipt, timings: Timings) -> ShardResult:
        reasons = dict(Counter(reject.reason for reject in receipt.rejects))
        ours = receipt.attempt.startswith(self._context.build)
        num_bytes, files = sum(item.num_bytes + item.index_bytes for item in receipt.files), len(receipt.files)
        return ShardResult(
            self.shard_id, ours, receipt.counts, receipt.added(), timings, num_bytes, reasons, files, receipt.warnings
        )
