"""`lathe nightly`: what a night encodes, publishes and reports; what it refuses; how it stops and how the next one goes on."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

from pipeline.config import StorageConfig
from pipeline.engine.driver import build
from pipeline.engine.driver.encode import encode
from pipeline.engine.driver.progress import Silent
from pipeline.engine.driver.report import BuildReport
from pipeline.engine.worker import build_context
from pipeline.errors import ConfigError, GateFailed, InputError, LeaseHeld, LeaseLost, ShardsFailed
from pipeline.ledger.lease import Lease
from pipeline.ledger.snapshots import Snapshots
from pipeline.nightly import run
from pipeline.nightly.night import new_night
from pipeline.nightly.run import nightly
from pipeline.operate.publish import PublishOptions, publish
from pipeline.operate.verify import verify_output
from pipeline.process import signals
from pipeline.storage import open_store
from tests.pipeline.published import shown_ids
from tests.tiny_corpus import tiny_job, video_bytes, write_tar


def add_tar(folder, number, seed=None):
    """A shard of one video of nine frames, which give one clip, and one that is too short."""
    name = f"{number:03d}"
    content = {f"{name}a": {"mp4": video_bytes(9, seed=number if seed is None else seed)}}
    content[f"{name}b"] = {"mp4": video_bytes(3, seed=number)}
    return write_tar(folder / f"{name}.tar", content)


def job_of(corpus, output, **flags):
    return tiny_job(corpus, output, **{"nightly.canary": 0, "nightly.delta": False, "engine.credit": 1, **flags})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Three shards and their output after its first night. Tests take a copy."""
    folder = tmp_path_factory.mktemp("nights")
    (folder / "corpus").mkdir()
    for number in range(3):
        add_tar(folder / "corpus", number)
    job = job_of(folder / "corpus", folder / "out", **{"nightly.canary": 2, "nightly.delta": True})
    return SimpleNamespace(folder=folder, night=nightly(job))


