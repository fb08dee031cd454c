"""Whether encoders and decoders fit on the nodes of a cluster, on plain values; shared memory of a private Ray."""

import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.ray import placement, session
from pipeline.engine.ray.placement import Need, Node, check_placement, decoders_for, encoder_cpus, grows
from pipeline.engine.ray.session import Cluster, check_shared_memory
from pipeline.errors import ConfigError

GB = 1_000_000_000


def nodes(*cpus_and_gpus, store=10 * GB):
    return [Node(f"n{n}", cpus, gpus, store) for n, (cpus, gpus) in enumerate(cpus_and_gpus)]


def need(encoders=1, encoder_cpus=1.0, gpus=0, decoders=1, decoder_cpus=1.0):
    return Need(encoders, encoder_cpus, gpus, decoders, decoder_cpus, GB)


@pytest.mark.parametrize(
    ("asked", "have"),
    [
        (need(4, 1, 1, 7), nodes((32, 4))),
        (need(4, 1, 1, 7), nodes((4, 2), (4, 2), (24, 0))),  # decoders may be on other nodes
        (need(2, 4), nodes((5, 0), (5, 0))),
        (need(3, 0.1, 0, 9, 0.1), nodes((3, 0))),  # sums of fractions
        (need(8, 1, 1, 1), nodes((0, 0), *[(2, 1)] * 8)),  # a head without CPUs
    ],
)
def test_what_fits_is_no_problem(asked, have):
    assert asked.problem(have) is None


@pytest.mark.parametrize(
    ("asked", "have", "text"),
    [
        # All CPUs would go to encoders: no decoder is ever placed.
        (
            need(4, 1, 1, 1),
            nodes((4, 4)),
            "need 8 CPU and 4 GPU; the 1 nodes have 4 CPU and 4 GPU.*take 4 of these encoders and 0",
        ),
        (
            need(1, 1, 1),
            nodes((64, 0)),
            "1 encoders of 1 CPU and 1 GPU.*have 64 CPU and 0 GPU.*take 0 of these encoders",
        ),
        # In sum there would be enough, and no node has it.
        (need(1, 6), nodes((4, 0), (4, 0)), "largest 4 CPU.*take 0 of these encoders"),
        (need(1, 1, 0, 2, 3), nodes((4, 0), (2, 0)), "take 1 of these encoders and 1 of these decoders"),
        (need(2, 1, 1, 1), nodes((8, 1)), "take 1 of these encoders"),
        (need(), [], "the 0 nodes have 0 CPU"),
    ],
)
def test_what_does_not_fit_is_told_with_the_arithmetic(asked, have, text):
    assert re.search(text, asked.problem(have)), asked.problem(have)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=5), st.integers(1, 9), st.integers(1, 5))
def test_what_is_placed_never_exceeds_what_nodes_have(have, encoders, decoders):
    asked = need(encoders, 1, 1, decoders, 2)
    placed, beside = asked.fits(nodes(*have))
    assert placed <= min(encoders, sum(gpus for _, gpus in have))
    assert placed + 2 * beside <= sum(cpus for cpus, _ in have)
    assert (asked.problem(nodes(*have)) is None) == ((placed, beside) == (encoders, encoders * decoders))


def test_frames_beyond_an_object_store_are_told():
    assert need(2).store_problem(nodes((8, 0), store=2 * GB)) is None
    assert "2 encoders x 1.0 GB" in need(2).store_problem(nodes((8, 0), store=1.5 * GB))
    assert need(2).store_problem(nodes((8, 0), (8, 0), store=1.5 * GB)) is None  # one on each node


