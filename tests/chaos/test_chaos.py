"""A short run of `make chaos` with a fixed seed, and tests of its checks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from pipeline.operate.open_work import RunningBuild
from tests.chaos import schedule
from tests.chaos.commands import Commands
from tests.chaos.corpus import UploadedCorpus, upload_corpus
from tests.chaos.faulting_proxy import FaultingProxy
from tests.chaos.lifecycle import Lifecycle
from tests.chaos.races import is_accepted, races
from tests.conftest import S3Server
from tests.moto_server import MotoServer
from tests.swift_server import free_ports

pytestmark = pytest.mark.s3
SEED = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UploadedCorpus]:
    """On moto, which starts at once."""
    moto = MotoServer(*free_ports(1))
    server = S3Server(moto.endpoint, "key", "secret")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield upload_corpus(server.with_fresh_bucket(), tmp_path_factory.mktemp("chaos"))
    moto.close()


def test_after_kills_and_storage_faults_every_reader_sees_the_rows_of_a_clean_run(corpus: UploadedCorpus) -> None:
    with FaultingProxy(corpus.server.address) as proxy, Commands(corpus, proxy.endpoint) as commands:
        *steps, _, publish = schedule.steps(SEED, 1)  # without the last build, to be short
        figures = Lifecycle(corpus, SEED).run([*steps, publish], proxy, commands)
    print(figures)
    assert figures.kills["driver"] >= 3, figures
    assert set(figures.faults) == set(schedule.FAULTS), figures


def test_schedules_depend_only_on_their_seed() -> None:
    def drawn(seed: int) -> tuple[object, ...]:
        faults = [schedule.fault(seed, step, request) for step in range(5) for request in range(99)]
        return schedule.steps(seed, 3), faults, list(itertools.islice(races(seed), 30))

    assert drawn(1) == drawn(1)
    for first, second in zip(drawn(1), drawn(2), strict=True):
        assert first != second


def test_a_race_may_end_in_a_refusal_because_of_the_other_command() -> None:
    for shards in (1, 2):
        assert is_accepted(1, f"not done: {RunningBuild('b', shards, 9.0)}; finish")
    assert is_accepted(0, "")
    for code, printed in ((1, "1 file is missing"), (5, "of the running build b"), (2, "was first"), (-9, "")):
        assert not is_accepted(code, printed)


def leave_behind(corpus: UploadedCorpus, leave: Callable[[Commands], object]) -> None:
    with Commands(corpus, corpus.server.endpoint) as commands:
        commands.limit_s = 0.0
        leave(commands)


def test_what_commands_leave_behind_is_detected(corpus: UploadedCorpus) -> None:
    with pytest.raises(AssertionError, match="lathe-publish-x"):
        leave_behind(corpus, lambda commands: (commands.temporary / "lathe-publish-x").mkdir())
    with pytest.raises(AssertionError, match=r"processes.*sleep"):
        leave_behind(corpus, lambda commands: os.posix_spawn("/bin/sleep", ["sleep", "600"], commands.environment))
