"""Shard attempts without an encoder: a build context, a local store or one whose uploads wait, and latents made by hand."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

from pipeline.corpus import resolve_inputs
from pipeline.engine.worker.attempt import ShardAttempt
from pipeline.engine.worker.build_context import make_context
from pipeline.records import Bucket, OpenedVideo
from pipeline.storage.local import LocalStore
from pipeline.video.clips import resolve_rules
from tests.pipeline.latent_clips import SPEC, latent_clip
from tests.tiny_corpus import tiny_job

BUCKET = Bucket(5, 32, 32)


def context_of(inputs, output, *overrides):
    job = tiny_job(inputs, output, *overrides)
    rules = resolve_rules(job.clips, SPEC.time_stride, SPEC.space_stride, "leanvae", SPEC.lead_frames)
    network = SimpleNamespace(spec=SPEC, identity={"untrained": True}, provenance={"uri": "untrained"})
    return make_context(job, rules, network, "cpu", "float32")


def shards_of(context):
    return resolve_inputs(context.job.inputs, context.job.storage)


class HeldStore(LocalStore):
    """A local output where an upload moves one byte whenever `step` is called, and ends once `go_on` is set."""

    def __init__(self, root):
        super().__init__(root)
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._moves = threading.Semaphore(0)
        self._moved = threading.Semaphore(0)

    def step(self):
        self._moves.release()
        assert self._moved.acquire(timeout=240)

    def upload(self, local_path, key, *, progress=None):
        self.begun.set()
        while not self.go_on.is_set():
            if self._moves.acquire(timeout=0.02):
                progress(1)
                self._moved.release()
        return super().upload(local_path, key, progress=progress)


def start(shard, context, store=None, progress=None):
    return ShardAttempt(shard, context, store or LocalStore(context.job.output), lambda: None, progress)


def until(what, attempt=None):
    """Polls until `what()` is true, at most a minute."""
    deadline = time.monotonic() + 240
    while not (found := what()):
        if attempt is not None:
            attempt.poll()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def read_all(attempt, count):
    """The `count` samples of the attempt, and the end of its source."""
    samples = [until(attempt.next_sample, attempt) for _ in range(count)]
    until(lambda: attempt.next_sample() is None and attempt._reading.all_read, attempt)
    return samples


def latent_for(sample, clip=0, *, bucket=BUCKET, **options):
    """A latent of five frames for clip `clip` of a sample."""
    made = latent_clip(sample.index, clip=clip, bucket=bucket, num_frames=5, dtype="float32", **options)
    return replace(made, sample=sample)


def opened(sample, clips):
    """What a decoder answers for a video of so many clips."""
    made = latent_for(sample)
    return OpenedVideo(made.info, tuple(replace(made.plan, index=n) for n in range(clips)), ())


def encode(attempt, samples, clips=1):
    """Gives the attempt a latent for every sample, as the encode loop would."""
    for sample in samples:
        attempt.opened(sample, opened(sample, clips))
        for clip in range(clips):
            attempt.clip_done(latent_for(sample, clip))
        attempt.sample_ended(sample)
