"""A training run by Ray Train: two processes give the weights of one, also when one is killed."""

from __future__ import annotations

import os

import pytest

from tests.tiny_training import learn_here, lines, train, write_job

# A private Ray: Ray Train leaves an actor behind that delays the end of a shared one by half a minute.
pytestmark = pytest.mark.ray
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
ENVIRONMENT["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"


def test_two_workers_one_killed_give_the_weights_of_one_process(tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    data = {"synthetic": {"seed": 0}}
    learn_here(write_job(alone / "job.yaml", data=data))
    drill = {"point": "in_training", "marker_dir": str(tmp_path / "markers")}
    path = write_job(shared / "job.yaml", data=data, workers=2, worker_cpus=0.5, drill=drill)
    two = train(path, environment=ENVIRONMENT)
    assert two.returncode == 0, two.stderr
    assert os.listdir(tmp_path / "markers") == ["in_training-0"], "the first worker died at step 6"
    assert "lathe: step 12/12, loss " in two.stderr
    assert f"weights: {shared / 'run' / 'weights'}" in two.stdout
    assert [line["step"] for line in lines(shared / "run")] == [6, 12]
    for here, there in zip(lines(alone / "run"), lines(shared / "run"), strict=True):
        assert there == pytest.approx(here, rel=1e-3)
    assert not (shared / "run" / "ray").exists(), "Ray Train's own state is deleted"
