"""One attempt at one shard, from fetch to receipt: its reader, its books, its writer.

Enters: a shard. Leaves: a committed receipt (or somebody else's, if they were first), or the exception that ended the attempt.
Two threads besides the caller's: one reads samples ahead, within bounds; one writes clips, then checks, uploads and commits, so that
neither the network nor the disk is waited for by the encoder. The books make `samples in = encoded + rejected` true by construction.
"""

from __future__ import annotations

import queue
import re
import secrets
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import drill
from pipeline.engine.blueprint import environment
from pipeline.errors import LatheError, NotFound, SourceChanged
from pipeline.reader import ShardReader
from pipeline.receipts import Ledger
from pipeline.records import FORMAT_VERSION, Counts, Receipt, Reject, Sample, Timings, stable_hash
from pipeline.scratch import ScratchFolder
from pipeline.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from pipeline.engine.blueprint import Blueprint
    from pipeline.records import ClipPlan, LatentClip, Shard
    from pipeline.storage import Store

SAMPLES_AHEAD = 4  # read and not yet handed to a decoder
CLIPS_BEHIND = 32  # encoded and not yet written
JOIN_S = 5.0  # for a thread to stop


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What the driver hears of a finished shard: small, whatever the shard's size."""

    shard_id: str
    won: bool  # False: another attempt committed first, ours was deleted
    counts: Counts
    timings: Timings
    num_bytes: int
    rejects: dict[str, int]  # by reason
    files: int
    step_sizes: dict[str, int] = field(default_factory=dict)  # what its encoder chose: chunks a step, by shape of chunk
    notes: tuple[str, ...] = ()  # lines for the user
    refused: tuple[str, ...] = ()  # inputs of a shard of files that could not be read; the others are committed


@dataclass(slots=True)
class _Book:
    """One sample's account."""

    sample: Sample
    planned: int = 0
    written: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    rejects: list[Reject] = field(default_factory=list)
    ended: bool = False

    @property
    def closed(self) -> bool:
        return self.ended and len(self.written) + len(self.failed) >= self.planned


