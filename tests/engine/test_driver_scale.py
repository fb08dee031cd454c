"""Cost of the driver at the size of a cluster, by counts: bytes a shard, work a receipt. `benchmarks/scale.py` has times."""

from __future__ import annotations

import inspect
import tracemalloc
from collections import Counter

import pytest

from benchmarks.scale import instant_actor
from benchmarks.simulated_workers import SimulatedPool, clock_of
from pipeline.config import EncodeJob
from pipeline.engine.driver.coverage import find_work
from pipeline.engine.driver.dispatch import Dispatcher
from pipeline.ledger.summary import DAMAGED, UNKNOWN_CONTENT, ReceiptSummary, source_id, uri_id
from pipeline.records import Shard, SourceObject
from tests.engine.scripted_pool import ProbedStore, make_build
from tests.test_architecture import modules_after

FINGERPRINT = "f" * 32
GROUP = 64


def groups(count: int) -> list[Shard]:
    """Groups of plain files."""
    return [
        Shard("files", f"g{n}", tuple(SourceObject(f"in/{n}-{m}.mp4", 1, "e") for m in range(GROUP)))
        for n in range(count)
    ]


def summary_of(shard: Shard) -> ReceiptSummary:
    """The receipt of a group whose first file is damaged."""
    return ReceiptSummary(
        key=f"_receipts/{shard.id(FINGERPRINT)}.json",
        size=1,
        etag="",
        shard_id=shard.id(FINGERPRINT),
        fingerprint=FINGERPRINT,
        created=shard.name,
        attempt="a",
        sources=b"".join(map(source_id, shard.objects)),
        uris=b"".join(uri_id(source.uri) for source in shard.objects),
        contents=UNKNOWN_CONTENT * len(shard.objects),
        retry=None,
        same_as=None,
        container="parquet",
        samples=len(shard.objects),
        clips=len(shard.objects),
        damaged=1,
        damaged_regions=0,
        marks=bytes([DAMAGED]) + bytes(len(shard.objects) - 1),
        reasons='{"undecodable": 1}',
        limits="{}",
    )


def test_finding_work_takes_each_receipt_apart_a_fixed_number_of_times(tmp_path, monkeypatch):
    shards = groups(20)
    calls: Counter[str] = Counter()
    for name in ("source_ids", "uri_ids", "content_ids"):
        whole = getattr(ReceiptSummary, name)
        monkeypatch.setattr(
            ReceiptSummary, name, lambda item, name=name, whole=whole: calls.update([name]) or whole(item)
        )
    work = find_work(
        shards, [summary_of(shard) for shard in shards[:-1]], FINGERPRINT, EncodeJob(inputs=("in",), output="o")
    )
    before = work.before()
    assert (before.samples, before.clips, before.damaged) == (19 * GROUP, 19 * GROUP, 19)
    assert work.reasons() == {"undecodable": 19}
    assert [
        source for shard in work.todo(EncodeJob(inputs=("in",), output="o").storage) for source in shard.objects
    ] == (sorted(shards[-1].objects, key=lambda source: source.uri))
    assert max(calls.values()) <= 4 * 19  # once a source it would be 64 times as many


def test_a_driver_starts_without_pandas():
    assert "pandas" not in modules_after("import pipeline.engine.driver.encode, pipeline.ledger.snapshots")


def test_a_shard_costs_the_dispatcher_a_bounded_number_of_bytes_done_or_not():
    shards = [(f"{n:032x}", Shard("tar", f"{n}.tar", (SourceObject(f"in/{n}.tar", n + 1, "e"),))) for n in range(4000)]
    tracemalloc.start()
    try:
        begun = tracemalloc.get_traced_memory()[0]
        dispatcher = Dispatcher(shards, credit=2, attempts=3)
        for n in range(100):
            dispatcher.add_worker(f"w{n}")
        now = 0.0
        while given := dispatcher.assignments(now):
            now += 1.0
            for one in given:
                dispatcher.on_done(
                    one.worker, f"{one.shard.objects[0].size - 1:032x}", now + one.shard.objects[0].size / 1e6
                )
        used = tracemalloc.get_traced_memory()[0] - begun
    finally:
        tracemalloc.stop()
    assert dispatcher.finished
    assert used / len(shards) < 350


@pytest.mark.parametrize("workers", [5, 50])
def test_faults_and_preemptions_of_simulated_encoders_lose_and_double_no_shard(tmp_path, workers):
    pool = SimulatedPool(FINGERPRINT, workers, 60.0, faults=0.2, life_s=600.0)
    build, report, _ = make_build(tmp_path, ProbedStore(tmp_path / "out"), pool, shards=300)
    with clock_of(pool):
        build.run()
    assert report.shards_done + len(report.failed) == 300
    assert report.counts.samples == 110 * report.shards_done
    assert pool.counts["preempted"] > 0
    assert pool.counts["failed"] > 30
    assert all("failed 3 times" in why for why in report.failed.values())


def test_actor_of_the_benchmark_takes_the_calls_of_an_encoder():
    """Else `benchmarks.scale --only calls` fails, which no other test runs."""
    from pipeline.engine.ray.actors import EncoderActor

    def calls(actor):
        methods = inspect.getmembers(actor.__ray_metadata__.modified_class, inspect.isfunction)
        return {name: len(inspect.signature(call).parameters) for name, call in methods if name[0] != "_"}

    assert calls(instant_actor()) == calls(EncoderActor)
