"""The loop of one encoder: takes frames from the feed, runs batches through the network, gives latents to the attempts of their shards.

Takes shards by `submit`; several are in flight, so that the next one is fetched and decoded while the last one is written.
Gives `ShardResult`s and failures by `step`. Used by the inline executor and by the encoder actor of Ray.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.engine.decoders.feed import Event, Feed
from pipeline.engine.decoders.losses import Restarted
from pipeline.engine.worker.attempt import ShardAttempt
from pipeline.engine.worker.batching import Batcher, ClipRun
from pipeline.engine.worker.blamed_video import StepVideo
from pipeline.engine.worker.latent_spool import LatentSpool
from pipeline.engine.worker.loop_counts import LoopCounts
from pipeline.engine.worker.open_video import OpenClip, OpenVideo
from pipeline.engine.worker.progress_counter import ProgressCounter
from pipeline.engine.worker.shard_result import ShardResult
from pipeline.errors import HandedBack, LatheError, StorageUnavailable
from pipeline.format.codec import held_type
from pipeline.format.stored import FIRST_FRAME, I2V_COND
from pipeline.process import kill_points as drill
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, VideoEnded
from pipeline.storage import mark_reached, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pipeline.encoder import Encoded, Encoder
    from pipeline.engine.decoders.lanes import Lanes
    from pipeline.engine.worker.blamed_video import BlamedVideo
    from pipeline.engine.worker.build_context import BuildContext
    from pipeline.engine.worker.death_record import DeathRecord
    from pipeline.engine.worker.worker_stats import WorkerStats
    from pipeline.records import Sample, Shard

COMPILING_S = 1800.0
CLOSE_S = 15.0  # for attempts to delete their files when the loop is closed


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """A shard attempt that ended in an exception. The driver decides whether the shard is tried again."""

    shard_id: str
    error: Exception


class EncodeLoop:
    """See the module. One thread calls `step`; `submit` may come from another."""

    def __init__(
        self, context: BuildContext, encoder: Encoder, lanes: Lanes, record: DeathRecord | None = None
    ) -> None:
        job = context.job
        self._counts = LoopCounts()
        self.stats = self._counts.stats  # without what is counted elsewhere: see `live_stats`
        self._progress = ProgressCounter()
        self._context = context
        self._encoder = encoder
        self._record = record
        # A compiler shows no progress but time; beyond this much in all, a compiler that hangs is found by `engine.hang_s`.
        self._progress.watch(lambda: int(min(encoder.compile_s(), COMPILING_S)))
        mark_reached(
            job.storage
        )  # the driver has reached it: if it cannot be reached from here, that is an outage, not a wrong address
        self._store = open_store(job.output, job.storage)
        self._attempts: list[ShardAttempt] = []
        self._ending: list[tuple[ShardAttempt, Exception]] = []  # failed, and cleaning up
        self._unstarted: list[ShardFailure] = []
        self._videos: dict[tuple[ShardAttempt, int], OpenVideo] = {}
        self._lock = threading.Lock()
        self._batcher = Batcher(encoder.largest_batch)
        # The step in the network, without its states: a clip whose state this kept would keep two.
        self._in_flight: tuple[list[tuple[ClipRun, FrameChunk]], Callable[[], list[Encoded]]] | None = None
        self._feed = Feed(
            lanes,
            self,
            rules=context.rules,
            limits=job.decode,
            drill=job.drill,
            chunk_frames=context.chunk_frames,
            frame_bytes=job.engine.frame_bytes,
            first_frame=FIRST_FRAME in job.write.store,
            largest_batch=encoder.largest_batch,
            etag_of=lambda attempt, sample: attempt.etags[sample.uri],
            paused=lambda attempt: attempt.backlogged,
        )
        self._feed.start()

    def submit(self, shard: Shard, blamed: tuple[BlamedVideo, ...] = ()) -> None:
        """Starts an attempt at `shard`; its fetch begins at once. One that cannot start is a failure of the next `step`."""
        try:
            attempt = ShardAttempt(shard, self._context, self._store, self._feed.wake, self._progress, blamed)
        except (LatheError, RuntimeError) as error:  # RuntimeError: no thread can be started
            with self._lock:
                self._unstarted.append(ShardFailure(shard.id(self._context.fingerprint), error))
            self._feed.wake()
            return
        self._counts.begun(attempt)
        with self._lock:
            self._attempts.append(attempt)

    def hand_back(self, shard_ids: Collection[str]) -> None:
        """Ends the attempts at these shards, from any thread: their outcome is a `HandedBack`."""
        with self._lock:
            attempts = [attempt for attempt in self._attempts if attempt.shard_id in shard_ids]
        for attempt in attempts:
            attempt.fail(HandedBack("handed back: the worker's node goes away"))
        self._feed.wake()

    @property
    def shards_in_flight(self) -> int:
        """Shards whose outcome `step` has not returned yet."""
        return len(self._attempts) + len(self._ending) + len(self._unstarted)

    @property
    def can_decode(self) -> bool:
        """Whether at least one decoder is up. Raises what ended the feed."""
        if self._feed.failure is not None:
            raise self._feed.failure
        return self._feed.ready_lanes > 0

    def live_stats(self) -> WorkerStats:
        """The numbers as they are now. May be called from any thread."""
        return self._counts.now(self._progress.value, self._encoder.device_bytes(), self._encoder.compile_s())

    def next_sample(self) -> tuple[ShardAttempt, Sample] | None:
        """For the feed: samples of the oldest attempt first."""
        with self._lock:
            attempts = list(self._attempts)
        for attempt in attempts:
            if (sample := attempt.next_sample()) is not None:
                return attempt, sample
        return None

    def step(self, wait_s: float = 0.05) -> list[ShardResult | ShardFailure]:
        """Takes what has arrived, runs at most one batch, and returns the shards that ended.

        Raises:
            FatalError: the build must stop (never for one bad input).
        """
        begun = time.monotonic()
        ready = len(self._batcher) > 0 or self._in_flight is not None
        events = self._feed.events(0.0 if ready else wait_s)
        if not ready:
            self._counts.waited(time.monotonic() - begun, self._attempts, self._feed)
        for event in events:
            self._handle(event)
        self._progress.add(len(events))
        # While decoders are busy, waiting may give a fuller batch. The feed's byte budget bounds what waits.
        batch = self._batcher.take(full_only=bool(events) and self._feed.decoding)
        if batch:
            self._launch(batch)
        if self._in_flight is not None and not (batch and self._encoder.overlaps):
            self._finish_step()
            self._record_step()
        self.stats.lanes_ready = self._feed.ready_lanes
        return self._ended()

    def close(self) -> None:
        """Aborts attempts in flight, ends threads and decoders. Waits at most `CLOSE_S` for attempts to delete their files."""
        self._feed.close()  # and the lanes
        for attempt in self._attempts:
            attempt.abort()
        deadline = time.monotonic() + CLOSE_S
        for attempt in [*self._attempts, *(attempt for attempt, _ in self._ending)]:
            attempt.ended(max(0.0, deadline - time.monotonic()))
        self._attempts.clear()
        self._ending.clear()

    # --- events -------------------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        attempt, sample, what = event.owner, event.sample, event.what
        if attempt not in self._attempts:  # it has failed meanwhile
            if isinstance(what, FrameChunk):
                self._feed.consumed(what.nbytes)
            return
        if isinstance(what, FrameChunk):
            self._chunk(attempt, sample, what)
        elif isinstance(what, OpenedVideo):
            self._videos[attempt, sample.index] = OpenVideo(
                sample, what.info, {plan.index: plan for plan in what.clips}
            )
            attempt.opened(sample, what)
        elif isinstance(what, ClipFailed):
            self._drop_run(attempt, sample, what.clip)
            attempt.clip_failed(sample, what.clip, what.reject)
        elif isinstance(what, VideoEnded):
            attempt.decode_cpu_s += what.decode_s
            self.stats.decode_cpu_s += what.decode_s
            self.stats.frames_decoded += what.frames_decoded
            self.stats.samples += 1
            video = self._videos[attempt, sample.index]
            video.ended = True
            attempt.sample_ended(sample)
            self._close_if_done(attempt, video)
        elif isinstance(what, Restarted):
            self._drop_video(attempt, sample)
        elif isinstance(what, Reject):
            self._drop_video(attempt, sample)
            self.stats.samples += 1
            attempt.sample_rejected(sample, what)
        elif isinstance(
            what, LatheError
        ):  # storage below a decoder, or decoders that were killed from outside too often
            self._drop_video(attempt, sample)
            attempt.sample_failed(sample, what)

    def _chunk(self, attempt: ShardAttempt, sample: Sample, chunk: FrameChunk) -> None:
        self.stats.video = sample.key
        video = self._videos[attempt, sample.index]
        if attempt.has_clip(sample, chunk.clip):  # decoded again after a crash
            self._feed.consumed(chunk.nbytes)
            return
        if chunk.first:
            apart = (attempt.shard_id, sample.uri, sample.key) if attempt.apart(sample) else None
            clip = self._new_clip(attempt, video, chunk)
            video.runs[chunk.clip, chunk.member] = ClipRun(clip, apart=apart)
        self._batcher.add(video.runs[chunk.clip, chunk.member], chunk)

    def _new_clip(self, attempt: ShardAttempt, video: OpenVideo, chunk: FrameChunk) -> OpenClip:
        def spool() -> LatentSpool:
            return LatentSpool(attempt.spool_dir)

        write = self._context.job.write
        stored = (write.moments, I2V_COND in write.store) if not chunk.member else (False, False)
        logvar, cond = (spool() if wanted else None for wanted in stored)
        return OpenClip(attempt, video, video.plans[chunk.clip], chunk.member, spool(), logvar, cond)

    def _drop_run(self, attempt: ShardAttempt, sample: Sample, clip: int) -> None:
        video = self._videos.get((attempt, sample.index))
        if video is None:
            return
        video.encoded.pop(video.plans[clip].clip_index, None)
        for track in [track for track in video.runs if track[0] == clip]:
            run = video.runs.pop(track)
            self._feed.consumed(sum(chunk.nbytes for chunk in run.waiting))
            self._batcher.drop(run)

    def _drop_video(self, attempt: ShardAttempt, sample: Sample) -> None:
        video = self._videos.get((attempt, sample.index))
        for clip in {clip for clip, _ in video.runs} if video else ():
            self._drop_run(attempt, sample, clip)
        self._videos.pop((attempt, sample.index), None)

    # --- the network --------------------------------------------------------------------------------------------------

    def _launch(self, batch: list[tuple[ClipRun, FrameChunk]]) -> None:
        """Starts a step, and stores the latents of the previous one meanwhile. States are passed on at once: the next step needs them."""
        if self._in_flight is not None and (batch[0][0].apart, self._in_flight[0][0][0].apart) != (None, None):
            self._finish_step()  # an error of the device may belong to the step before
        self._record_step(batch)
        begun, compiled_s = time.monotonic(), self._encoder.compile_s()
        launched = self._encoder.launch([chunk for _, chunk in batch], [run.state for run, _ in batch])
        for (run, _), state in zip(batch, launched.states, strict=True):
            run.state = state
        self._charge(batch, time.monotonic() - begun)
        self.stats.encode_s -= self._encoder.compile_s() - compiled_s
        self.stats.steps += 1
        self.stats.batched += len(batch)
        self.stats.slots += max(len(batch), self._encoder.largest_batch(batch[0][1].shape))
        if self._in_flight is not None:
            self._finish_step()
        self._in_flight = batch, launched.results
        self._record_step()

    def _record_step(self, batch: Sequence[tuple[ClipRun, FrameChunk]] = ()) -> None:
        """Records the videos of `batch` and of the step in flight."""
        if self._record is None:
            return
        runs = [run for run, _ in (*batch, *(self._in_flight[0] if self._in_flight is not None else ()))]
        clips: list[OpenClip] = [run.token for run in runs]
        videos = [StepVideo(clip.attempt.shard_id, clip.video.sample.uri, clip.video.sample.key) for clip in clips]
        self._record.stage("encode" if videos else "waiting for frames", videos)

    def _charge(self, batch: list[tuple[ClipRun, FrameChunk]], spent_s: float) -> None:
        self.stats.encode_s += spent_s
        for run, _ in batch:
            run.token.attempt.encode_s += spent_s / len(batch)

    def _finish_step(self) -> None:
        """Waits for the step in flight and stores its latents."""
        if self._in_flight is None:
            return
        (batch, results_of), self._in_flight = self._in_flight, None
        begun = time.monotonic()
        results = results_of()
        self._charge(batch, time.monotonic() - begun)
        self._progress.add()
        for (run, chunk), encoded in zip(batch, results, strict=True):
            attempt = run.token.attempt
            self._feed.consumed(chunk.nbytes)
            if run.dropped:
                continue
            try:
                self._store_chunk(run, chunk, encoded)
            except StorageUnavailable as error:  # the local disk
                attempt.fail(error)
        drill.fire(self._context.job.drill, "mid_video")

    def _store_chunk(self, run: ClipRun, chunk: FrameChunk, encoded: Encoded) -> None:
        clip: OpenClip = run.token
        clip.store(chunk, encoded, held_type(self._context.job.write.dtype))
        self.stats.frames += len(chunk.pts_s)
        if chunk.last:
            self._finish_clip(clip)

    def _finish_clip(self, clip: OpenClip) -> None:
        del clip.video.runs[clip.plan.index, clip.member]
        self.stats.clips += not clip.member
        if variants := clip.finished(held_type(self._context.job.write.dtype)):
            clip.attempt.clip_done(*variants)
        self._close_if_done(clip.attempt, clip.video)

    def _close_if_done(self, attempt: ShardAttempt, video: OpenVideo) -> None:
        if video.ended and not video.runs:
            self._videos.pop((attempt, video.sample.index), None)

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _ended(self) -> list[ShardResult | ShardFailure]:
        ended: list[ShardResult | ShardFailure] = []
        with self._lock:
            unstarted, self._unstarted = self._unstarted, []
        ended += unstarted
        for attempt in list(self._attempts):
            try:
                result = attempt.poll()
            except Exception as error:  # noqa: BLE001 - not swallowed: it is the shard's outcome, and the driver counts it
                self._forget(attempt)
                attempt.abort()
                self._ending.append((attempt, error))
                continue
            if result is not None:
                self._forget(attempt)
                ended.append(replace(result, step_sizes=self._encoder.choices()))
        # Reported after the attempt has tried to delete its files in a thread of its own: the loop never waits for a store.
        over = [item for item in self._ending if item[0].ended()]
        self._ending = [item for item in self._ending if item not in over]
        ended += [ShardFailure(attempt.shard_id, error) for attempt, error in over]
        return ended

    def _forget(self, attempt: ShardAttempt) -> None:
        with self._lock:
            self._attempts.remove(attempt)
        self._counts.ended(attempt)
        self._feed.cancel(attempt)
        for owner, index in [key for key in self._videos if key[0] is attempt]:
            self._drop_video(owner, self._videos[owner, index].sample)
