"""A store slower than the encoder pauses the decoding of its own attempt only."""

import time

import pipeline
from pipeline.config import ClipConfig, DecodeConfig, DrillConfig
from pipeline.engine.decoders.feed import Feed
from pipeline.engine.decoders.process_lanes import ProcessLanes
from pipeline.engine.worker import clip_writing
from pipeline.records import FrameChunk, Sample, VideoEnded
from pipeline.storage.local import LocalStore
from pipeline.video.clips import resolve_rules
from tests.tiny_corpus import make_corpus, receipts, rows, tiny_job, video_bytes

RULES = resolve_rules(ClipConfig(frames=(5,), size=("32x32",), select="tile"), 4, 8, "leanvae")


class Source:
    def __init__(self, *items):
        self.items = list(items)

    def next_sample(self):
        return self.items.pop(0) if self.items else None


def test_paused_owner_gets_no_chunk_and_the_others_continue():
    paused = {"slow"}
    videos = [(owner, Sample(owner, 0, "u", video_bytes(29), "mp4")) for owner in ("slow", "fast")]
    lanes = ProcessLanes(2, 4 << 30)
    feed = Feed(
        lanes,
        Source(*videos),
        rules=RULES,
        limits=DecodeConfig(),
        drill=DrillConfig(),
        chunk_frames=4,
        frame_bytes=1 << 24,
        largest_batch=lambda shape: 1 << 10,
        paused=lambda owner: owner in paused,
    )
    feed.start()
    seen = {"slow": [], "fast": []}

    def until_ended(owner):
        deadline = time.monotonic() + 240
        while not any(isinstance(what, VideoEnded) for what in seen[owner]):
            assert time.monotonic() < deadline
            for event in feed.events(0.1):
                seen[event.owner].append(event.what)
                if isinstance(event.what, FrameChunk):
                    feed.consumed(event.what.nbytes)

    try:
        until_ended("fast")
        assert not [what for what in seen["slow"] if isinstance(what, FrameChunk)]
        paused.clear()
        until_ended("slow")
    finally:
        feed.close()
        lanes.close()
    chunks = {owner: [what for what in history if isinstance(what, FrameChunk)] for owner, history in seen.items()}
    assert len(chunks["slow"]) == len(chunks["fast"]) == 5


def test_build_into_a_slow_store_has_the_rows_of_a_fast_one(tmp_path, monkeypatch):
    """One clip may wait: every attempt is held back all the time, and everything is written in the end."""
    corpus = make_corpus(tmp_path / "in", shards=2, samples=3)
    pipeline.encode(tiny_job(corpus, tmp_path / "quick"))
    upload = LocalStore.upload

    def slow(self, *arguments, **options):
        time.sleep(0.2)
        return upload(self, *arguments, **options)

    monkeypatch.setattr(LocalStore, "upload", slow)
    monkeypatch.setattr(clip_writing, "BACKLOG_BYTES", 1)
    pipeline.encode(tiny_job(corpus, tmp_path / "slow"))
    assert rows(tmp_path / "slow") == rows(tmp_path / "quick")
    assert {receipt.counts for receipt in receipts(tmp_path / "slow")} == {
        receipt.counts for receipt in receipts(tmp_path / "quick")
    }
