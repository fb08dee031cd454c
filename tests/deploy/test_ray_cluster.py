"""`ray_cluster.yaml` against Ray's validator, botocore's model of an EC2 request, and the resources of our actors."""

import copy
import json
import re
import subprocess
import sys
from itertools import pairwise

import botocore.session
import pytest
from botocore.validate import ParamValidator

from pipeline.config import EngineConfig
from tests.deploy.manifests import DEPLOY, PROJECT, ROOT, job_of, load

CONFIG = load(ROOT / "ray_cluster.yaml")
TYPES = CONFIG["available_node_types"]
VALIDATE = """
import json, sys
from ray.autoscaler._private.util import prepare_config, validate_config
for config in json.load(sys.stdin):
    prepared = prepare_config(config)
    try:
        validate_config(prepared)
    except Exception as error:
        print("refused:", str(error).splitlines()[0])
    else:
        print("valid", json.dumps([prepared[key] for key in ("setup_commands", "head_setup_commands", "worker_setup_commands")]))
"""


def validate(folder, *configs):
    # In a folder of its own: modules of the working folder come before the standard library's in a child.
    child = subprocess.run(
        [sys.executable, "-c", VALIDATE],
        input=json.dumps(configs),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr
    return [line for line in child.stdout.splitlines() if line.startswith(("valid", "refused"))]


def test_ray_accepts_the_file_and_refuses_a_misspelt_key(tmp_path):
    unknown_key, fractional, extra = (copy.deepcopy(CONFIG) for _ in range(3))
    unknown_key["available_node_types"]["gpu_spot"]["max_worker"] = 1
    fractional["available_node_types"]["gpu_spot"]["resources"]["GPU"] = 0.5
    extra["idle_timeout"] = 5
    ours, *broken = validate(tmp_path, CONFIG, unknown_key, fractional, extra)
    # Nothing is installed on the machines: Ray would fill in its own commands where these are absent.
    assert ours == "valid [[], [], []]"
    assert [line.split(":")[0] for line in broken] == ["refused"] * 3


@pytest.mark.parametrize("name", TYPES)
def test_ec2_knows_every_field_of_a_machine(name):
    # Ray leaves node_config unchecked; a typo there shows only when the first machine starts.
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    request = {**TYPES[name]["node_config"], "MinCount": 1, "MaxCount": 1}
    unknown = set(request) - set(shape.members)
    assert not unknown
    assert not ParamValidator().validate(request, shape).has_errors()
    for field, value in request.items():
        members = getattr(shape.members[field], "members", None)
        if isinstance(value, dict) and members is not None:
            assert set(value) <= set(members), field


def test_the_head_takes_no_actor_and_is_not_spot():
    head = TYPES[CONFIG["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_are_spot_and_the_counts_add_up():
    workers = {name: kind for name, kind in TYPES.items() if name != CONFIG["head_node_type"]}
    assert {name for name in workers if "GPU" in workers[name]["resources"]} == {"gpu_spot"}
    for kind in workers.values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert sum(kind["max_workers"] for kind in workers.values()) == CONFIG["max_workers"]
    assert CONFIG["provider"]["cache_stopped_nodes"] is False


def test_actors_fit_on_the_nodes(monkeypatch):
    job = job_of(_submitted_job(), monkeypatch)
    gpu, decode = TYPES["gpu_spot"], TYPES["decode_spot"]
    assert job.model.device == "cuda"
    assert job.engine.encoders == gpu["max_workers"] * gpu["resources"]["GPU"]
    asked = job.engine.encoder_cpus + job.engine.decoders * job.engine.decoder_cpus
    assert asked <= gpu["resources"]["CPU"], "an encoder's decoders do not fit beside it"
    assert EngineConfig().decoder_cpus <= decode["resources"]["CPU"]
    # "23 more for each of 32 encoders", and the 52 of "Starved GPUs"
    more = decode["max_workers"] * decode["resources"]["CPU"] // gpu["max_workers"]
    assert more == 23
    assert job.engine.decoders + more == 52
    assert "52 per encoder" in (DEPLOY / "README.md").read_text()


def test_no_secret_is_in_the_file():
    text = (ROOT / "ray_cluster.yaml").read_text().lower()
    for word in ("aws_access_key", "aws_secret", "akia", "password", "ssh_private_key"):
        assert word not in text
    assert "RAY_AUTH_MODE=token" in " ".join(CONFIG["head_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in " ".join(CONFIG["worker_start_ray_commands"])
    assert CONFIG["file_mounts"] == {"/home/lathe/.ray/auth_token": "~/.ray/auth_token"}
    assert "--dashboard-host=127.0.0.1" in " ".join(CONFIG["head_start_ray_commands"])


def test_the_image_is_this_version():
    assert CONFIG["docker"]["image"].rsplit(":", 1)[1] == PROJECT["version"]


def test_every_number_has_a_comment():
    lines = (ROOT / "ray_cluster.yaml").read_text().splitlines()
    numbers = [(above, line) for above, line in pairwise(lines) if re.search(r": \d+(\.\d+)?\s*(#|$)", line)]
    assert len(numbers) >= 7
    bare = [line.strip() for above, line in numbers if " # " not in line and not above.strip().startswith("#")]
    assert not bare


def _submitted_job():
    """The `ray job submit` of the virtual-machine chapter."""
    chapter = (DEPLOY / "README.md").read_text().split("## Virtual machines")[1].split("\n## ")[0]
    block = next(part for part in chapter.split("```bash") if "ray job submit" in part).split("```")[0]
    return block.replace("\\\n", " ").split(" -- ")[1]
