"""Rejects that a later run may lift, and the cache of receipt summaries."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from pipeline.records import Counts
from pipeline.storage.local import LocalStore
from pipeline.summaries import PREFIX as SUMMARIES
from pipeline.summaries import Summaries
from tests.pipeline.frameless_build import (
    totals,
    visible,
)

# --- rejects that a later run may lift --------------------------------------------------------------------------------

LOW = ("decode.max_frames=20",)


def test_a_raised_limit_is_said_and_retried_on_request(world):
    world.run("abcd", *LOW).finish({"b": "too_many_frames", "c": "too_short"})
    told = world.run("abcd")
    assert told.todo == []
    (notice,) = told.work.notices
    assert "1 inputs of finished shards were rejected by limits" in notice
    assert "too_many_frames 1" in notice
    retry = world.run("abcd", retry_rejects="")
    (shard,) = retry.todo
    assert [Path(sample.uri).stem for sample in shard.retry.samples] == ["b"]
    retry.finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abd")
    assert totals(world.store) == Counts(4, 3, 1, 3, 3, 0, 15)
    assert world.run("abcd").work.notices == []
    assert world.run("abcd", retry_rejects="").todo == []


def test_the_same_or_a_lower_limit_is_not_worth_a_word(world):
    world.run("ab", *LOW).finish({"b": "too_many_frames"})
    assert world.run("ab", *LOW).work.notices == []
    assert world.run("ab", "decode.max_frames=10").work.notices == []


def test_named_reasons_are_retried_whatever_the_limits(world):
    world.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    assert world.run("abc").work.notices == []
    first = world.run("abc", retry_rejects="decoder_crashed").finish({"b": "undecodable"})
    assert len(first.committed) == 1
    assert totals(world.store) == Counts(3, 1, 2, 1, 1, 0, 5)
    # The second retry of one sample knows of the first, and replaces its reject.
    assert world.run("abc", retry_rejects="decoder_crashed").todo == []
    world.run("abc", retry_rejects="undecodable,too_short").finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")
    assert totals(world.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_two_retries_at_once_count_once(world):
    world.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    one = world.run("abc", retry_rejects="decoder_crashed")
    other = world.run("abc", retry_rejects="decoder_crashed,too_short")
    one.finish()
    other.finish()
    assert Counter(row.source_key for row in visible(world.store)) == Counter("abc")


# --- summaries --------------------------------------------------------------------------------------------------------


class Counting(LocalStore):
    reads = 0

    def read(self, key: str) -> bytes:
        self.reads += key.startswith("receipts/")
        return super().read(key)


def test_a_cache_of_summaries_saves_reads_and_is_never_trusted_over_the_list(world, monkeypatch):
    monkeypatch.setattr("pipeline.summaries.WORTH_SAVING", 1)
    world.run("abcdef", "storage.files_per_shard=1").finish()
    store = Counting(world.store.root)
    summaries = Summaries(store)
    found = summaries.all()
    summaries.save()
    assert store.reads == 6
    assert Summaries(store).all() == found
    assert store.reads == 6
    gone = found[0]
    store.delete(gone.key)
    assert {item.key for item in Summaries(store).all()} == {item.key for item in found[1:]}
    store.write(
        gone.key, json.dumps({**json.loads(_receipt_like(store, found[1].key)), "shard_id": gone.shard_id}).encode()
    )
    assert gone not in Summaries(store).all()  # the same name with other contents is read
    (cached,) = [info.key for info in store.list(SUMMARIES)]
    store.write(cached, b"damaged")
    assert len(Summaries(store).all()) == 6


def _receipt_like(store: LocalStore, key: str) -> bytes:
    return LocalStore.read(store, key)
