"""`lathe embed` on Ray: an actor that is killed is replaced and its unit runs again; what would repeat ends the run."""

import json

import pytest
from ray.exceptions import ActorDiedError

from pipeline.engine.ray.task_pool import TRIES, _check_again
from pipeline.errors import BuildError, ConfigError, StorageUnavailable
from pipeline.sidecars.reading import SidecarReader
from pipeline.sidecars.receipts import SidecarReceipts
from tests.loader.outputs import SHORT, clip_of, write_output
from tests.sidecars.encoders import save_t5

CAPTIONS = ["a cat runs", "a dog", "the red dog", "a cat runs", None]


@pytest.mark.ray
def test_an_actor_killed_by_signal_9_costs_no_text_and_doubles_none(ray_cluster, tmp_path):
    folder = save_t5(tmp_path / "t5")
    clips = [clip_of(seed, SHORT, caption=caption) for seed, caption in enumerate(CAPTIONS)]
    output = write_output(tmp_path / "out", tmp_path / "spool", [clips])
    command = ["embed", output.uri, "--encoder", "t5", "--checkpoint", folder, "--device", "cpu", "--json"]
    command += ["--address", ray_cluster.address, "--set", "unit_rows=1", "--set", "encoder_cpus=0.5"]
    command += ["--set", "drill.point=before_read_back", "--set", f"drill.marker_dir={tmp_path / 'marks'}"]
    done = ray_cluster.lathe(*command)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "marks").iterdir()] == ["before_read_back-0"]
    report = json.loads(done.stdout)
    # The receipt was there when the actor died: the second attempt finds it, and it counts as another's.
    assert (report["encoded"], report["by_others"], report["needed"]) == (3, 1, 4)
    receipts = SidecarReceipts(output.store, "t5").all()
    assert len(SidecarReader(output.store, "t5")) == sum(one.rows for one in receipts) == 4


def test_what_may_pass_is_tried_again_and_what_would_repeat_is_raised():
    for error in (ActorDiedError(), StorageUnavailable("away")):
        _check_again(error, TRIES - 2)
    with pytest.raises(BuildError, match=f"a task lost its process {TRIES} times"):
        _check_again(ActorDiedError(), TRIES - 1)
    with pytest.raises(StorageUnavailable, match="away"):
        _check_again(StorageUnavailable("away"), TRIES - 1)
    with pytest.raises(ConfigError, match="layer"):
        _check_again(ConfigError("layer: expected"), 0)
    with pytest.raises(BuildError, match="a worker failed: ValueError: odd"):
        _check_again(ValueError("odd"), 0)
