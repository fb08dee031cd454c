"""A store that is away for seconds during a build on Ray actors: one row of `test_fault_table`, whose corpus and rows it uses."""

import pytest

from tests.engine.test_fault_table import Case, Trigger, assert_sound, bucket, clean, impatient  # noqa: F401 - fixtures
from tests.faulty_proxy import FaultyProxy
from tests.tiny_corpus import tiny_flags

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def test_outage_under_ray_fails_no_shard(bucket, clean, ray_cluster):  # noqa: F811
    case = Case("away", "upload", lasts_s=4.0)
    output = f"{bucket.root}/ray-{case}"
    with FaultyProxy(bucket.address) as proxy:
        trigger = Trigger(proxy, case)
        flags = [part for text in impatient(proxy) for part in ("--set", text)]
        joined = ["--executor", "ray", "--address", ray_cluster.address, "--set", "engine.decoder_cpus=0.5"]
        environment = {**ray_cluster.environment, **bucket.environment()}
        environment.pop("AWS_ENDPOINT_URL")
        ray_cluster.environment, before = environment, ray_cluster.environment
        try:
            run = ray_cluster.lathe("encode", f"{bucket.root}/in/", output, *tiny_flags(*joined, *flags))
        finally:
            ray_cluster.environment = before
    assert trigger.fired
    assert run.returncode == 0, run.stderr
    assert "3 of 3 shards encoded" in run.stdout
    assert_sound(output, clean)
