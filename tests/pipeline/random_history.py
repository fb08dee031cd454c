"""Random histories of an output: inputs change, rows are taken down, files are compacted and collected. What a snapshot shows is compared
with a model that knows inputs and takedowns only."""

from __future__ import annotations

import random
import re
from pathlib import Path

from pipeline.errors import LatheError, PublishFailed
from pipeline.ledger.receipts import Ledger
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import read_takedowns
from pipeline.operate.compact import CompactOptions, compact
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.publish_checks import Limits
from pipeline.operate.takedown import take_down, undo
from pipeline.operate.verify import verify_output
from tests.operate.outputs import aged, tar, write_version
from tests.pipeline.latent_clips import FINGERPRINT, local_store
from tests.pipeline.published import shown_ids

CLIPS = {"a": 3, "b": 2}
OPTIONS = PublishOptions(removed="drop", delta=False, limits=Limits(removed=1.0, reject_budget=1.0))
MOST_VERSIONS = 20
# Some alone, some in an order that is rare by chance.
PLANS = (
    "take",
    "undo",
    "compact",
    "gc",
    "replace",
    "back",
    "drop",
    "take compact undo compact",
    "drop gc gc back gc",
    "compact replace gc back",
)
DROPPED = re.compile(r"rows of shard (\w{32}) count again that `lathe compact` dropped")


def seeds(name: str, version: int) -> list[int]:
    return [10_000 * "ab".index(name) + 100 * version + clip for clip in range(CLIPS[name])]


def ids(name: str, version: int) -> set[str]:
    return {f"video{seed:05d}-0000" for seed in seeds(name, version)}


class RandomHistory:
    """An output of two tars. `a` changes; `b` stays, so that compacted files have rows of both."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self.store = local_store(folder / "out")
        Ledger(self.store).prepare("films")
        self._inputs = {"a": 1, "b": 1}  # version of each
        self._top = 1  # greatest version of `a`
        self._taken: list[tuple[str, set[str]]] = []  # record, ids that it hides
        self._attempts = 0
        self._planned: list[str] = []
        self.log: list[str] = []
        self.publish()

    def step(self) -> None:
        """The next operation of a random plan, with a publish where it changes rows. One that is not possible now is left out."""
        if not self._planned:
            self._planned = self._random.choice(PLANS).split()
        name = self._planned.pop(0)
        if (name in ("take", "replace", "drop") and "a" not in self._inputs) or (name == "undo" and not self._taken):
            return
        self.log.append(name)
        getattr(self, f"_{name}")()

    def publish(self) -> None:
        """Encodes what is not done, publishes, and compares. Where rows count again that are deleted, it does what the message says."""
        self._encode()
        listing = [tar(name, f"e{version}").objects[0] for name, version in sorted(self._inputs.items())]
        try:
            made = publish(self.store, OPTIONS, listing=listing).snapshot
        except PublishFailed as error:
            shards = DROPPED.findall(str(error))
            if not shards:
                raise
            for shard in shards:
                self.store.delete(Ledger(self.store).layout.receipt_key(shard))
            self._encode()
            made = publish(self.store, OPTIONS, listing=listing).snapshot
        hidden = set().union(*(names for _, names in self._taken))
        counting = set().union(*(ids(name, version) for name, version in self._inputs.items()))
        assert shown_ids(self.store, made) == sorted(counting - hidden), self.log
        assert verify_output(self.store, deep=False).problems == [], self.log

    def _encode(self) -> None:
        for name, version in self._inputs.items():
            shard = tar(name, f"e{version}")
            taken = read_takedowns(self.store).takes(shard.objects[0].uri)
            if not taken and Ledger(self.store).find(shard.id(FINGERPRINT)) is None:
                self._attempts += 1
                attempt = f"x{self._attempts}"
                write_version(self.store, self._folder, name, f"e{version}", seeds(name, version), attempt)

    def _take(self) -> None:
        row = self._random.choice(sorted(ids("a", self._inputs["a"])))
        uri = tar("a", "").objects[0].uri
        name, hidden = self._random.choice(
            [(row, {row})] * 3 + [(uri, {each for n in range(1, MOST_VERSIONS) for each in ids("a", n)})]
        )
        try:
            record = take_down(self.store, [name], reason="r", by="m")["record"]
        except LatheError:  # the row is taken down with its source, and not in the output
            return
        if record is not None:
            self._taken.append((record, hidden))
        self.publish()

    def _undo(self) -> None:
        try:
            undo(self.store, self._taken[-1][0], reason="r", by="m")
        except LatheError as error:
            if "cannot be undone" not in str(error):
                raise
            return
        self._taken.pop()
        self.publish()

    def _compact(self) -> None:
        before = shown_ids(self.store, Snapshots(self.store).latest())
        target = self._random.choice([1000, 512 << 20])
        compact(self.store, CompactOptions(target, only_takedowns=self._random.random() < 0.3, delta=False))
        assert shown_ids(self.store, Snapshots(self.store).latest()) == before, self.log

    def _gc(self) -> None:
        aged(self.store)
        before = {number: shown_ids(self.store, Snapshots(self.store).read(number)) for number in self._numbers()}
        collect(self.store, GcOptions(keep_snapshots=self._random.choice([1, 1, 2]), keep_days=0))
        left = {number: shown_ids(self.store, Snapshots(self.store).read(number)) for number in self._numbers()}
        assert left == {number: before[number] for number in left}, self.log

    def _numbers(self) -> list[int]:
        return Snapshots(self.store).numbers()

    def _replace(self) -> None:
        self._top += 1
        self._inputs["a"] = self._top
        self.publish()

    def _back(self) -> None:
        self._inputs["a"] = self._random.randint(1, self._top)
        self.publish()

    def _drop(self) -> None:
        del self._inputs["a"]
        self.publish()