@pytest.fixture
def place(first, tmp_path):
    """A corpus and its output after the first night. The corpus stays at its path: inputs are known by URI."""
    corpus = first.folder / "corpus"
    shutil.copytree(first.folder / "out", tmp_path / "out")
    before = {path.name: (path.read_bytes(), path.stat()) for path in corpus.iterdir()}
    yield SimpleNamespace(corpus=corpus, output=tmp_path / "out", store=store_of(tmp_path / "out"))
    for path in corpus.iterdir():
        path.unlink()
    for name, (data, stat) in before.items():
        (corpus / name).write_bytes(data)
        os.utime(corpus / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def store_of(output):
    return open_store(str(output), StorageConfig())


def newest_ids(store):
    return shown_ids(store, Snapshots(store).latest())


def clean_ids(corpus, tmp_path):
    """Rows of one run over the corpus as it is now."""
    nightly(job_of(corpus, tmp_path / "clean"))
    return newest_ids(store_of(tmp_path / "clean"))


def reports(store):
    return [json.loads(store.read(info.key)) for info in store.list("_runs/") if info.key.endswith(".report.json")]


def test_first_night_publishes_and_reports_changes_rejects_and_cost(first):
    night = first.night
    assert (night.outcome, night.exit_code, night.snapshot, night.published) == ("done", 0, 1, True)
    assert (night.inputs_listed, night.shards_todo, night.shards_done, night.shards_left) == (3, 3, 3, 0)
    assert (night.changes["inputs_added"], night.changes["rows_added"]) == (3, 3)
    assert night.rejects == {"too_short": 3}
    assert {(item.key, item.reason) for item in night.rejected} == {(f"00{n}b", "too_short") for n in range(3)}
    assert night.rejected[0].uri.endswith("/000.tar")
    assert (night.cost.gpu_s, night.cost.core_s > 0, night.cost.wall_s > 0) == (0, True, True)
    assert "canary" in {check["name"] for check in night.checks}
    store = store_of(first.folder / "out")
    (stored,) = reports(store)
    assert stored == json.loads(json.dumps(night.to_dict()))
    assert verify_output(store).ok


def test_empty_night_publishes_nothing(place):
    night = nightly(job_of(place.corpus, place.output))
    assert (night.outcome, night.exit_code, night.published, night.snapshot) == ("nothing", 0, False, 1)
    assert Snapshots(place.store).numbers() == [1]
    assert [report["outcome"] for report in reports(place.store)] == ["done", "nothing"]


def test_canary_runs_on_the_cpu_where_only_the_encoders_have_gpus(place):
    add_tar(place.corpus, 3)
    job = job_of(place.corpus, place.output, **{"nightly.canary": 1})
    night = new_night(job.output)
    control = run.Approval(job, place.store, Lease(place.store, "unused", "test"), night, accept_fingerprint=False)
    encode(job, Silent(), control)
    on_gpus = job.model_copy(update={"model": job.model.model_copy(update={"device": "cuda"})})
    run._publish(on_gpus, place.store, night, control, partial=False)
    (canary,) = (check for check in night.checks if check["name"] == "canary")
    assert (canary["ok"], canary["judged"]) == (True, True)


@pytest.mark.parametrize("removed", ["keep", "drop"])
def test_night_encodes_what_is_new_or_replaced_and_follows_the_policy_for_what_is_gone(place, tmp_path, removed):
    gone = set(newest_ids(place.store))
    add_tar(place.corpus, 1, seed=91)
    add_tar(place.corpus, 3)
    (place.corpus / "002.tar").unlink()
    night = nightly(job_of(place.corpus, place.output, **{"nightly.removed": removed}))
    assert (night.outcome, night.shards_todo, night.snapshot) == ("done", 2, 2)
    changed = [night.changes[f"inputs_{what}"] for what in ("added", "replaced", "removed")]
    assert changed == [1, 1, 1 if removed == "drop" else 0]
    expected = set(clean_ids(place.corpus, tmp_path))
    kept = set(newest_ids(place.store)) - expected
    assert expected <= set(newest_ids(place.store))
    assert (len(kept), kept <= gone) == (1 if removed == "keep" else 0, True)


class Hooked(Silent):
    """Calls `hook` once, when the first shard of this run is done."""

    def __init__(self, hook, monkeypatch):
        monkeypatch.setattr(build, "SHOW_S", 0.0)
        self._hook, self._before = hook, None

    def update(self, progress):
        self._before = progress.shards_done if self._before is None else self._before
        if self._hook is not None and progress.shards_done > self._before:
            hook, self._hook = self._hook, None
            hook()


def test_input_that_arrives_during_a_night_is_left_to_the_next(place, monkeypatch):
    add_tar(place.corpus, 3)
    add_tar(place.corpus, 4)
    display = Hooked(lambda: add_tar(place.corpus, 5), monkeypatch)
    assert nightly(job_of(place.corpus, place.output), display).outcome == "done"
    assert Snapshots(place.store).latest().num_open == 0
    night = nightly(job_of(place.corpus, place.output))
    assert (night.shards_done, night.snapshot) == (1, 3)


# --- limits and signals ---------------------------------------------------------------------------------------------------


def test_night_that_reaches_a_limit_publishes_what_is_done_and_the_next_goes_on(first, tmp_path):
    corpus, output = first.folder / "corpus", tmp_path / "out"
    nights = [nightly(job_of(corpus, output, **{"nightly.max_shards": 1})) for _ in range(4)]
    assert [(night.outcome, night.exit_code) for night in nights] == [
        ("budget", 3),
        ("budget", 3),
        ("done", 0),
        ("nothing", 0),
    ]
    assert nights[0].message.startswith("max_shards=1 reached; 2 of 3 shards are left")
    store = store_of(output)
    snapshots = [Snapshots(store).read(number) for number in Snapshots(store).numbers()]
    assert [(item.counts["rows"], item.num_open) for item in snapshots] == [(1, 2), (2, 1), (3, 0)]
    assert newest_ids(store) == newest_ids(store_of(first.folder / "out"))


def test_limit_that_leaves_no_time_publishes_nothing(place):
    add_tar(place.corpus, 3)
    night = nightly(job_of(place.corpus, place.output, **{"nightly.max_hours": 1e-12}))
    assert (night.outcome, night.published, night.shards_left) == ("budget", False, 1)
    assert Snapshots(place.store).numbers() == [1]


@pytest.mark.parametrize("allowed", [0, 1])
def test_shard_that_is_given_up_keeps_the_others_back_unless_the_job_allows_it(first, tmp_path, allowed):
    drill = {"drill.point": "before_commit", "drill.action": "raise", "drill.marker_dir": str(tmp_path / "drill")}
    job = job_of(
        first.folder / "corpus",
        tmp_path / "out",
        **{**drill, "engine.attempts": 1, "nightly.max_failed": allowed},
    )
    with pytest.raises(ShardsFailed) as caught:
        nightly(job)
    night = caught.value.night
    assert (night.outcome, night.exit_code, len(night.failed)) == ("failed", 1, 1)
    snapshot = Snapshots(store_of(tmp_path / "out")).latest()
    assert night.published == (snapshot is not None) == bool(allowed)
    if snapshot is not None:
        assert (snapshot.counts["rows"], snapshot.num_open) == (2, 1)
    after = nightly(job)  # the drill fails once
    assert after.outcome == "done"
    assert newest_ids(store_of(tmp_path / "out")) == newest_ids(store_of(first.folder / "out"))


def test_night_that_a_signal_stops_publishes_what_is_done(first, tmp_path, monkeypatch):
    corpus, output = first.folder / "corpus", tmp_path / "out"
    display = Hooked(lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    with signals.handled():
        night = nightly(job_of(corpus, output), display)
    assert (night.outcome, night.exit_code, night.published) == ("interrupted", 130, True)
    assert 0 < night.shards_left < 3
    assert nightly(job_of(corpus, output)).outcome == "done"
    assert newest_ids(store_of(output)) == newest_ids(store_of(first.folder / "out"))


def test_signal_while_a_night_publishes_waits_for_the_snapshot(place, monkeypatch):
    publish = run.publish

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return publish(*arguments, **options)

    monkeypatch.setattr(run, "publish", interrupted)
    add_tar(place.corpus, 3)
    with signals.handled():
        night = nightly(job_of(place.corpus, place.output))
    assert (night.outcome, night.snapshot) == ("done", 2)


def test_second_signal_stops_a_night_without_publishing(first, tmp_path, monkeypatch):
    def insist():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signals, "BURST_S", 0.0)
    output = tmp_path / "out"
    with signals.handled():
        night = nightly(job_of(first.folder / "corpus", output), Hooked(insist, monkeypatch))
    assert (night.outcome, night.published, night.shards_done > 0) == ("interrupted", False, True)
    assert Snapshots(store_of(output)).numbers() == []
    assert reports(store_of(output)) == [], "a store that does not answer must not hold the process"


def test_night_that_lost_its_lease_stops_and_publishes_nothing(place, monkeypatch):
    held = []

    class Spied(Lease):
        def __init__(self, *arguments):
            super().__init__(*arguments, ttl_s=0.2)
            held.append(self)

    def take_over():
        other = Lease(place.store, "nightly", "lathe nightly other.yaml")
        while True:
            os.utime(place.store.uri(held[0].key), (0, 0))
            with suppress(LeaseHeld):  # renewed since
                other.take()
                break
        while held[0]._lost is None:
            time.sleep(0.01)
        other.release()

    monkeypatch.setattr(run, "Lease", Spied)
    add_tar(place.corpus, 3)
    add_tar(place.corpus, 4)
    with pytest.raises(LeaseLost, match=r"lathe nightly other.yaml on .* took it over") as lost:
        nightly(job_of(place.corpus, place.output), Hooked(take_over, monkeypatch))
    night = lost.value.night
    assert (night.outcome, night.exit_code, night.published) == ("lease_lost", 5, False)
    assert Snapshots(place.store).numbers() == [1]


# --- refusals -------------------------------------------------------------------------------------------------------------


def test_silent_change_of_the_fingerprint_is_refused_until_it_is_accepted(place, monkeypatch):
    monkeypatch.setattr(build_context, "PIXELS", 4)
    job = job_of(place.corpus, place.output, **{"decode.untagged_matrix": "bt709"})
    with pytest.raises(ConfigError) as refused:
        nightly(job)
    words = str(refused.value)
    assert "pixels: 3 -> 4; policies.untagged_matrix: auto -> bt709." in words
    assert "--accept-new-fingerprint" in words
    assert (refused.value.night.outcome, refused.value.night.exit_code) == ("refused", 2)
    assert [report["outcome"] for report in reports(place.store)] == ["done", "refused"]
    accepted = nightly(job, accept_fingerprint=True)
    assert (accepted.outcome, accepted.shards_done) == ("done", 3)
    assert nightly(job).outcome == "nothing", "accepted once is accepted"
    with pytest.raises(
        ConfigError, match=r"out: policies.untagged_matrix: bt709 -> auto\. 3 shards of 3 would be encoded"
    ):
        nightly(job_of(place.corpus, place.output))
    assert len(Snapshots(place.store).latest().fingerprints) == 2
    publish(place.store, PublishOptions(fingerprint=accepted.fingerprint, delta=False))
    add_tar(place.corpus, 3)
    assert nightly(job).changes["rows_added"] == 1
    assert set(Snapshots(place.store).latest().fingerprints) == {accepted.fingerprint}, "who chose one goes on with it"


@pytest.mark.parametrize(("shards_done", "outcome"), [(0, "refused"), (1, "failed")])
def test_job_that_is_wrong_is_refused_as_long_as_nothing_was_encoded(shards_done, outcome):
    # As where encoders and decoders do not fit on the cluster: seen after the plan is made.
    night = new_night("out")
    night.add_build(BuildReport("out", "f" * 64, "net", False, "cpu", 3, 0, shards_done=shards_done))
    night.end(ConfigError("engine: 2 encoders do not fit"), time.monotonic())
    assert night.outcome == outcome


def test_output_of_another_corpus_is_refused_with_figures(place, tmp_path):
    (tmp_path / "other").mkdir()
    add_tar(tmp_path / "other", 7)
    with pytest.raises(InputError) as refused:
        nightly(job_of(tmp_path / "other", place.output))
    words = str(refused.value)
    assert "none of the 1 listed inputs" in words
    assert f"is among the 3 inputs of {place.output}" in words
    assert "--accept-new-corpus" in words
    assert refused.value.night.outcome == "refused"
    night = nightly(job_of(tmp_path / "other", place.output, **{"nightly.new_corpus": "accept"}))
    assert (night.outcome, night.changes["inputs_added"]) == ("done", 1)
    assert Snapshots(place.store).latest().counts["rows"] == 4


def test_night_whose_snapshot_fails_a_check_leaves_its_receipts_to_the_next(place):
    add_tar(place.corpus, 3)
    (place.corpus / "002.tar").unlink()
    drop = {"nightly.removed": "drop", "nightly.max_removed": 0}
    with pytest.raises(GateFailed, match=r"removed: 1 of 4 inputs.*lathe publish .*out INPUT") as failed:
        nightly(job_of(place.corpus, place.output, **drop))
    night = failed.value.night
    assert (night.outcome, night.exit_code, night.shards_done, night.published) == ("gate_failed", 4, 1, False)
    assert [check["name"] for check in night.checks if not check["ok"]] == ["removed"]
    again = nightly(job_of(place.corpus, place.output, **drop | {"nightly.max_removed": 1}))
    assert (again.outcome, again.shards_done, again.snapshot) == ("done", 0, 2)
    assert again.changes["inputs_added"] == 1


def test_too_many_damaged_inputs_fail_the_gate(place):
    for number in range(3, 5):
        write_tar(
            place.corpus / f"{number:03d}.tar", {"x": {"mp4": b"not a video" * 99}, "y": {"mp4": b"nor this" * 99}}
        )
    with pytest.raises(GateFailed, match="nothing was published") as failed:
        nightly(job_of(place.corpus, place.output))
    assert failed.value.night.outcome == "gate_failed"
    assert Snapshots(place.store).numbers() == [1]
