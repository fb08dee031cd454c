"""Pages in the output: `publish --report`, `lathe nightly` with `nightly.report`, and their end in `lathe gc`."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import pipeline
from pipeline.cli.app import app
from pipeline.config import StorageConfig
from pipeline.ledger.snapshots import Snapshots
from pipeline.ledger.takedowns import record_takedown
from pipeline.nightly.run import nightly
from pipeline.operate.gc import GcOptions
from pipeline.operate.gc import collect as collect_garbage
from pipeline.report.collect import collect
from pipeline.report.written import store_report, stored_page
from pipeline.storage import open_store
from tests.operate.outputs import aged
from tests.pipeline.latent_clips import local_store
from tests.report.conftest import WITHOUT_PICTURES
from tests.report.outputs import add_shard, publish, source
from tests.report.test_serving import ask, serving
from tests.tiny_corpus import tiny_job, video_bytes


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build of one file that nobody published."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "corpus").mkdir()
    (folder / "corpus" / "a.mp4").write_bytes(video_bytes(5, seed=1))
    job = tiny_job(folder / "corpus", folder / "out", **{"model.device": "cpu"})
    pipeline.encode(job)
    return job


@pytest.fixture
def job(built, tmp_path):
    shutil.copytree(built.output, tmp_path / "out")
    return built.model_copy(update={"output": str(tmp_path / "out")})


def test_publish_stores_the_page_once_and_names_it(job):
    command = ["publish", job.output, "--canary", "0", "--report", "--device", "cpu", "--json"]
    first = json.loads(CliRunner().invoke(app, command).stdout)
    store = open_store(job.output, StorageConfig())
    assert (first["made"], first["page"]) == (True, store.uri("_snapshots/1.html"))
    page = stored_page(store, 1)
    assert b"data:image/webp" in page
    assert json.loads(store.read("_snapshots/1.report.json"))["snapshot"] == 1
    again = CliRunner().invoke(app, [name for name in command if name != "--json"])
    assert again.stdout.splitlines()[-1] == f"  page      {store.uri('_snapshots/1.html')}"
    assert stored_page(store, 1) == page
    assert Snapshots(store).numbers() == [1]


def test_a_page_that_cannot_be_made_leaves_the_snapshot(job):
    store = open_store(job.output, StorageConfig())
    (key,) = store.keys("_index")
    command = ["publish", job.output, "--canary", "0", "--device", "cpu"]
    assert CliRunner().invoke(app, command).exit_code == 0
    store.delete(key)
    result = CliRunner().invoke(app, [*command, "--report"])
    assert result.exit_code == 1
    assert f"lathe report {store.root}@1 --store" in result.stderr
    assert Snapshots(store).numbers() == [1]


def test_a_night_names_the_page(job):
    settings = job.nightly.model_copy(update={"report": True, "canary": 0})
    night = nightly(job.model_copy(update={"nightly": settings}))
    store = open_store(job.output, StorageConfig())
    assert (night.outcome, night.page) == ("done", store.uri("_snapshots/1.html"))
    assert stored_page(store, 1) is not None


def test_pages_of_an_output_on_s3_are_made_stored_and_served(built, moto, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(app, [*arguments, "--endpoint-url", moto.endpoint, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    store, local = open_store(f"{moto.root}/latents", moto.config()), open_store(built.output, StorageConfig())
    for key in local.keys(""):
        store.write(key, local.read(key))
    published = run("publish", store.root, "--canary", "0", "--report", "--device", "cpu")
    assert (published["made"], published["page"]) == (True, f"{store.root}/_snapshots/1.html")
    assert b"data:image/webp" in stored_page(store, 1)
    assert json.loads(store.read("_snapshots/1.report.json"))["left_out"]["videos"]["encoded"] == 1

    page = tmp_path / "page.html"
    made = run("report", store.root, "--html", str(page), "--clips", "0", "--store")
    assert made["stored"] == f"{store.root}/_snapshots/1.html"
    assert stored_page(store, 1) == page.read_bytes()
    assert store.read("_snapshots/1.report.json") == page.with_suffix(".json").read_bytes()

    before = sorted(store.keys(""))
    with serving(store, moto.config()) as port:
        assert f"{store.root}</bdi>" in ask(port, "/")[1]
        assert ask(port, "/snapshots/1.html") == (200, page.read_text())
        store.delete("_snapshots/1.html")
        status, body = ask(port, "/snapshots/1.html")  # made, as none is stored
        assert (status, "a.mp4" in body) == (200, True)
        assert json.loads(ask(port, "/progress.json")[1])["progress"] is None
    assert sorted(store.keys("")) == [key for key in before if key != "_snapshots/1.html"]


def test_gc_deletes_pages_of_retired_snapshots_and_those_older_than_a_takedown(tmp_path):
    store = local_store(tmp_path / "out")
    for number in range(2):
        add_shard(store, tmp_path, number, ("kept", "secret"))
        publish(store)
        store_report(store, *collect(store, None, StorageConfig(), WITHOUT_PICTURES))
    options = GcOptions(keep_snapshots=2, keep_days=0)
    aged(store)
    collect_garbage(store, options)
    assert pages(store) == [1, 1, 2, 2]
    collect_garbage(store, replace(options, keep_snapshots=1))
    assert pages(store) == [2, 2]
    record_takedown(store, "asked", samples=[(source(0), "dir/video00001")])
    collect_garbage(store, options)
    assert pages(store) == []


def pages(store):
    names = (key.removeprefix("_snapshots/") for key in store.keys("_snapshots"))
    return sorted(int(name.split(".")[0]) for name in names if name.endswith((".html", ".report.json")))
