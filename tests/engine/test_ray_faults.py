"""Encoders that end by themselves on real actors: a video that crashes them, an error of the device, a load that hangs."""

import pytest

import pipeline
from tests.engine.test_kill import assert_sound, drill_flags
from tests.tiny_corpus import receipts, rows, tiny_flags, tiny_job, video_bytes, write_tar

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One shard of two videos; the first is met by every drill first."""
    content = {name: {"mp4": video_bytes(11, seed=n), "txt": b"x"} for n, name in enumerate("ab")}
    return write_tar(tmp_path_factory.mktemp("corpus") / "x.tar", content)


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("clean")
    pipeline.encode(tiny_job(corpus, output))
    return rows(output)


def encode(cluster, corpus, output, *flags, **options):
    few = ("engine.decoder_cpus=0.5", "engine.decoders=1", "engine.batch=1", "engine.attempts=2")
    joined = ("--executor", "ray", "--address", cluster.address)
    sets = [part for text in few for part in ("--set", text)]
    return cluster.lathe("encode", corpus, output, *tiny_flags(*joined, *sets, *flags), **options)


def test_video_that_crashes_its_encoder_twice_is_rejected_and_its_shard_is_encoded(
    ray_cluster, corpus, clean, tmp_path
):
    crash = [
        *drill_flags("mid_video", tmp_path / "m", times=2),
        "--set",
        "drill.action=crash",
        "--set",
        "reject_budget=1",
    ]
    run = encode(ray_cluster, corpus, tmp_path / "out", *crash)
    assert run.returncode == 0, run.stderr
    assert (
        "encoder-1 lost: its process crashed: segmentation fault (SIGSEGV), in stage 'encode' of a of " in run.stderr
    ), run.stderr
    assert "video a ended several workers and is rejected" in run.stderr, run.stderr
    (receipt,) = receipts(tmp_path / "out")
    assert [(reject.key, reject.reason) for reject in receipt.rejects] == [("a", "ended_worker")]
    expected = {name: row for name, row in clean.items() if row["source_key"] == "b"}
    assert rows(tmp_path / "out").keys() == expected.keys()


def test_encoder_whose_device_fails_is_replaced_and_no_row_is_lost(ray_cluster, corpus, clean, tmp_path):
    fail = [*drill_flags("mid_video", tmp_path / "m"), "--set", "drill.action=device_error"]
    run = encode(ray_cluster, corpus, tmp_path / "out", *fail)
    assert run.returncode == 0, run.stderr
    assert "encoder-1 lost: its device failed: CUDA error: an illegal memory access" in run.stderr, run.stderr
    assert_sound(tmp_path / "out", clean, samples=2)


def hasty():
    """In the driver, before it begins."""
    from pipeline.engine.ray import pool

    pool.LOAD_S = 10.0


def test_load_that_hangs_is_ended_with_its_stage_named_and_another_encoder_works(ray_cluster, corpus, clean, tmp_path):
    hang = [*drill_flags("in_load", tmp_path / "m"), "--set", "drill.action=hang"]
    run = encode(ray_cluster, corpus, tmp_path / "out", *hang, prepare="tests.engine.test_ray_faults:hasty")
    assert run.returncode == 0, run.stderr
    assert "encoder-1 did not come up: no progress in loading for 10 s, in stage 'loading the network'" in run.stderr, (
        run.stderr
    )
    assert_sound(tmp_path / "out", clean, samples=2)
