"""`make chaos`: rounds for `CHAOS_S` seconds (default: endless). `CHAOS_SEED` is the number of the first round.

A round depends only on its number: `CHAOS_SEED=n CHAOS_S=1 make chaos` repeats round n. It runs all commands on an output without Ray and
on a Ray cluster of three raylets, races of two commands, and builds at once on three kinds of stores. Figures come after each.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DEDUP_LOGS="0")  # before Ray is imported
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", AWS_EC2_METADATA_DISABLED="true")

from tests.chaos import nodes, schedule
from tests.chaos.builds import at_once
from tests.chaos.commands import Commands
from tests.chaos.corpus import UploadedCorpus, upload_corpus
from tests.chaos.faulting_proxy import FaultingProxy
from tests.chaos.lifecycle import Figures, Lifecycle
from tests.chaos.races import Race, RaceRunner, races
from tests.conftest import S3Server
from tests.moto_server import MotoServer
from tests.swift_server import SwiftServer, free_ports

KILLS = 3  # most killed starts of one command
RACES = 6  # in a round


class Rounds:
    """Servers, corpora and counts of the whole run."""

    def __init__(self, folder: Path, moto: S3Server, swift: S3Server) -> None:
        self.total, self.failed = Figures(), 0
        self._moto, self._swift = upload_corpus(moto, folder / "moto"), upload_corpus(swift, folder / "swift")
        self._races = RaceRunner(moto.with_fresh_bucket(), folder / "races")

    def round(self, seed: int) -> None:
        """One round. A part that fails is reported, and the others run all the same."""
        self._part(seed, "lifecycle", partial(self._lifecycle, seed))
        self._part(seed, "lifecycle on Ray", partial(self._ray, seed))
        for number, race in enumerate(itertools.islice(races(seed), RACES)):
            self._part(seed, f"race {number} {race}", partial(self._race, race))
        count = random.Random(seed).randint(2, 3)
        for name, corpus, ignored in (
            ("atomic conditional writes", self._moto, False),
            ("ignored conditions", self._moto, True),
            ("no conditional writes", self._swift, False),
        ):
            self._part(seed, f"{count} builds at once, {name}", partial(self._builds, corpus, count, ignored))

    def _part(self, seed: int, name: str, part: Callable[[], object]) -> None:
        try:
            print(f"round {seed}, {name}: ok  {part() or ''}", flush=True)
        except Exception:  # noqa: BLE001 - counted and shown; the next parts may find more
            self.failed += 1
            print(f"round {seed}, {name}: FAILED\n{traceback.format_exc()}", flush=True)

    def _lifecycle(self, seed: int) -> Figures:
        with FaultingProxy(self._moto.server.address) as proxy, Commands(self._moto, proxy.endpoint) as commands:
            found = Lifecycle(self._moto, seed).run(schedule.steps(seed, KILLS), proxy, commands)
        self.total.add(found)
        return found

    def _ray(self, seed: int) -> Figures:
        with FaultingProxy(self._moto.server.address) as proxy, Commands(self._moto, proxy.endpoint) as commands:
            with contextlib.closing(nodes.Nodes(commands)) as cluster:
                lifecycle = Lifecycle(
                    self._moto, seed, flags=cluster.flags, kill=cluster.kill, before_build=cluster.restore
                )
                found = lifecycle.run(schedule.steps(seed, KILLS, nodes.VICTIMS), proxy, commands)
        self.total.add(found)
        return found

    def _race(self, race: Race) -> str:
        server = self._races.corpus.server
        with FaultingProxy(server.address) as proxy, Commands(self._races.corpus, server.endpoint) as commands:
            return self._races.run(race, commands, proxy)

    def _builds(self, corpus: UploadedCorpus, count: int, ignored: bool) -> None:
        """`ignored`: the store does not look at conditions of writes."""
        with FaultingProxy(corpus.server.address) as proxy, Commands(corpus, proxy.endpoint) as commands:
            if ignored:
                proxy.turn_on("lie")
            at_once(corpus, commands, count)


def main() -> int:
    """Returns exit code 1 if anything failed."""
    ends = time.monotonic() + float(os.environ.get("CHAOS_S") or math.inf)
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 31))
    with tempfile.TemporaryDirectory(prefix="lathe-chaos-", dir="/tmp") as folder, contextlib.ExitStack() as servers:
        (Path(folder) / "server").mkdir()
        swift = SwiftServer(Path(folder) / "server")
        servers.callback(swift.stop)
        given = S3Server(swift.endpoint, swift.access_key, swift.secret_key)
        os.environ.update(given.environment())
        moto = servers.enter_context(contextlib.closing(MotoServer(*free_ports(1))))
        mocked = S3Server(moto.endpoint, swift.access_key, swift.secret_key)
        rounds = Rounds(Path(folder), mocked.with_fresh_bucket(), given.with_fresh_bucket())
        for number in itertools.count(seed):
            rounds.round(number)
            if time.monotonic() > ends:
                break
    print(f"{rounds.failed} parts failed; repeat a round by CHAOS_SEED=ROUND CHAOS_S=1 make chaos. {rounds.total}")
    return 1 if rounds.failed else 0


if __name__ == "__main__":
    sys.exit(main())
