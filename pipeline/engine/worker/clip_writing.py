"""Thread that writes the clips of one shard attempt in parallel to the encode loop.

Takes finished `LatentClip`s by `put`, which never waits, the variants of a clip together: all are written, or none. Gives one `ClipOutcome`
for each, and after `finish` a call of `finished` with the uploaded files. The thread builds and hashes files; `ShardWriter` uploads them
in threads of its own. Memory: once waiting clips exceed `BACKLOG_BYTES`, `backlogged` is true and the caller asks for no more frames, so
that at most the latents of frames already decoded (`engine.frame_bytes`) are added; the writer holds a few row groups.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import BadDataError
from pipeline.records import Reject

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipeline.records import ChannelStats, LatentClip, Sample, WrittenFile
    from pipeline.writer import ShardWriter

BACKLOG_BYTES = 256 * 1024 * 1024  # latents encoded and not yet written; a fast GPU gives as many in about a second
CLIP_BYTES = 8 * 1024  # of a clip besides its tensors: sample, plan, caption, metadata
LOOK_S = 0.1  # how often the thread checks whether it should stop


@dataclass(frozen=True, slots=True)
class ClipOutcome:
    """Result for one clip: written if `reject` is None."""

    sample: Sample
    clip: int
    num_frames: int
    reject: Reject | None


class ClipWriting:
    """See the module. `put`, `finish`, `outcomes` and `backlogged` are for the encode loop, `stop` and `join` for any thread.

    Args:
        writer: used by this thread alone until it has ended.
        name: of the thread.
        finished: called in the thread with the files and their statistics; may take long (it commits).
        failed: called in the thread with the error that ended it.
        wake: called in the thread when there is an outcome, a result or a failure.
    """

    def __init__(
        self,
        writer: ShardWriter,
        name: str,
        *,
        finished: Callable[[tuple[WrittenFile, ...], ChannelStats | None], None],
        failed: Callable[[BaseException], None],
        wake: Callable[[], None],
    ) -> None:
        self._writer = writer
        self._finished = finished
        self._failed = failed
        self._wake = wake
        self._clips: queue.SimpleQueue[tuple[LatentClip, ...] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[ClipOutcome] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._waiting_bytes = 0
        self._stop = threading.Event()
        self.write_s = 0.0  # seconds of work, waiting for uploads included
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread.

        Raises:
            RuntimeError: the machine starts no further thread.
        """
        self._thread.start()

    def put(self, *variants: LatentClip) -> None:
        """Queues a clip. The outcome of each variant follows, unless the thread ends before."""
        with self._guard:
            self._waiting_bytes += sum(map(_size, variants))
        self._clips.put(variants)

    def finish(self) -> None:
        """No clip follows: the thread finishes the files and calls `finished`."""
        self._clips.put(None)

    @property
    def backlogged(self) -> bool:
        """Whether more than `BACKLOG_BYTES` wait to be written."""
        return self._waiting_bytes > BACKLOG_BYTES

    def outcomes(self) -> Iterator[ClipOutcome]:
        """Outcomes since the last call."""
        while not self._outcomes.empty():
            yield self._outcomes.get()

    def stop(self) -> None:
        """Ends the thread within `LOOK_S`, also where it waits for uploads. Does not wait."""
        self._stop.set()
        self._writer.stop()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within `timeout_s`."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    variants = self._clips.get(timeout=LOOK_S)
                except queue.Empty:
                    self._writer.check_uploads()
                    continue
                begun = time.monotonic()
                if variants is None:
                    files, stats = self._writer.finish()
                    self.write_s += time.monotonic() - begun
                    self._finished(files, stats)
                    return
                outcomes = self._write(variants)
                self.write_s += time.monotonic() - begun
                with self._guard:
                    self._waiting_bytes -= sum(map(_size, variants))
                for outcome in outcomes:
                    self._outcomes.put(outcome)
                self._wake()
        except BaseException as error:  # noqa: BLE001 - raised in the encode loop by `ShardAttempt.poll`
            if not self._stop.is_set():  # else the error only says that the uploads were stopped
                self._failed(error)
        finally:
            self._wake()

    def _write(self, variants: tuple[LatentClip, ...]) -> list[ClipOutcome]:
        refused: BadDataError | None = None
        try:
            self._writer.add(*variants)
        except BadDataError as error:
            refused = error
        outcomes = []
        for clip in variants:
            sample, number = clip.sample, clip.plan.index
            reject = None if refused is None else Reject.from_error(refused, sample, "encode", clip=number)
            outcomes.append(ClipOutcome(sample, number, clip.num_frames, reject))
        return outcomes


def _size(clip: LatentClip) -> int:
    arrays = (clip.latent_CTHW, clip.logvar_CTHW, clip.cond_CTHW, *clip.members.values())
    return CLIP_BYTES + sum(array.nbytes for array in arrays if array is not None) + len(clip.first_frame or b"")
