"""Two commands on one output at once: one is held at a request while the other runs to its end, then goes on.

The output has everything to do: inputs that were replaced, receipts without a snapshot, a takedown, a tar that is not encoded, small files.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from moto.s3.models import s3_backends

import pipeline
from pipeline.operate.compact import compact
from pipeline.operate.gc import GcOptions, collect
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.takedown import take_down
from pipeline.storage import open_store
from tests.chaos.checks import assert_published, assert_readers_see, published
from tests.chaos.commands import Commands
from tests.chaos.corpus import encode_arguments, upload_corpus
from tests.chaos.faulting_proxy import FaultingProxy
from tests.tiny_corpus import tiny_job, video_bytes, write_tar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import S3Server

COMMANDS = ("encode", "publish", "nightly", "takedown", "compact", "gc")
PAIRS = (
    *(("nightly", "nightly"), ("nightly", "publish"), ("publish", "nightly"), ("publish", "publish")),
    *(("gc", "publish"), ("publish", "gc"), ("compact", "publish"), ("publish", "compact")),
    *(("encode", "encode"), ("encode", "gc"), ("gc", "encode"), ("encode", "publish"), ("publish", "encode")),
    *(("compact", "gc"), ("gc", "compact"), ("takedown", "publish"), ("publish", "takedown")),
    *(("takedown", "compact"), ("compact", "takedown"), ("takedown", "gc"), ("gc", "takedown")),
    *(("nightly", "gc"), ("gc", "nightly"), ("nightly", "compact"), ("compact", "nightly")),
)
"""Held command, command that runs meanwhile."""
REQUESTS = {"encode": 60, "publish": 60, "nightly": 90, "takedown": 60, "compact": 100, "gc": 130}
GC = GcOptions(grace_s=3600.0, keep_snapshots=1, keep_days=0, forget=True)
REFUSALS: dict[int, tuple[str, ...]] = {
    1: ("was first", "of the running build"),  # publishers
    5: ("holds the lease",),  # nights
}
"""What a command says that ended with this exit code because of the other one."""


def is_accepted(code: int, printed: str) -> bool:
    """Whether a command of a race may end so: it is done, or was refused because of the other one."""
    return code == 0 or any(text in printed for text in REFUSALS.get(code, ()))


@dataclass(frozen=True)
class Race:
    """`held` waits at its request number `at` until `other` has ended."""

    held: str
    other: str
    at: int


def races(seed: int) -> Iterator[Race]:
    """Endless; a pure function of the seed. Every pair comes once before one comes again."""
    rng = random.Random(f"races {seed}")
    while True:
        for held, other in rng.sample(PAIRS, len(PAIRS)):
            yield Race(held, other, rng.randint(1, rng.choice((REQUESTS[held], REQUESTS[held] // 3))))


class RaceRunner:
    """An output with work for every command, of which each race gets a copy."""

    def __init__(self, server: S3Server, folder: Path) -> None:
        self._folder = folder
        self.corpus = upload_corpus(server, folder)
        self._template = self.corpus.output()
        inputs = open_store(self.corpus.inputs, server.config())
        store = self.corpus.store(self._template)
        self._encode(self._template)
        publish(store, PublishOptions())
        inputs.write("film1.mp4", video_bytes(17, seed=71))
        self._encode(self._template)
        publish(store, PublishOptions())
        inputs.write("film0.mp4", video_bytes(13, seed=72))
        self._encode(self._template)
        take_down(store, ["000000"], reason="asked to", by="")
        more = {"009000": {"mp4": video_bytes(9, seed=73), "txt": b"x"}, "009001": {"mp4": video_bytes(3)}}
        inputs.upload(write_tar(folder / "more.tar", more), "000009.tar")
        clean = self.corpus.output()
        self._encode(clean)
        store = self.corpus.store(clean)
        publish(store, PublishOptions(delta=False))
        rows = published(store)
        self.corpus = replace(self.corpus, clean=rows)
        self._job = folder / "job.yaml"

    def _encode(self, output: str) -> None:
        pipeline.encode(tiny_job(self.corpus.inputs, output, **{"storage.endpoint_url": self.corpus.server.endpoint}))

    def copy(self) -> str:
        """URI of a copy of the output whose objects are older than the grace time of `GC`."""
        bucket = self.corpus.server.bucket
        output = f"{self.corpus.server.root}/race-{uuid.uuid4().hex[:8]}"
        source, target = self.corpus.store(self._template), self.corpus.store(output)
        for key in list(source.keys()):
            target.write(key, source.read(key))
        prefix = output.removeprefix(f"{self.corpus.server.root}/")
        for name, key in s3_backends["123456789012"]["aws"].buckets[bucket].keys.items():
            if name.startswith(f"{prefix}/"):
                key.last_modified -= timedelta(seconds=2 * GC.grace_s)
        return output

    def arguments(self, command: str, output: str) -> list[str]:
        """Of one command on the output."""
        if command == "encode":
            return encode_arguments(self.corpus, output)
        if command == "nightly":
            job = tiny_job(self.corpus.inputs, output, **{"nightly.canary": 0})
            path = self._folder / f"{output.rpartition('/')[2]}.yaml"
            path.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True)))
            return ["nightly", str(path)]
        return {
            "publish": ["publish", output, "--canary", "0"],
            "takedown": ["takedown", output, "001000", "--reason", "asked to"],
            "compact": ["compact", output],
            "gc": [
                "gc",
                output,
                "--grace",
                "60m",
                "--keep-snapshots",
                "1",
                "--keep-days",
                "0",
                "--forget",
            ],
        }[command]

    def run(self, race: Race, commands: Commands, proxy: FaultingProxy) -> str:
        """How both ended. Requests of the held command go through `proxy`, those of the other do not.

        Raises:
            AssertionError: one ended in an error other than being second, a reader sees something else than it should, or what is
                left cannot be finished.
        """
        output = self.copy()
        ended: dict[str, int] = {}

        def meanwhile() -> bool:
            ended["other"] = commands.start(*self.arguments(race.other, output)).wait()
            self._check_whole(output)
            return True

        proxy.begin(actions={race.at: meanwhile})
        held = commands.start(*self.arguments(race.held, output), endpoint=proxy.endpoint)
        ended["held"] = held.wait()
        proxy.end()
        if "other" not in ended:
            meanwhile()
        printed = commands.printed()
        assert all(is_accepted(code, printed) for code in ended.values()), f"{race}: {ended}\n{printed[-4000:]}"
        self._check_whole(output)
        self._finish(race, output)
        return f"held {ended['held']}, other {ended['other']}"

    def _check_whole(self, output: str) -> None:
        """The newest snapshot, whichever it is, is whole."""
        published(self.corpus.store(output))

    def _finish(self, race: Race, output: str) -> None:
        """After a build and a publication, and again after a compaction and a gc: exactly the rows of a clean run."""
        gone = {"000000", "001000"} if "takedown" in (race.held, race.other) else {"000000"}
        expected = {name: row for name, row in self.corpus.clean.items() if row["source_key"] not in gone}
        store = self.corpus.store(output)
        self._encode(output)
        publish(store, PublishOptions())
        assert_published(store, expected)
        assert_readers_see(self.corpus, output, expected)
        compact(store)
        collect(store, GC)
        assert_published(store, expected)
        assert_readers_see(self.corpus, output, expected)
