"""Rejects that a later run encodes, and the cache of receipt summaries."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.format.layout import CURRENT
from pipeline.ledger.summaries import Summaries
from pipeline.records import Counts
from pipeline.storage.local import LocalStore
from tests.pipeline.frameless_build import (
    ticks,
    totals,
    touch,
    visible,
)

# --- rejects that a later run may lift --------------------------------------------------------------------------------

LOW = ("decode.max_frames=20",)


def test_raised_limit_gives_a_notice_and_is_retried_on_request(workspace):
    workspace.run("abcd", *LOW).finish({"b": "too_many_frames", "c": "too_short"})
    outcome = workspace.run("abcd")
    assert outcome.todo == []
    (notice,) = outcome.work.notices
    assert "1 input of finished shards was rejected by limits" in notice
    assert "too_many_frames 1" in notice
    retry = workspace.run("abcd", retry_rejects="")
    (shard,) = retry.todo
    assert [Path(sample.uri).stem for sample in shard.retry.samples] == ["b"]
    retry.finish()
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abd")
    assert totals(workspace.store) == Counts(4, 3, 1, 3, 3, 0, 15)
    assert workspace.run("abcd").work.notices == []
    assert workspace.run("abcd", retry_rejects="").todo == []


def test_same_or_lower_limit_gives_no_notice(workspace):
    workspace.run("ab", *LOW).finish({"b": "too_many_frames"})
    assert workspace.run("ab", *LOW).work.notices == []
    assert workspace.run("ab", "decode.max_frames=10").work.notices == []


def test_named_reasons_are_retried_with_any_limits(workspace):
    workspace.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    assert workspace.run("abc").work.notices == []
    first = workspace.run("abc", retry_rejects="decoder_crashed").finish({"b": "undecodable"})
    assert len(first.committed) == 1
    assert totals(workspace.store) == Counts(3, 1, 2, 1, 1, 0, 5, damaged=1)
    # The second retry of one sample knows of the first, and replaces its reject.
    assert workspace.run("abc", retry_rejects="decoder_crashed").todo == []
    workspace.run("abc", retry_rejects="undecodable,too_short").finish()
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abc")
    assert totals(workspace.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_two_retries_at_once_count_once(workspace):
    workspace.run("abc").finish({"b": "decoder_crashed", "c": "too_short"})
    one = workspace.run("abc", retry_rejects="decoder_crashed")
    other = workspace.run("abc", retry_rejects="decoder_crashed,too_short")
    one.finish()
    other.finish()
    assert Counter(row.source_key for row in visible(workspace.store)) == Counter("abc")


def keys_of(workspace):
    return Counter(row.source_key for row in visible(workspace.store))


def test_a_touched_file_whose_reject_was_retried_stays_done(workspace):
    workspace.run("abc").finish({"b": "decode_timeout"})
    workspace.run("abc", retry_rejects="decode_timeout").finish()
    touch(workspace.folder / "b.mp4")
    again = workspace.run("abc")
    assert again.todo == []
    assert again.work.before() == Counts(samples=3, clips=3)
    assert keys_of(workspace) == Counter("abc")
    assert totals(workspace.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_the_reject_of_a_touched_file_is_retried_under_the_ids_of_its_base(workspace):
    workspace.run("abc").finish({"b": "decode_timeout"})
    touch(workspace.folder / "b.mp4")
    retry = workspace.run("abc", retry_rejects="decode_timeout")
    (shard,) = retry.todo
    assert shard.retry.etags[0][1] != shard.objects[0].etag
    retry.finish()
    touch(workspace.folder / "b.mp4")
    assert workspace.run("abc").todo == []
    assert keys_of(workspace) == Counter("abc")
    assert totals(workspace.store).samples == 3


def test_a_retry_does_not_count_once_its_base_is_lost_and_made_again(workspace):
    workspace.run("abc").finish({"b": "decode_timeout"})
    (base,) = [info.key for info in workspace.store.list("_receipts/")]
    workspace.run("abc", retry_rejects="decode_timeout").finish()
    workspace.store.write(base, b'{"half')
    workspace.run("abc").finish()
    assert keys_of(workspace) == Counter("abc")
    assert totals(workspace.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_a_retry_does_not_count_beside_an_earlier_receipt_that_arrives_late(workspace):
    """The receipt of another build has an earlier time and waited long for its store."""
    late = workspace.run("abc", "storage.files_per_shard=2")
    stamp = next(ticks)
    workspace.run("abc").finish({"b": "decode_timeout"})
    workspace.run("abc", retry_rejects="decode_timeout").finish()
    late.finish(created=f"{stamp:08x}")
    assert keys_of(workspace) == Counter("abc")
    assert totals(workspace.store) == Counts(3, 3, 0, 3, 3, 0, 15)


def test_a_sample_that_a_hidden_retry_encoded_can_be_retried_again(workspace):
    workspace.run("ab").finish({"b": "decode_timeout", "a": "decoder_crashed"})
    outer = workspace.run("ab", retry_rejects="decode_timeout,decoder_crashed")
    workspace.run("ab", retry_rejects="decode_timeout").finish({"b": "decode_timeout"})
    outer.finish()  # encodes both; of b the first retry counts, which rejected it again
    assert keys_of(workspace) == Counter("a")
    workspace.run("ab", retry_rejects="decode_timeout").finish()
    assert keys_of(workspace) == Counter("ab")
    assert totals(workspace.store) == Counts(2, 2, 0, 2, 2, 0, 10)


def test_a_file_that_only_resembles_a_lost_one_is_encoded(workspace):
    """`same_as` names a deleted receipt: it covers nothing."""
    workspace.run("ab", "storage.files_per_shard=1").finish()
    touch(workspace.folder / "a.mp4")
    assert workspace.run("ab").todo == []
    for info in list(workspace.store.list("_receipts/")):
        if b"_index/" in workspace.store.read(info.key):
            workspace.store.write(info.key, b"")
    workspace.run("ab").finish()
    assert keys_of(workspace) == Counter("ab")


def test_repaired_file_has_no_reject(workspace):
    workspace.run("abc").finish({"b": "undecodable"})
    path = workspace.folder / "b.mp4"
    path.write_bytes(b"mended....")
    touch(path)
    workspace.run("abc").finish()
    assert totals(workspace.store) == Counts(3, 3, 0, 3, 3, 0, 15)
    assert workspace.run("abc").work.before() == Counts(samples=3, clips=3)
    with pytest.raises(
        ConfigError, match="no finished input was rejected as too_shrt; reasons of finished inputs: undecodable"
    ):
        workspace.run("abc", retry_rejects="too_shrt")
    assert workspace.run("abc", retry_rejects="undecodable").todo == []


@pytest.mark.parametrize("recovered", [True, False])
def test_a_file_that_was_retried_and_then_replaced_counts_by_its_rows(workspace, recovered):
    workspace.run("ab").finish({"b": "decode_timeout"})
    workspace.run("ab", retry_rejects="decode_timeout").finish({} if recovered else {"b": "decode_timeout"})
    path = workspace.folder / "b.mp4"
    path.write_bytes(b"replaced..")
    touch(path)
    workspace.run("ab").finish()
    assert keys_of(workspace) == Counter("abb" if recovered else "ab")
    rows = 3 if recovered else 2
    assert totals(workspace.store) == Counts(rows, rows, 0, rows, rows, 0, 5 * rows)


def test_damage_that_a_retry_encoded_does_not_count_against_the_budget(workspace):
    workspace.run("abcdef").finish({"a": "decode_timeout", "b": "decode_timeout"})
    assert workspace.run("abcdef").work.before().damaged == 2
    workspace.run("abcdef", retry_rejects="decode_timeout").finish({"b": "decode_timeout"})
    assert workspace.run("abcdef").work.before() == Counts(samples=6, clips=5, damaged=1)
    assert workspace.run("ac").work.before().damaged == 0
    assert workspace.run("b").work.before().damaged == 1


# --- summaries --------------------------------------------------------------------------------------------------------


class Counting(LocalStore):
    reads = 0

    def read(self, key: str) -> bytes:
        self.reads += key.startswith("_receipts/")
        return super().read(key)


def test_a_cache_of_summaries_saves_reads_and_is_never_trusted_over_the_list(workspace, monkeypatch):
    monkeypatch.setattr("pipeline.ledger.summaries.MIN_UNCACHED_RECEIPTS", 1)
    workspace.run("abcdef", "storage.files_per_shard=1").finish()
    store = Counting(workspace.store.root)
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
    (cached,) = [info.key for info in store.list(CURRENT.summaries)]
    store.write(cached, b"damaged")
    assert len(Summaries(store).all()) == 6


def _receipt_like(store: LocalStore, key: str) -> bytes:
    return LocalStore.read(store, key)
