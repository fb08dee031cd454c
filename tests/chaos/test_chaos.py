"""A short run of `make chaos` with a fixed seed, and tests of its checks."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from tests.chaos import schedule
from tests.chaos.ground import Ground, Place, make_ground
from tests.chaos.life import Life
from tests.chaos.races import races
from tests.chaos.trap import Trap
from tests.conftest import S3Server
from tests.moto_server import MotoServer
from tests.swift_server import free_ports

pytestmark = pytest.mark.s3
SEED = 5


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """On moto, which starts at once."""
    moto = MotoServer(*free_ports(1))
    server = S3Server(moto.endpoint, "key", "secret")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield make_ground(server.with_fresh_bucket(), tmp_path_factory.mktemp("chaos"))
    moto.close()


def test_after_kills_and_storage_faults_every_reader_sees_the_rows_of_a_clean_run(ground: Ground) -> None:
    with Trap(ground.server.address) as trap, Place(ground, trap.endpoint) as place:
        *steps, _, publish = schedule.steps(SEED, 1)  # without the last build, to be short
        figures = Life(ground, SEED).run([*steps, publish], trap, place)
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


def leave_behind(ground: Ground, leave: Callable[[Place], object]) -> None:
    with Place(ground, ground.server.endpoint) as place:
        place.limit_s = 0.0
        leave(place)


def test_what_commands_leave_behind_is_detected(ground: Ground) -> None:
    with pytest.raises(AssertionError, match="lathe-publish-x"):
        leave_behind(ground, lambda place: (place.temporary / "lathe-publish-x").mkdir())
    with pytest.raises(AssertionError, match=r"processes.*sleep"):
        leave_behind(ground, lambda place: os.posix_spawn("/bin/sleep", ["sleep", "600"], place.environment))