def job(*, decode="cpu", **engine):
    values = {"encoder_cpus": 1.0, "decoder_cpus": 1.0, "frame_bytes": GB, "encoders": None, "decoders": None, **engine}
    sections = SimpleNamespace(engine=SimpleNamespace(**values), decode=SimpleNamespace(device=decode))
    return SimpleNamespace(job=sections, device="cpu" if decode == "cpu" else "cuda")


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of one node of 4 CPUs, made by hand."""
    found = [
        {"Alive": True, "NodeManagerHostname": "a", "Resources": {"CPU": 4.0, "object_store_memory": 9.0 * GB}},
        {"Alive": False, "NodeManagerHostname": "b", "Resources": {"CPU": 99.0}},
    ]
    monkeypatch.setattr(placement.ray, "nodes", lambda: found)
    monkeypatch.setattr(placement, "_may_grow", lambda: False)
    return Cluster(local=False, cpus=4.0, gpus=0.0, nodes=1)


def test_job_that_does_not_fit_is_refused_before_an_encoder_is_created(cluster):
    assert check_placement(job(), cluster, 2, 1) is None
    with pytest.raises(
        ConfigError, match=r"engine: 3 encoders of 1 CPU and 3 decoders.*need 6 CPU.*lower engine\.encoders"
    ):
        check_placement(job(), cluster, 3, 1)


def test_cluster_that_grows_is_not_refused(cluster, monkeypatch):
    monkeypatch.setattr(placement, "_may_grow", lambda: True)
    assert "the cluster may add nodes" in check_placement(job(), cluster, 3, 1)


def test_default_number_of_decoders_is_what_fits_beside_the_encoders(cluster):
    assert decoders_for(job(), cluster, 1) == 3
    assert decoders_for(job(decoder_cpus=1.5), cluster, 1) == 2
    assert decoders_for(job(encoder_cpus=4.0), cluster, 1) == 1  # and `check_placement` refuses
    assert decoders_for(job(decoders=7), cluster, 1) == 7
    assert decoders_for(job(), Cluster(local=True, cpus=99.0, gpus=0.0, nodes=1, cores=6), 2) == 3


def test_decoders_with_nvdec_are_placed_with_their_encoder(monkeypatch):
    resources = {"CPU": 24.0, "GPU": 2.0, "object_store_memory": 9.0 * GB}
    monkeypatch.setattr(
        placement.ray, "nodes", lambda: [{"Alive": True, "NodeManagerHostname": "a", "Resources": resources}]
    )
    monkeypatch.setattr(placement, "_may_grow", lambda: False)
    cluster = Cluster(local=False, cpus=24.0, gpus=2.0, nodes=1)
    assert decoders_for(job(decode="cuda"), cluster, 2) == 11  # 12 CPUs beside each GPU, one of them the encoder's
    assert encoder_cpus(job(decode="cuda"), 11) == 12.0
    assert encoder_cpus(job(), 11) == 1.0  # other decoders are actors of their own
    assert check_placement(job(decode="cuda"), cluster, 2, 11) is None
    with pytest.raises(ConfigError, match=r"2 encoders of 13 CPU and 1 GPU.*take 1 of these encoders"):
        check_placement(job(decode="cuda"), cluster, 2, 12)


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({}, False),
        ({"autoscaler_report": {"active_nodes": {"node_a1b2": 1}, "idle_nodes": None, "pending_launches": {}}}, False),
        (
            {"autoscaler_report": {"active_nodes": {"ray.head.default": 1}, "idle_nodes": {}, "pending_launches": {}}},
            True,
        ),
        ({"autoscaler_report": {"active_nodes": {}, "idle_nodes": {}, "pending_launches": {"gpu": 2}}}, True),
    ],
)
def test_a_cluster_grows_if_its_autoscaler_has_node_types(report, expected):
    assert grows(json.dumps(report).encode()) == expected


def test_small_shared_memory_is_told_with_the_numbers_before_ray_starts(tmp_path, monkeypatch):
    usage = SimpleNamespace(total=64 << 20, used=0, free=60 << 20)
    monkeypatch.setattr(session.shutil, "disk_usage", lambda folder: usage)
    check_shared_memory(60 << 20, str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"need 671\.1 MB of shared memory, and .* has 62\.9 MB free of 67\.1 MB; .*--shm-size=1g"
    ):
        check_shared_memory(640 << 20, str(tmp_path))
    check_shared_memory(640 << 20, str(tmp_path / "not linux"))
    monkeypatch.setattr(session, "_start_private", lambda options: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError, match="shared memory"):
        session.connect(None, cpus=1, object_store_bytes=640 << 20)
