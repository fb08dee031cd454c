"""Any interleaving of builds over plain files, by hypothesis: after one clean run each input has its row once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.ledger.counted import counted_receipts
from pipeline.storage.local import LocalStore
from tests.pipeline.frameless_build import FINGERPRINT, Careless, NoConditions, Run, job_for, totals, touch, visible

NAMES = "abcd"
STORES = st.sampled_from([LocalStore, NoConditions, Careless])
starts = st.tuples(st.just("start"), st.sets(st.sampled_from(NAMES), min_size=2), st.integers(1, 3))
steps = st.tuples(st.just("step"), st.integers(0, 3))
one = st.sampled_from(NAMES)
moves = [
    starts,
    *[steps] * 4,
    st.tuples(st.just("kill"), st.integers(0, 3)),
    st.tuples(st.just("remove"), one),
    st.tuples(st.just("restore"), one),
    st.tuples(st.just("touch"), one),
    st.tuples(st.just("cut"), st.integers(0, 3)),
]
rejections = [
    *[st.tuples(st.just("finish"), st.integers(0, 3))] * 4,
    *[st.tuples(st.just("reject"), one)] * 2,
    *[st.tuples(st.just("retry"), st.integers(1, 3))] * 2,
    st.tuples(st.just("replace"), one),
    st.tuples(st.just("lose"), st.integers(0, 5)),
]


class Scenario:
    """Folder of inputs, an output, and concurrent builds."""

    def __init__(self, root: Path, kind: type[LocalStore]) -> None:
        self.folder, self.away, self.spool = root / "in", root / "away", root / "spool"
        for path in (self.folder, self.away, self.spool):
            path.mkdir()
        for name in NAMES:
            (self.folder / f"{name}.mp4").write_bytes(name.encode() * 10)
        self.store = kind(str(root / "out"))
        self.runs: list[Run] = []
        self.rejected: dict[str, str] = {}
        self.contents = 0

    def act(self, action: str, *values) -> None:
        getattr(self, action)(*values)

    def start(self, names, per_shard, **flags) -> None:
        paths = [str(self.folder / f"{name}.mp4") for name in sorted(names) if self._path(name).exists()]
        if paths:
            job = job_for(self.folder, f"storage.files_per_shard={per_shard}", **flags)
            self.runs.append(Run(self.store, paths, self.spool, job))

    def retry(self, per_shard) -> None:
        if counted_rejects(self.store):
            try:
                self.start(NAMES, per_shard, retry_rejects="decode_timeout")
            except ConfigError:  # of inputs that are not listed now
                return
            if self.runs:
                self.runs[-1].todo.sort(key=lambda shard: shard.retry is None)

    def step(self, n) -> None:
        if self.runs:
            self.runs[n % len(self.runs)].step(self.rejected)

    def finish(self, n) -> None:
        if self.runs:
            self.runs.pop(n % len(self.runs)).finish(self.rejected)

    def kill(self, n) -> None:
        if self.runs:
            self.runs.pop(n % len(self.runs))

    def cut(self, n) -> None:
        """A writer is killed while it writes its receipt, on a mount that shows half objects."""
        if self.runs and (todo := self.runs[n % len(self.runs)].todo):
            self.store.write(f"_receipts/{todo[0].id(FINGERPRINT)}.json", b'{"half')

    def lose(self, n) -> None:
        """A receipt is damaged after it was committed."""
        keys = [info.key for info in self.store.list("_receipts/")]
        if keys:
            self.store.write(keys[n % len(keys)], b'{"half')

    def remove(self, name) -> None:
        if self._path(name).exists():
            self._path(name).rename(self.away / f"{name}.mp4")

    def restore(self, name) -> None:
        if not self._path(name).exists():
            (self.away / f"{name}.mp4").rename(self._path(name))

    def touch(self, name) -> None:
        if self._path(name).exists():
            touch(self._path(name))

    def replace(self, name) -> None:
        if self._path(name).exists():
            self.contents += 1
            before = self._path(name).stat().st_mtime_ns
            self._path(name).write_bytes(f"{self.contents:010d}".encode())
            os.utime(self._path(name), ns=(before, before + 1_000_000_000))

    def reject(self, name) -> None:
        """Toggles whether this file is rejected."""
        if self.rejected.pop(name, None) is None:
            self.rejected[name] = "decode_timeout"

    def _path(self, name) -> Path:
        return self.folder / f"{name}.mp4"


@contextmanager
def scenario_after(kind, script):
    root = Path(tempfile.mkdtemp())
    try:
        scenario = Scenario(root, kind)
        for action in script:
            scenario.act(*action)
        for name in NAMES:
            scenario.restore(name)
        yield scenario
    finally:
        shutil.rmtree(root)


def doubled(rows) -> list[tuple[str, str]]:
    return [name for name, n in Counter((row.source_uri, row.source_hash) for row in rows).items() if n > 1]


@settings(max_examples=60, deadline=None)
@given(STORES, st.lists(starts, min_size=2, max_size=2), st.lists(st.one_of(*moves), max_size=20))
def test_one_clean_run_later_each_input_has_its_row_once(kind, first, script):
    with scenario_after(kind, [*first, *script]) as scenario:
        Run(scenario.store, [str(scenario.folder)], scenario.spool, job_for(scenario.folder)).finish()
        assert Counter(row.source_key for row in visible(scenario.store)) == Counter(NAMES)
        found = totals(scenario.store)
        assert (found.samples, found.encoded, found.rejected, found.clips, found.frames) == (4, 4, 0, 4, 20)
        assert Run(scenario.store, [str(scenario.folder)], scenario.spool, job_for(scenario.folder)).todo == []


@settings(max_examples=100, deadline=None)
@given(
    STORES,
    st.sets(one, min_size=1),
    st.lists(starts, min_size=1, max_size=2),
    st.lists(st.one_of(*moves, *rejections), max_size=20),
)
def test_rejects_that_are_retried_lose_and_double_nothing(kind, rejected, first, script):
    begun = [*(("reject", name) for name in sorted(rejected)), *first, ("finish", 0), ("reject", min(rejected))]
    with scenario_after(kind, [*begun, *script]) as scenario:
        assert not doubled(visible(scenario.store))
        Run(scenario.store, [str(scenario.folder)], scenario.spool, job_for(scenario.folder)).finish()
        if counted_rejects(scenario.store):
            job = job_for(scenario.folder, retry_rejects="decode_timeout")
            Run(scenario.store, [str(scenario.folder)], scenario.spool, job).finish()
        rows = visible(scenario.store)
        assert not doubled(rows)
        now = {
            (str(path), hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest())
            for path in scenario.folder.iterdir()
        }
        assert now <= {(row.source_uri, row.source_hash) for row in rows}
        found = totals(scenario.store)
        assert (found.samples, found.rejected, found.damaged) == (len(rows), 0, 0)
        assert (found.encoded, found.clips, found.clips_planned, found.clips_rejected) == (len(rows),) * 3 + (0,)


def counted_rejects(store):
    """Rejects that count."""
    return [reject for part in counted_receipts(store) for reject in part.receipt.rejects if part.reject_counts(reject)]
