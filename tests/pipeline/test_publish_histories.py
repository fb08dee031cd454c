"""Any history of encodes, replacements, removals, takedowns and publishes: each snapshot shows what receipts and takedowns say."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.records import Receipt, SourceObject
from tests.pipeline.frameless_build import make_workspace, visible
from tests.pipeline.published import expected_ids, listed, newest_contents, publish_all, shown_ids

NAMES = "abcd"
FINGERPRINTS = ("f" * 32, "e" * 32)
ALL = Limits(removed=1.0)
ENCODE = st.tuples(
    st.just("encode"),
    st.sets(st.sampled_from(NAMES), min_size=1),
    st.sets(st.sampled_from(NAMES), max_size=1),
    st.sampled_from((*FINGERPRINTS, FINGERPRINTS[0])),
)
PUBLISH = st.tuples(
    st.just("publish"), st.sampled_from(["blind", "keep", "drop"]), st.sampled_from([None, None, "f", "ee"])
)
STEPS = st.one_of(
    ENCODE,
    ENCODE,
    st.tuples(st.just("replace"), st.sampled_from(NAMES), st.integers(0, 2)),
    st.tuples(st.just("touch"), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("retry"), st.sampled_from(FINGERPRINTS)),
    st.tuples(st.just("take down"), st.sampled_from(NAMES)),
    st.tuples(st.just("take down a row"), st.integers(0, 20)),
    PUBLISH,
    PUBLISH,
)
Contents = dict[str, dict[str, str | None]]
"""By fingerprint and URI: digest of the bytes that count; None: the input is dropped."""


class History:
    """A real output, and beside it what each of its snapshots should show."""

    def __init__(self, folder: Path) -> None:
        self.workspace = make_workspace(folder)
        self.store = self.workspace.store
        Ledger(self.store).prepare("films")
        self.clock = 0
        self.decided: Contents = {}  # as of the last snapshot of a fingerprint
        self.named: dict[str, set[tuple[str, str]]] = {}  # (shard, uri) of receipts when that was made, by fingerprint
        self.contents: dict[int, Contents] = {}  # by snapshot
        self.ids: dict[int, set[str]] = {}  # rows that were not taken down when a snapshot was made

    def path(self, name: str) -> Path:
        return self.workspace.folder / f"{name}.mp4"

    def write(self, name: str, data: bytes) -> None:
        self.clock += 1
        self.path(name).write_bytes(data)
        os.utime(self.path(name), ns=(self.clock * 10**9, self.clock * 10**9))

    def encode(self, names: set[str], damaged: set[str], fingerprint: str = FINGERPRINTS[0]) -> None:
        there = [name for name in sorted(names) if self.path(name).exists()]
        if there:
            run = self.workspace.run("".join(there), fingerprint=fingerprint)
            run.finish(dict.fromkeys(damaged, "too_short"))

    def retry(self, fingerprint: str) -> None:
        if there := [name for name in NAMES if self.path(name).exists()]:
            self.workspace.run("".join(there), fingerprint=fingerprint, retry_rejects="too_short").finish()

    def take_down_row(self, number: int) -> None:
        if rows := visible(self.store):
            record_takedown(self.store, "asked", ids=[rows[number % len(rows)].id])

    def publish(self, how: str, prefix: str | None = None) -> None:
        receipts = [item for item in Ledger(self.store).all() if item.fingerprint.startswith(prefix or "")]
        if not receipts:
            return
        listing = None if how == "blind" else listed(self.workspace)
        removed = "drop" if how == "drop" else "keep"
        options = PublishOptions(prefix, removed=removed, partial=True, limits=ALL, delta=False)
        found = publish(self.store, options, listing=listing).snapshot
        contents = {
            fingerprint: self.decide(fingerprint, receipts, listing, how)
            for fingerprint in {item.fingerprint for item in receipts}
        }
        self.decided.update(contents)
        self.contents[found.number] = contents
        self.ids.setdefault(found.number, {row.id for row in visible(self.store)})

    def decide(
        self, fingerprint: str, receipts: list[Receipt], listing: list[SourceObject] | None, how: str
    ) -> dict[str, str | None]:
        mine = [item for item in receipts if item.fingerprint == fingerprint]
        by_shard = {item.shard_id: item for item in mine}
        first_tries = [item for item in mine if item.shard.retry is None]
        names = {(item.shard_id, source.uri) for item in first_tries for source in item.shard.objects}
        renewed = {uri for _, uri in names - self.named.get(fingerprint, set())}
        self.named[fingerprint] = names
        newest, decided = newest_contents(self.store, fingerprint), self.decided.get(fingerprint, {})
        contents: dict[str, str | None] = {
            uri: newest[uri] if uri in renewed or uri not in decided else decided[uri] for uri in newest
        }
        if listing is None:
            return contents
        # A version that is listed counts if any receipt is about it.
        versions = {(source.uri, source.etag): item for item in first_tries for source in item.shard.objects}
        here = {source.uri: source for source in listing}
        for uri in contents:
            if uri not in here:
                contents[uri] = None if how == "drop" else contents[uri]
            elif (receipt := versions.get((uri, here[uri].etag))) is not None:
                while receipt.same_as:
                    receipt = by_shard[receipt.same_as[uri]]
                contents[uri] = receipt.digests[uri]
        return contents

    def check(self) -> None:
        for number in Snapshots(self.store).numbers():
            snapshot = Snapshots(self.store).read(number)
            assert snapshot.counts["samples"] == snapshot.counts["encoded"] + snapshot.counts["rejected"]
            assert sum(snapshot.rejects.values()) == snapshot.counts["rejected"], "each rejected sample has one reject"
            counted = (snapshot.videos.get(name, {}) for name in ("encoded", "rejected", "refused"))
            sums = [sum(n for step, n in videos.items() if step in ("px720", "px480", "v9")) for videos in counted]
            rejected = snapshot.counts["rejected"]
            assert sums == [snapshot.counts["encoded"], rejected, rejected], "each video has one length and size"
            assert set(shown_ids(self.store, snapshot)) == set(self.rows_then(number)), number
            values = sum(item.stats.n for item in snapshot.fingerprints.values() if item.stats is not None)
            assert values == snapshot.counts["rows"], "each latent has one value"
            before = {} if snapshot.parent is None else self.contents[snapshot.parent]
            grown = sum(
                counting(found) - counting(before.get(name, {})) for name, found in self.contents[number].items()
            )
            assert grown == snapshot.changes["inputs_added"] - snapshot.changes["inputs_removed"]

    def rows_then(self, number: int) -> list[str]:
        """Rows of the contents that counted in a snapshot, of the receipts there were, without all takedowns there are now."""
        return [row for row in expected_ids(self.store, self.contents[number]) if row in self.ids[number]]


def counting(contents: dict[str, str | None]) -> int:
    return sum(digest is not None for digest in contents.values())


def run(history: History, steps: list[tuple]) -> None:
    for kind, *rest in steps:
        if kind == "encode":
            history.encode(*rest)
        elif kind == "replace":
            history.write(rest[0], f"{rest[0]}{rest[1]}".encode() * 5)
        elif kind == "touch" and history.path(rest[0]).exists():
            history.write(rest[0], history.path(rest[0]).read_bytes())
        elif kind == "remove":
            history.path(rest[0]).unlink(missing_ok=True)
        elif kind == "retry":
            history.retry(*rest)
        elif kind == "take down":
            record_takedown(history.store, "asked", sources=[str(history.path(rest[0]))])
        elif kind == "take down a row":
            history.take_down_row(*rest)
        elif kind == "publish":
            history.publish(*rest)
    history.check()


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEPS, min_size=8, max_size=16))
def test_every_snapshot_of_any_history_shows_what_receipts_and_takedowns_say(steps: list[tuple]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(History(Path(folder)), [*steps, ("publish", "blind")])


def test_a_reverted_input_counts_again_when_it_is_listed() -> None:
    """v1, v2, v1 with its old etag: no receipt shows that, only the listing does. The next publish without a listing keeps it."""
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder))
        history.write("a", b"one")
        history.encode({"a"}, set())
        stat = history.path("a").stat()
        history.write("a", b"two")
        history.encode({"a"}, set())
        first = publish_all(history.store)
        history.path("a").write_bytes(b"one")
        os.utime(history.path("a"), ns=(stat.st_mtime_ns, stat.st_mtime_ns))
        second = publish_all(history.store, listing=listed(history.workspace), partial=True)
        digests = [hashlib.blake2b(data, digest_size=16).hexdigest() for data in (b"one", b"two")]
        contents = [{FINGERPRINTS[0]: {str(history.path("a")): digest}} for digest in digests]
        ids = [expected_ids(history.store, each) for each in contents]
        assert [shown_ids(history.store, snapshot) for snapshot in (first, second)] == [ids[1], ids[0]]
        assert second.changes["inputs_replaced"] == 1
        history.encode({"b"}, set())
        third = publish_all(history.store)
        assert set(ids[0]) < set(shown_ids(history.store, third))
        assert not set(ids[1]) & set(shown_ids(history.store, third))


def test_a_dropped_input_counts_again_once_a_newer_receipt_names_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder))
        for name in "ab":
            history.write(name, name.encode())
        history.encode({"a", "b"}, set())
        history.path("a").unlink()
        dropped = publish_all(history.store, listing=listed(history.workspace), removed="drop", partial=True)
        assert (dropped.changes["inputs_removed"], dropped.counts["rows"]) == (
            0,
            1,
        )  # nothing was published of it before
        history.write("a", b"again")
        history.encode({"a"}, set())
        again = publish_all(history.store)
        assert shown_ids(history.store, again) == expected_ids(
            history.store, {FINGERPRINTS[0]: newest_contents(history.store, FINGERPRINTS[0])}
        )
        assert again.counts["rows"] == 2
