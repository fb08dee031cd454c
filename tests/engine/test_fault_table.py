"""Table of store failures: kind, moment of the build, and how the build ends. Rows equal those of a clean run. Ray: `test_ray_outage`.

A relay runs between the build and the real S3 server. A failure begins with the first request of its moment. Requests are retried for one
second only, so that an outage of some seconds ends attempts and the driver must wait for its end.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.errors import ShardsFailed
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests.engine.test_inline import assert_same_rows
from tests.faulty_proxy import FaultyProxy
from tests.tiny_corpus import make_corpus, rows, tiny_job

pytestmark = pytest.mark.s3

MOMENTS = {
    "fetch": ("GET", "/in/"),
    "upload": ("PUT", "/data/"),
    "commit": ("PUT", "/_receipts/"),
    "read_back": ("GET", "/_receipts/"),
}


@dataclass(frozen=True)
class Case:
    """`lasts_s`: the fault is turned off after so long; None: it ends by itself, or stays."""

    fault: str
    moment: str
    options: dict[str, Any] = field(default_factory=dict)
    lasts_s: float | None = None

    def __str__(self) -> str:
        return f"{self.fault}-{self.moment}"


SURVIVED = [
    *(Case("away", moment, lasts_s=4.0) for moment in ("fetch", "commit")),
    *(Case("throttle", moment, {"times": 12}) for moment in ("fetch", "upload")),
    *(Case("throttle", moment, {"code": "InternalError", "status": 500, "times": 3}) for moment in ("read_back",)),
    *(Case("lose_answer", moment, {"methods": "PUT", "times": 2}) for moment in ("upload", "commit")),
    Case("cut", "fetch", {"after_bytes": 700, "methods": "GET", "times": 3}),
    Case("stall", "fetch", {"after_bytes": 700, "methods": "GET", "times": 1}),
    Case("slow", "fetch", {"latency_s": 0.05, "bytes_per_s": 400e3}),
    Case("lie", "fetch"),
]
REFUSED = Case("refuse", "fetch", {"keys": r"in/000001\.tar$", "code": "InvalidObjectState"})


class Trigger:
    """Rule of a relay that breaks nothing itself: it turns the fault on when the moment comes."""

    def __init__(self, proxy: FaultyProxy, case: Case) -> None:
        self.proxy, self.case = proxy, case
        self.fired = False
        proxy.rule = self

    def __call__(self, method: str, target: str, before: int) -> None:
        wanted, part = MOMENTS[self.case.moment]
        if self.fired or method != wanted or part not in target:
            return
        self.fired = True
        # In a thread: the relay asks its rule under a lock that turning on takes too.
        threading.Thread(target=self._turn_on).start()

    def _turn_on(self) -> None:
        self.proxy.turn_on(self.case.fault, **self.case.options)
        if self.case.lasts_s is not None:
            threading.Timer(self.case.lasts_s, self.proxy.turn_off, (self.case.fault,)).start()


@pytest.fixture(scope="module")
def bucket(s3_server, tmp_path_factory):
    """A bucket with three tars below `in/`."""
    made = s3_server.with_fresh_bucket()
    store = open_store(made.root, StorageConfig())
    for path in make_corpus(tmp_path_factory.mktemp("corpus"), shards=3, samples=3).iterdir():
        store.upload(path, f"in/{path.name}")
    return made


@pytest.fixture(scope="module")
def clean(bucket):
    pipeline.encode(tiny_job(f"{bucket.root}/in/", f"{bucket.root}/clean"))
    return rows(f"{bucket.root}/clean")


def impatient(proxy):
    return [
        f"storage.endpoint_url={proxy.endpoint}",
        "storage.patience_s=2",
        "storage.read_timeout_s=4",
        "engine.credit=1",
    ]


def assert_sound(output, clean):
    assert_same_rows(clean, rows(output))
    report = verify_output(open_store(output, StorageConfig()))
    assert report.ok, report.problems


@pytest.mark.parametrize("case", SURVIVED, ids=str)
def test_temporary_store_failure_fails_no_shard(bucket, clean, case):
    output = f"{bucket.root}/inline-{case}"
    with FaultyProxy(bucket.address) as proxy:
        trigger = Trigger(proxy, case)
        report = pipeline.encode(tiny_job(f"{bucket.root}/in/", output, *impatient(proxy)))
    assert trigger.fired
    assert report.ok
    assert (report.shards_done, report.counts.samples) == (3, 9)
    assert_sound(output, clean)


def test_refused_object_fails_its_shard_until_it_can_be_read(bucket, clean):
    output = f"{bucket.root}/inline-{REFUSED}"
    with FaultyProxy(bucket.address) as proxy:
        Trigger(proxy, REFUSED)._turn_on()
        with pytest.raises(ShardsFailed, match=r"1 of 3 shards failed; .*000001\.tar.*restore") as caught:
            pipeline.encode(tiny_job(f"{bucket.root}/in/", output, *impatient(proxy)))
        assert caught.value.report.shards_done == 2
        proxy.turn_off("refuse")
        assert pipeline.encode(tiny_job(f"{bucket.root}/in/", output, *impatient(proxy))).shards_done == 1
    assert_sound(output, clean)
