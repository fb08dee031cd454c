"""Builds over a real S3 server: tars from one bucket, latents and receipts into another, the same rows as on disk."""

import json
import os

import pytest

import pipeline
from pipeline.config import StorageConfig
from pipeline.errors import AccessError
from pipeline.operate.verify import verify_output
from pipeline.storage import open_store
from tests import forked_command
from tests.engine.test_inline import assert_same_rows
from tests.tiny_corpus import TINY_NETWORK, make_corpus, rows, tiny_flags, tiny_job

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), shards=2, samples=3)


@pytest.fixture
def remote(s3, corpus):
    store = open_store(s3.root + "/in", StorageConfig())
    for path in sorted(corpus.iterdir()):
        store.upload(path, f"nested/{path.name}")
    return s3


def without_uri(table):
    # Ids and source URIs name the place a shard came from; the rest of a row does not.
    return {
        (r["source_key"], r["clip_index"]): {k: v for k, v in r.items() if k not in ("id", "source_uri")}
        for r in table.values()
    }


def test_from_s3_to_s3_gives_the_rows_of_a_local_run(remote, corpus, tmp_path):
    output = remote.root + "/out/latents"
    command = ["encode", remote.root + "/in/nested/{000000..000001}.tar", output]
    run = forked_command.run(*command, *tiny_flags("--executor", "inline"))
    assert run.returncode == 0, run.stderr
    assert "6 in = 4 encoded + 2 rejected" in run.stdout
    pipeline.encode(tiny_job(corpus, tmp_path / "local"))
    assert_same_rows(without_uri(rows(tmp_path / "local")), without_uri(rows(output)), atol=0)
    report = verify_output(open_store(output, StorageConfig()))
    assert report.ok, report.problems
    again = pipeline.encode(tiny_job(remote.root + "/in/", output))
    assert (again.shards_done, again.shards_before) == (0, 2)


@pytest.mark.parametrize(
    ("point", "action"), [("before_commit", "kill"), ("after_commit", "kill"), ("after_upload", "kill")]
)
def test_killed_build_on_s3_is_finished_by_the_next_run(remote, tmp_path, point, action):
    output = remote.root + "/out"
    command = ["encode", remote.root + "/in/nested/*.tar", output, *tiny_flags("--executor", "inline")]
    drill = ["--set", f"drill.point={point}", "--set", f"drill.marker_dir={tmp_path}"]
    assert forked_command.run(*command, *drill).returncode == -9
    assert pipeline.encode(tiny_job(f"{remote.root}/in/nested/*.tar", output)).ok  # the same job, in this process
    table = rows(output)
    assert len(table) == len(without_uri(table)) > 0
    report = verify_output(open_store(output, StorageConfig()))
    assert report.ok, report.problems


def test_a_checkpoint_on_s3_is_fetched_and_its_hash_recorded(remote, corpus, tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    import model
    from model.leanvae.random_weights import random_weights
    from model.registry import complete

    monkeypatch.setenv("LATHE_CACHE", str(tmp_path / "cache"))
    weights = random_weights(complete("leanvae", TINY_NETWORK), 5)
    save_file(
        {k: v.contiguous() for k, v in weights.items()},
        tmp_path / "w.safetensors",
        metadata={"config": json.dumps(TINY_NETWORK)},
    )
    store = open_store(remote.root, StorageConfig())
    store.upload(tmp_path / "w.safetensors", "weights/w.safetensors")
    uri = remote.root + "/weights/w.safetensors"
    job = tiny_job(corpus, tmp_path / "out", "model.untrained=null", "model.config=null", f"model.checkpoint={uri}")
    report = pipeline.encode(job)
    assert report.ok
    assert not report.untrained
    vae = model.load("leanvae", uri)
    assert vae.weights_sha256 == model.load("leanvae", str(tmp_path / "w.safetensors")).weights_sha256
    assert isinstance(vae.encode(torch.zeros(1, 3, 5, 16, 16))[0].mean, torch.Tensor)


@pytest.mark.parametrize(
    ("fields", "output", "text"),
    [
        ({"endpoint_url": "http://127.0.0.1:9"}, "s3://bucket/out", "127.0.0.1:9"),
        ({}, "s3://no-such-bucket-anywhere/out", "no-such-bucket-anywhere"),
    ],
)
def test_unreachable_output_is_refused_before_anything_starts(remote, corpus, fields, output, text):
    overrides = [f"storage.{name}={value}" for name, value in fields.items()]
    with pytest.raises(AccessError, match=text) as caught:
        pipeline.encode(tiny_job(corpus, output, *overrides))
    assert caught.value.exit_code == 2


def test_wrong_credentials_are_one_line_without_the_secret(remote, corpus):
    environment = {**os.environ, "AWS_SECRET_ACCESS_KEY": "very-wrong-secret"}
    command = ["encode", corpus, remote.root + "/out", *tiny_flags("--executor", "inline")]
    run = forked_command.run(*command, env=environment)
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert "very-wrong-secret" not in run.stderr
    assert remote.bucket in run.stderr
