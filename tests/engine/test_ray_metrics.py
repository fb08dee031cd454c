"""Prometheus series of a build on Ray, as its node exports them while it runs."""

import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.cli.build_wording import DOING
from pipeline.engine.ray.metrics import SERIES
from pipeline.operate.status import live_status
from pipeline.storage.local import LocalStore
from tests.engine.test_kill import drill_flags
from tests.engine.test_ray import joined
from tests.tiny_corpus import make_corpus

pytestmark = pytest.mark.ray

OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
# Nothing of the kind happens in this build.
ABSENT = {
    "lathe_compile_seconds_total",
    "lathe_storage_retries_total",
    "lathe_outage_seconds_total",
    "lathe_workers_lost_total",
}


def scraped(url, without=()):
    """`{name: [(labels, value)]}` of Lathe's series, without those of other processes: a node exports counters until it ends."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ray_lathe_") and sample.labels["WorkerId"] not in without:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(found, name, **labels):
    return sum(value for own, value in found.get(f"ray_{name}", ()) if labels.items() <= own.items())


def listed(output):
    """The encoders of the running build, as `lathe status` sees them."""
    progress = live_status(LocalStore(str(output)))["progress"] or {}
    return progress.get("encoders", {}).get("listed", [])


def test_a_running_build_exports_every_series_with_bounded_labels(ray_cluster, tmp_path):
    corpus = make_corpus(tmp_path / "in", shards=3, samples=3)
    tars = sum(path.stat().st_size for path in Path(corpus).glob("*.tar"))
    # The first commit hangs, so that the build runs until it has been looked at.
    hang = [*drill_flags("after_commit", tmp_path / "m"), "--set", "drill.action=hang"]
    deadline = time.monotonic() + 300
    while True:
        try:
            before = {labels["WorkerId"] for samples in scraped(ray_cluster.metrics).values() for labels, _ in samples}
            break
        except urllib.error.URLError:  # the agent of a head that has just come up
            assert time.monotonic() < deadline
            time.sleep(0.5)
    build = ray_cluster.start("encode", corpus, tmp_path / "out", *joined(ray_cluster), *hang)
    try:
        found = {}
        while (
            total(found, "lathe_shards_total", outcome="done") < 2
            or total(found, "lathe_frames_encoded_total") < 45
            or total(found, "lathe_received_bytes_total") < tars  # exported on its own, perhaps later
        ):
            assert build.poll() is None, build.stderr.read()
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
            found = scraped(ray_cluster.metrics, before)
        while not (encoders := listed(tmp_path / "out")):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        build.kill()
        build.communicate(timeout=300)
    assert set(found) == {series.exported for series in SERIES if series.name not in ABSENT}
    assert [(encoder["worker"], encoder["doing"] in DOING) for encoder in encoders] == [("encoder-1", True)]
    assert total(found, "lathe_shards_total") == 2
    assert total(found, "lathe_rejects_total", reason="too_short") == 2
    assert (total(found, "lathe_encoders"), total(found, "lathe_shards_open")) == (1, 1)
    assert total(found, "lathe_frames_decoded_total") > 45
    assert total(found, "lathe_decode_cpu_seconds_total") > 0
    assert 0 < total(found, "lathe_encode_chunks_total") <= total(found, "lathe_encode_slots_total")
    assert total(found, "lathe_sent_bytes_total") >= total(found, "lathe_committed_bytes_total") > 0
    assert {labels.get("cause") for labels, _ in found["ray_lathe_starved_seconds_total"]} <= {
        *("decode", "fetch", "upload", "shard")
    }
    ours = {series.exported: {series.label} - {None} for series in SERIES}
    for name, samples in found.items():
        for labels, _ in samples:
            assert {label for label in labels if not label.startswith("otel_")} == OF_RAY | ours[name]
