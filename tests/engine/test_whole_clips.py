"""Networks that encode whole clips batch them as others batch chunks, and batches change no row."""

from __future__ import annotations

import threading

import pytest

import pipeline
from pipeline.encoder import Encoder
from pipeline.engine.decoders.feed import Feed
from pipeline.records import FrameChunk
from tests.model.conftest import Golden
from tests.tiny_corpus import rows, tiny_job, video_bytes, write_tar

VIDEOS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Videos of 17 to 20 frames: each gives one clip of 17, also as a whole."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tar(folder / "0.tar", {f"{n:06d}": {"mp4": video_bytes(17 + n % 4, seed=n)} for n in range(VIDEOS)})
    return folder


def whole_network_job(corpus, output, *overrides):
    config = {**Golden("wfvae-tiny").config, "attention_type": "AttnBlock3D"}
    flags = {"model.name": "wfvae", "model.config": config, "clips.frames": "17", "clips.select": "head"}
    return tiny_job(corpus, output, *overrides, **flags)


class Arrivals:
    """Counts the clips that the feed has put where the encode loop takes them."""

    def __init__(self, patch):
        self.changed = threading.Condition()
        self.count = 0
        pump, unseen = Feed.pump, 0

        def counting(feed, wait_s):
            nonlocal unseen
            with self.changed:  # what the last turn returned has been put by now
                self.count += unseen
                self.changed.notify_all()
            events = pump(feed, wait_s)
            unseen = sum(isinstance(event.what, FrameChunk) for event in events)
            return events

        patch.setattr(Feed, "pump", counting)

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: self.count >= count, timeout=240), f"{self.count} clips, not {count}"


@pytest.mark.parametrize("select", ["head", "whole"])
def test_whole_clips_share_a_step_and_their_rows_are_those_of_one_at_a_time(corpus, tmp_path, monkeypatch, select):
    alone = pipeline.encode(whole_network_job(corpus, tmp_path / "1", "engine.batch=1", f"clips.select={select}"))
    arrivals, launch, steps = Arrivals(monkeypatch), Encoder.launch, []

    def slow_at_first(self, chunks, states):
        steps.append(tuple(chunk.planes_T3HW.shape[0] for chunk in chunks))
        if len(steps) == 1:  # a network slow enough for the decoders to get ahead of it
            arrivals.wait_for(len(chunks) + 3)
        return launch(self, chunks, states)

    monkeypatch.setattr(Encoder, "launch", slow_at_first)
    together = pipeline.encode(whole_network_job(corpus, tmp_path / "3", "engine.batch=3", f"clips.select={select}"))
    assert alone.ok
    assert together.ok
    assert together.counts == alone.counts
    assert together.counts.clips == VIDEOS
    assert max(steps) == (17, 17, 17)
    assert set(alone.step_sizes.values()) == {1}
    assert rows(tmp_path / "3") == rows(tmp_path / "1")
