"""Samples in progress: measures clips as their chunks arrive, and writes finished samples in the corpus's order.

Samples are written in corpus order, so results do not depend on the number of decoders.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.engine.decoders.losses import Restarted
from pipeline.evaluation.measuring import ClipMeasurement
from pipeline.records import ClipFailed, FrameChunk, OpenedVideo, Reject, VideoEnded

if TYPE_CHECKING:
    from pipeline.engine.decoders.sample_stream import SampleEvent
    from pipeline.evaluation.measuring import ClipResult, Findings, Instruments
    from pipeline.evaluation.rows import ClipRows
    from pipeline.records import ClipPlan, Sample


@dataclass(slots=True)
class _Video:
    """Sample in progress."""

    sample: Sample | None
    plans: dict[int, ClipPlan] = field(default_factory=dict)
    runs: dict[int, ClipMeasurement] = field(default_factory=dict)  # by clip: variants of one are cut in turns
    results: list[tuple[ClipPlan, ClipResult]] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    settled: set[int] = field(default_factory=set)  # clips measured or failed
    opened: bool = False
    ended: bool = False


class SamplesInProgress:
    """Samples between their first event and their turn in the corpus's order. Keeps numbers of a waiting sample, not frames."""

    def __init__(self, instruments: Instruments, findings: Findings, rows: ClipRows) -> None:
        self._instruments, self._findings, self._rows = instruments, findings, rows
        self._videos: dict[int, _Video] = {}
        self._next = 0
        self.videos = 0  # written, including rejected ones

    def take(self, event: SampleEvent) -> None:
        """Processes one event; writes every sample whose turn has come."""
        video = self._videos.setdefault(event.number, _Video(event.sample))
        what = event.what
        if isinstance(what, OpenedVideo):
            video.plans = {plan.index: plan for plan in what.clips}
            if not video.opened:  # a restarted decoder opens it again
                video.rejects += what.rejects
            video.opened = True
        elif isinstance(what, FrameChunk):
            self._measure(event.number, video, what)
        elif isinstance(what, ClipFailed):
            video.runs.pop(what.clip, None)
            if what.clip not in video.settled:
                video.settled.add(what.clip)
                video.rejects.append(what.reject)
        elif isinstance(what, Restarted):
            video.runs.clear()
        elif isinstance(what, Reject):
            video.rejects.append(what)
            video.ended = True
        elif isinstance(what, VideoEnded):
            video.ended = True
        while (first := self._videos.get(self._next)) is not None and first.ended:
            self._write(self._videos.pop(self._next))
            self._next += 1

    def _measure(self, number: int, video: _Video, chunk: FrameChunk) -> None:
        if chunk.clip in video.settled or video.sample is None:
            return
        plan = video.plans[chunk.clip]
        if chunk.first:
            video.runs[chunk.clip] = ClipMeasurement(self._instruments, video.sample, plan)
        if (run := video.runs.get(chunk.clip)) is None:
            raise RuntimeError(
                f"a chunk of {video.sample.key}, clip {chunk.clip}, arrived before the clip's first chunk"
            )
        run.push(chunk)
        if chunk.last:
            video.settled.add(chunk.clip)
            video.results.append((plan, run.result()))
            self._findings.show(number, video.sample, plan, run)
            del video.runs[chunk.clip]

    def _write(self, video: _Video) -> None:
        self.videos += 1
        for reject in video.rejects:
            self._rows.reject(reject)
        if video.sample is not None:
            for plan, result in video.results:
                self._rows.add(video.sample, plan, result)
                self._findings.add(plan, result)