class ShardAttempt:
    """See the module. Methods are called by one thread, the encode loop's; `next_sample` by the feed's."""

    def __init__(self, shard: Shard, blueprint: Blueprint, store: Store, wake: Callable[[], None]) -> None:
        """Starts both threads. `wake` is called, from any thread, when `poll` may have something new to say."""
        job = blueprint.job
        self.shard = shard
        self.shard_id = shard.id(blueprint.fingerprint)
        self.name = secrets.token_hex(4)
        self.etags = {source.uri: source.etag for source in shard.objects}
        self._blueprint = blueprint
        self._wake = wake
        self._drill = job.drill
        self._started = time.monotonic()
        self._ledger = Ledger(store)
        self._scratch = ScratchFolder()
        self.spool_dir = Path(self._scratch.path)
        self._writer = ShardWriter(
            store,
            str(self.spool_dir),
            job.write,
            shard_id=self.shard_id,
            attempt=self.name,
            fingerprint=blueprint.fingerprint,
            metadata=blueprint.file_metadata(),
            drill=job.drill,
        )
        self._books: dict[int, _Book] = {}
        self._counts = Counts()
        self._rejects: list[Reject] = []
        self._frames = 0
        self.encode_s = 0.0
        self.decode_wait_s = 0.0
        self.fetch_wait_s = 0.0
        self.decode_cpu_s = 0.0
        self._write_s = 0.0
        self._error: BaseException | None = None
        self._result: ShardResult | None = None
        self._stop = threading.Event()
        self.read_at = 0.0  # when storage last gave a sample or a reject
        self._all_read = False
        self._commit_begun = False  # a receipt naming our files may exist, whatever the store answered
        self._counters: dict[str, int] = {}
        self._samples: queue.Queue[Sample | None] = queue.Queue(SAMPLES_AHEAD)
        self._shard_rejects: queue.SimpleQueue[Reject] = queue.SimpleQueue()
        self._clips: queue.Queue[LatentClip | None] = queue.Queue(CLIPS_BEHIND)
        self._reader = ShardReader(
            shard, job.storage, max_video_bytes=job.decode.max_video_bytes, counters=self._counters
        )
        self._reading = threading.Thread(target=self._read, name=f"read-{self.name}", daemon=True)
        self._writing = threading.Thread(target=self._write, name=f"write-{self.name}", daemon=True)
        self._reading.start()
        self._writing.start()

    # --- called by the feed -------------------------------------------------------------------------------------------

    def next_sample(self) -> Sample | None:
        """A sample to decode, or None if there is none right now (still being fetched, or all given out)."""
        if self._stop.is_set():
            return None
        try:
            sample = self._samples.get_nowait()
        except queue.Empty:
            return None
        if sample is None:
            self._all_read = True
            self._wake()
        else:
            self._book(sample)  # open from here on: `poll` must not commit while a decoder has it
        return sample

    @property
    def waiting_for_fetch(self) -> bool:
        """Whether a decoder that asked now would get nothing because storage has not delivered yet."""
        return not self._all_read and self._samples.empty()

    # --- called by the encode loop ------------------------------------------------------------------------------------

    def opened(self, sample: Sample, planned: int, rejects: tuple[Reject, ...]) -> None:
        """The decoder has said which clips will come."""
        book = self._book(sample)
        book.planned = planned
        # Opened again after a crash: what failed before stays failed, with its reason.
        book.rejects = [*rejects, *(reject for reject in book.rejects if reject.clip is not None)]

    def has_clip(self, sample: Sample, clip: int) -> bool:
        """Whether this clip has been settled already (its video was decoded again after a crash)."""
        book = self._book(sample)
        return clip in book.written or clip in book.failed

    def clip_done(self, latent: LatentClip) -> None:
        """Hands a finished clip to the writer. Blocks while too many wait to be written.

        Does nothing where the attempt has failed by now: `poll` says so, and other attempts of the same loop go on.
        """
        if not self._put_clip(latent):
            return
        book = self._book(latent.sample)
        book.written.add(latent.plan.index)
        self._frames += latent.num_frames
        self._settle(latent.sample)

    def clip_failed(self, sample: Sample, clip: int, reject: Reject) -> None:
        """A promised clip that will not come."""
        book = self._book(sample)
        if clip not in book.failed:
            book.failed.add(clip)
            book.rejects.append(reject)
        self._settle(sample)

    def sample_ended(self, sample: Sample) -> None:
        """All chunks of the sample have arrived (its last clips may still be in the network)."""
        self._book(sample).ended = True
        self._settle(sample)

    def sample_rejected(self, sample: Sample, reject: Reject) -> None:
        """What is left of the sample will not come: every unsettled clip fails with it."""
        book = self._book(sample)
        book.rejects.append(reject)
        book.failed.update(set(range(book.planned)) - book.written)
        book.ended = True
        self._settle(sample)

    def fail(self, error: Exception) -> None:
        """Something outside the threads went wrong for this attempt alone: `poll` raises it."""
        self._error = self._error or error

    def poll(self) -> ShardResult | None:
        """The result once committed; raises what ended the attempt."""
        if self._error is not None:
            raise self._error
        if self._all_read and not self._books and not self._stop.is_set():
            self._put_clip(None)  # nothing is open any more: write out and commit
            self._stop.set()
        return self._result

    def abort(self) -> None:
        """Stops the threads and deletes what was spooled or uploaded, unless a receipt may name it by now.

        A thread that does not answer (a store that hangs) is left behind: what it may still write is an orphan, never a receipt's.
        """
        self._stop.set()
        self._error = self._error or RuntimeError("aborted")
        self._reader.close()  # also ends a read that waits for the store
        self._reading.join(JOIN_S)
        self._writing.join(JOIN_S)
        if self._writing.is_alive():
            return
        try:
            if not self._commit_begun:
                self._writer.abort()
        except LatheError as error:
            # The store that failed the attempt often refuses the clean-up too. What stays is an orphan: no receipt names it.
            self._error.add_note(f"files of the attempt were left behind: {error}")
        finally:
            self._close()

    # --- the reading thread -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for item in self._reader:
                self.read_at = time.time()
                if isinstance(item, Reject):
                    self._shard_rejects.put(item)
                elif not self._offer(item):
                    return
            drill.fire(self._drill, "after_fetch")
            self._offer(None)
        except NotFound as error:  # it was there when it was listed: no reason to stop the other shards
            self._error = self._error or SourceChanged(f"{error.message}, but was listed", uri=error.uri)
        except BaseException as error:  # noqa: BLE001 - raised in the encode loop by poll()
            self._error = self._error or error
        finally:
            self._wake()

    def _offer(self, sample: Sample | None) -> bool:
        while not self._stop.is_set():
            try:
                self._samples.put(sample, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _put_clip(self, latent: LatentClip | None) -> bool:
        while self._error is None:
            try:
                self._clips.put(latent, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _write(self) -> None:
        try:
            while self._error is None:
                try:
                    latent = self._clips.get(timeout=0.1)
                except queue.Empty:
                    continue
                begun = time.monotonic()
                if latent is None:
                    self._result = self._commit(begun)
                    self._close()
                    return
                self._writer.add(latent)
                self._write_s += time.monotonic() - begun
        except BaseException as error:  # noqa: BLE001 - raised in the encode loop by poll()
            self._error = self._error or error
        finally:
            self._wake()

    def _commit(self, begun: float) -> ShardResult:
        files, stats = self._writer.finish()
        now = time.monotonic()
        self._write_s += now - begun
        counts, rejects = self._final_counts()
        timings = Timings(
            fetch_s=round(self.fetch_wait_s, 4),
            decode_wait_s=round(self.decode_wait_s, 4),
            encode_s=round(self.encode_s, 4),
            write_s=round(self._write_s, 4),
            total_s=round(now - self._started, 4),
            decode_cpu_s=round(self.decode_cpu_s, 4),
        )
        receipt = Receipt(
            format_version=FORMAT_VERSION,
            shard_id=self.shard_id,
            shard=self.shard,
            fingerprint=self._blueprint.fingerprint,
            fingerprint_parts=self._blueprint.fingerprint_parts,
            attempt=self.name,
            created=datetime.now(UTC).isoformat(timespec="microseconds"),
            files=files,
            counts=counts,
            rejects=rejects,
            stats=stats,
            timings=timings,
            notes={
                "environment": environment(self._blueprint.device),
                "reader": dict(self._counters),
                "spec": self._blueprint.spec,
            },
        )
        drill.fire(self._drill, "before_commit")
        self._commit_begun = True
        winner = self._ledger.commit(receipt)
        drill.fire(self._drill, "after_commit")
        won = winner.attempt == self.name
        if not won:
            self._writer.abort()
        reasons: dict[str, int] = {}
        for reject in winner.rejects:
            reasons[reject.reason] = reasons.get(reject.reason, 0) + 1
        return ShardResult(
            self.shard_id,
            won,
            winner.counts,
            timings,
            sum(item.num_bytes + item.index_bytes for item in winner.files),
            reasons,
            len(winner.files),
        )

    # --- the books ----------------------------------------------------------------------------------------------------

    def _book(self, sample: Sample) -> _Book:
        if sample.index not in self._books:
            self._books[sample.index] = _Book(sample)
        return self._books[sample.index]

    def _settle(self, sample: Sample) -> None:
        book = self._books[sample.index]
        if not book.closed:
            return
        if not book.written and not book.rejects:
            message = "the clip rules cut nothing from it"
            book.rejects.append(Reject(sample.key, "clips", "no_clips", message, policy=True, uri=sample.uri))
        self._rejects += book.rejects
        self._counts += Counts(
            samples=1,
            encoded=int(bool(book.written)),
            rejected=int(not book.written),
            clips_planned=book.planned,
            clips=len(book.written),
            clips_rejected=len(book.failed),
            damaged=int(any(not reject.policy for reject in book.rejects)),
        )
        del self._books[sample.index]
        self._reader.release(book.sample)

    def _final_counts(self) -> tuple[Counts, tuple[Reject, ...]]:
        counts = self._counts + Counts(frames=self._frames)
        rejects = list(self._rejects)
        while not self._shard_rejects.empty():
            reject = self._shard_rejects.get()
            rejects.append(reject)
            # Damage without a key (a truncated tar) is not a sample, but it counts against the budget.
            is_sample = int(reject.key is not None)
            counts += Counts(samples=is_sample, rejected=is_sample, damaged=int(not reject.policy))
        counts.check()
        rejects.sort(
            key=lambda reject: (reject.key or "", reject.clip if reject.clip is not None else -1, reject.reason)
        )
        return counts, tuple(rejects)

    def _close(self) -> None:
        self._reader.close()
        self._scratch.close()


def clip_id(sample: Sample, etag: str, plan: ClipPlan, fingerprint: str) -> str:
    """Name of a latent, the same in every run: a readable piece of the key, the clip number, and a digest of what it is.

    `etag` is of the object the sample came from: a replaced input gives new latents new names.
    """
    digest = stable_hash(
        [sample.uri, etag, sample.key, plan.index, plan.start, str(plan.bucket), fingerprint], digest_size=8
    )
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", sample.key)[-64:].strip("_") or "clip"
    return f"{readable}-{plan.index:04d}-{digest}"
