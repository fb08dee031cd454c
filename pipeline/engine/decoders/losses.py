"""What follows for a sample when its decoder was lost or could not read it. Decides on plain values, without threads or a clock.

Decoding is deterministic, so a video can start again on another decoder, and its owner drops what it already has. How often it may do so
depends on what ended the decoder:

- its own work (a crash, a limit, an exit, the time limit): after `TRIES` of these the rest of the video is rejected;
- something outside (SIGKILL, a memory monitor, a lost node): the video is never rejected, because the kernel's memory killer looks the
  same whether or not the video is at fault. After `OUTSIDE_KILLS` of these the owner gets the `WorkerLost` and its shard is tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os.path import join
from typing import TYPE_CHECKING

from pipeline.errors import BadDataError, LatheError, SourceChanged, StorageUnavailable, WorkerLost
from pipeline.records import Reject
from pipeline.storage import locate

if TYPE_CHECKING:
    from pipeline.engine.decoders.lane_state import Job
    from pipeline.records import Sample

TRIES = 2  # decoders a video may end by its own work before the rest of it is rejected
OUTSIDE_KILLS = 5  # decoders killed from outside on one video before its owner gets the error
KILL_PAUSE_S = 1.0  # before a video is decoded again after its second kill from outside; doubled each time


@dataclass(frozen=True, slots=True)
class Restarted:
    """The video starts again from its first frame on another decoder: unfinished clips are void, finished ones remain."""


def after_loss(job: Job, reason: str, error: WorkerLost, now: float) -> tuple[Restarted | Reject | WorkerLost, Job]:
    """What the owner of the sample is sent, and the job to repeat if that is `Restarted`. `reason`: slug of a reject."""
    sample = job.sample
    deaths, kills = job.deaths + error.blame, job.kills + (not error.blame)
    pause_s = 0.0 if error.blame or kills < 2 else KILL_PAUSE_S * 2 ** (kills - 2)
    again = replace(job, deaths=deaths, kills=kills, not_before=now + pause_s)
    if deaths >= TRIES:
        text = f"{error.message}, {deaths} times"
        return Reject(sample.key, "decode", reason, text, policy=False, uri=sample.uri), again
    if kills >= OUTSIDE_KILLS:
        text = f"{kills} decoders were lost on {sample.key}, none by a crash; the last: {error.message}"
        return WorkerLost(text, uri=sample.uri, key=sample.key, stage="decode"), again
    return Restarted(), again


def after_error(sample: Sample, error: LatheError) -> Reject | LatheError:
    """What the owner is sent when a decoder answers with `error`: a reject where the video is at fault."""
    if isinstance(error, BadDataError):
        return Reject.from_error(error, sample, "decode", frames_recovered=error.frames_recovered)
    if isinstance(error, SourceChanged) and sample.video != join(*locate(sample.uri)):
        # The source itself is unchanged: the next attempt makes another copy.
        text = f"the temporary copy of {sample.key} is gone: {error.message}"
        return StorageUnavailable(text, uri=sample.uri, stage="decode")
    return error
