"""One attempt at one shard, from fetch to receipt.

Enters: a shard. Leaves: a committed receipt (or another attempt's, if that was first), or the exception that ended it.
Threads besides the caller's: one reads samples ahead, within bounds; one writes clips and commits (`ClipWriting`), and
uploads run beside it. The encode loop waits for none of them. Counts are kept by `ShardAccounts`.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.encoder.environment import environment
from pipeline.engine.worker.clip_writing import ClipWriting
from pipeline.engine.worker.progress_counter import ProgressCounter
from pipeline.engine.worker.sample_account import ShardAccounts
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.engine.worker.shard_scope import ShardScope
from pipeline.errors import AccessError, LatheError, NotFound, SourceChanged, SourceRefused, StorageUnavailable
from pipeline.ledger.receipts import Ledger
from pipeline.process import kill_points as drill
from pipeline.process.scratch import ScratchFolder
from pipeline.reader import ShardReader
from pipeline.records import Counts, Receipt, Reject, Sample, Timings
from pipeline.storage import locate, open_store
from pipeline.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.records import ChannelStats, ClipPlan, LatentClip, OpenedVideo, Shard, SourceObject, WrittenFile
    from pipeline.storage import Store

SAMPLES_AHEAD = 4  # read and not yet handed to a decoder
JOIN_S = 5.0  # for a thread to stop


class ShardAttempt:
    """See the module. Methods are called by one thread, the encode loop's; `next_sample` and `backlogged` by the feed's.

    Args:
        shard: what to encode.
        context: how.
        store: the output.
        wake: called, from any thread, when `poll` may have something new to say.
        progress: counts what moves: bytes fetched, written, read back and uploaded, and the commit.

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
    ) -> None:
        job = context.job
        self.shard = shard
        self.shard_id = shard.id(context.fingerprint)
        self.name = f"{context.build}{secrets.token_hex(4)}"
        self._scope = ShardScope(shard, context.fingerprint, job.engine.shard_video_s)
        self.etags = self._scope.fetched_etags
        self._blueprint = context
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
        self._accounts = ShardAccounts()
        self._error: BaseException | None = None
        self._result: ShardResult | None = None
        self._stop = threading.Event()
        self._all_read = False
        self._finishing = False
        self._commit_begun = False  # a receipt naming our files may exist, whatever the store answered
        self._counters: dict[str, int] = {}
        self._samples: queue.Queue[Sample | None] = queue.Queue(SAMPLES_AHEAD)
        self._shard_rejects: queue.SimpleQueue[Reject] = queue.SimpleQueue()
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
        )
        self._reader = ShardReader(
            self._scope.fetched(),
            job.storage,
            max_video_bytes=job.decode.max_video_bytes,
            counters=self._counters,
            unread=self._go_on_without,
        )
        self._received = lambda: self._reader.received_bytes
        self._progress.watch(self._received)
        self._writing = ClipWriting(
            self._writer, f"write-{self.name}", finished=self._commit, failed=self.fail, wake=wake
        )
        self._reading = threading.Thread(target=self._read, name=f"read-{self.name}", daemon=True)
        self._ending: threading.Thread | None = None
        try:
            self._writing.start()
            self._reading.start()
        except RuntimeError:
            self._writing.stop()
            self._close()
            raise

    # --- called by the feed -------------------------------------------------------------------------------------------

    def next_sample(self) -> Sample | None:
        """A sample to decode, or None if there is none right now: still being fetched, `backlogged`, or all given out."""
        if self._stop.is_set() or self.backlogged:
            return None
        try:
            sample = None if self._scope.enough else self._samples.get_nowait()
        except queue.Empty:
            return None
        if sample is None or not self._scope.begin(sample.uri):
            self._all_read = True
            self._wake()
            return None
        self._accounts.open(sample)  # open from here on: `poll` must not commit while a decoder has it
        return sample

    @property
    def backlogged(self) -> bool:
        """Whether decoding should pause: writing or the store is slower than the network."""
        return self._writing.backlogged

    @property
    def waiting_for_fetch(self) -> bool:
        """Whether a decoder that asked now would get nothing because storage has not delivered yet."""
        return not self._all_read and self._samples.empty()

    # --- called by the encode loop ------------------------------------------------------------------------------------

    def opened(self, sample: Sample, opened: OpenedVideo) -> None:
        """The decoder has said which clips will come. Those that an earlier receipt holds are not encoded again."""
        self._scope.opened(sample, opened)
        earlier = self._scope.earlier_clips(sample, opened)
        self._accounts.opened(sample, len(opened.clips), opened.rejects, earlier)

    def clip_id(self, sample: Sample, plan: ClipPlan) -> str:
        """Id of the latent of a clip."""
        return self._scope.clip_id(sample, plan)

    def has_clip(self, sample: Sample, clip: int) -> bool:
        """Whether this clip needs no more frames (its video was decoded again after a crash)."""
        return self._accounts.has_clip(sample, clip)

    def clip_done(self, latent: LatentClip) -> None:
        """Hands a finished clip to the writing thread. Never waits: `backlogged` says when there is too much."""
        self._accounts.handed_over(latent.sample, latent.plan.index, latent.info.warnings)
        self._writing.put(latent)

    def clip_failed(self, sample: Sample, clip: int, reject: Reject) -> None:
        """A promised clip that will not come."""
        self._accounts.failed(sample, clip, reject)

    def sample_ended(self, sample: Sample) -> None:
        """All chunks of the sample have arrived (its last clips may still be in the network)."""
        self._reader.release(sample)
        self._accounts.ended(sample)

    def sample_rejected(self, sample: Sample, reject: Reject) -> None:
        """What is left of the sample will not come: every unsettled clip fails with it."""
        self._reader.release(sample)
        self._accounts.rejected(sample, reject)

    def sample_failed(self, sample: Sample, error: LatheError) -> None:
        """Goes on without a plain file whose reading failed before any clip of it was with the writer; fails for anything else."""
        storage = isinstance(error, StorageUnavailable | SourceRefused | SourceChanged)
        if storage and not self._accounts.begun(sample) and self._scope.set_aside(sample.uri, error):
            self._accounts.forget(sample)
            self._reader.release(sample)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the attempt, from any thread: `poll` raises `error`, or what came before it."""
        self._error = self._error or error

    def poll(self) -> ShardResult | None:
        """The result once committed; raises what ended the attempt."""
        if self._error is not None:
            raise self._error
        for outcome in self._writing.outcomes():
            if outcome.reject is None:
                self._accounts.written(outcome.sample, outcome.clip, outcome.num_frames)
            else:
                self._accounts.failed(outcome.sample, outcome.clip, outcome.reject)
        if self._all_read and self._accounts.all_closed and not self._finishing:
            self._finishing = True
            self._writing.finish()  # nothing is open any more: write out and commit
        return self._result

    def abort(self) -> None:
        """Begins to stop the threads and to delete what was spooled or uploaded; does not wait, see `ended`."""
        if self._ending is not None:
            return
        self.fail(RuntimeError("aborted"))
        self._stop.set()
        self._writing.stop()
        self._ending = threading.Thread(target=self._clean_up, name=f"end-{self.name}", daemon=True)
        self._ending.start()

    def ended(self, wait_s: float = 0.0) -> bool:
        """Whether `abort` is through, waiting up to `wait_s` for it."""
        if self._ending is None:
            return False
        self._ending.join(wait_s)
        return not self._ending.is_alive()

    def _clean_up(self) -> None:
        """A thread that does not answer (a store that hangs) is left behind: what it may still write no receipt names."""
        try:
            self._reader.close()  # also ends a read that waits for the store
            self._reading.join(JOIN_S)
            written = self._writing.join(JOIN_S)
            self._close()
            if written and not self._commit_begun:
                self._writer.abort()
        except LatheError as error:
            # The store that failed the attempt often refuses the clean-up too. What stays is an orphan: no receipt names it.
            if self._error is not None:
                self._error.add_note(f"files of the attempt were left behind: {error}")
        finally:
            self._wake()

    def _close(self) -> None:
        self._reader.close()
        self._scratch.close()
        self._progress.unwatch(self._received)

    # --- the reading thread -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            # A second build, or the try before this one, may have committed since the shard was handed out.
            if (receipt := self._ledger.find(self.shard_id)) is not None:
                self._end_with(receipt)
            else:
                self._scope.load_earlier(self._ledger, self._store)
                self._read_source()
        except BaseException as error:  # noqa: BLE001 - raised in the encode loop by poll()
            self.fail(error)
        finally:
            self._wake()

    def _end_with(self, receipt: Receipt) -> None:
        self._stop.set()
        self._writing.stop()
        self._writing.join(JOIN_S)
        self._close()
        timings = Timings(total_s=round(time.monotonic() - self._started, 4))
        self._result = self._result_of(receipt, timings)

    def _read_source(self) -> None:
        try:
            for item in self._reader:
                self._progress.add()
                if not self._scope.wants(item):
                    if isinstance(item, Sample):
                        self._reader.release(item)
                elif isinstance(item, Sample):
                    if not self._offer(item):
                        return
                else:
                    self._scope.begin(item.uri, partial(self._shard_rejects.put, item))
            if (error := self._scope.first_error()) is not None:
                raise error
        except NotFound as error:  # it was there when it was listed: no reason to stop the other shards
            raise SourceChanged(f"{error.message}, but was listed", uri=error.uri) from error
        except AccessError as error:
            more = len(self._scope.refused) - 1
            others = f" (so are {more} more of its shard)" if more > 0 else ""
            raise SourceRefused(f"{error.message}{others}", uri=error.uri) from error
        drill.fire(self._drill, "after_fetch")
        self._offer(None)

    def _go_on_without(self, source: SourceObject, error: Exception) -> bool:
        """Whether the reader goes on after a plain file that it could not read."""
        if not isinstance(error, StorageUnavailable):
            self._scope.cannot_read(source, error)
            return True
        try:
            open_store(locate(source.uri)[0], self._blueprint.job.storage).probe()
        except LatheError:  # the store is away, and each further file would take all its patience
            return False
        return self._scope.set_aside(source.uri, error)

    def _offer(self, sample: Sample | None) -> bool:
        while not self._stop.is_set() and not self._scope.enough:
            try:
                self._samples.put(sample, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _commit(self, files: tuple[WrittenFile, ...], stats: ChannelStats | None) -> None:
        rejects = []
        while not self._shard_rejects.empty():
            rejects.append(self._shard_rejects.get())
        receipt = self._receipt(files, stats, *self._accounts.totals(rejects))
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
            except LatheError as error:  # the shard is done whatever becomes of our files; no receipt names them
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
        # A receipt covers what was read. Files that were refused or replaced stay work to do for the next run.
        shard = replace(self.shard, objects=self._scope.covered())
        digests = {**self._scope.digests, **self._reader.digests}
        context = self._blueprint
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
            notes={"environment": environment(context.device), "reader": dict(self._counters), "spec": context.spec},
            limits=context.job.limits(),
            digests={source.uri: digests[source.uri] for source in shard.objects if source.uri in digests},
            empty=self._scope.empty(self._accounts.encoded),
            warnings=self._accounts.warnings_with(self._counters if self.shard.retry is None else {}),
            recovered=self._scope.recovered(self._accounts.encoded),
        )

    def _result_of(self, receipt: Receipt, timings: Timings) -> ShardResult:
        reasons = dict(Counter(reject.reason for reject in receipt.rejects))
        ours = receipt.attempt.startswith(self._blueprint.build)
        num_bytes, files = sum(item.num_bytes + item.index_bytes for item in receipt.files), len(receipt.files)
        return ShardResult(
            self.shard_id, ours, receipt.counts, receipt.added(), timings, num_bytes, reasons, files, receipt.warnings
        )
