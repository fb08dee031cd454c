"""`lathe nightly` as a command: exit codes, two at once, kills. The next night goes on after each."""

import json
import os
import time

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.ledger.snapshots import Snapshots
from pipeline.nightly.run import nightly
from pipeline.operate.verify import verify_output
from tests import forked_command
from tests.nightly.test_nights import add_tar, job_of, newest_ids, reports, store_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(2):
        add_tar(folder, number)
    return folder


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    """Rows of one undisturbed night."""
    output = tmp_path_factory.mktemp("clean") / "out"
    nightly(job_of(corpus, output))
    return newest_ids(store_of(output))


def job_file(corpus, folder, **flags):
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job_of(corpus, folder / "out", **flags).model_dump(mode="json", exclude_unset=True)))
    return path


def age(store):
    """As if an hour had passed since other runs wrote their lease and heartbeat."""
    for prefix in ("_leases/", "_progress/"):
        for info in store.list(prefix):
            os.utime(store.uri(info.key), (info.modified - 3600,) * 2)


def drill(point, folder, action="kill"):
    return [
        *("--set", f"drill.point={point}", "--set", f"drill.marker_dir={folder / 'markers'}"),
        *("--set", f"drill.action={action}"),
    ]


def lathe(*arguments, code):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_second_night_at_the_same_time_is_told_who_runs_and_since_when(corpus, clean, tmp_path):
    job, store = job_file(corpus, tmp_path), store_of(tmp_path / "out")
    running = forked_command.start("nightly", job, *drill("after_fetch", tmp_path, "hang"))
    try:
        while not (tmp_path / "markers").exists():
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.05)
        lost = lathe("nightly", job, "--json", code=5)
        assert f"lathe nightly {job} of " in lost.stderr
        assert f"(process {running.pid}) holds the lease 'nightly'" in lost.stderr
        night = json.loads(lost.stdout)
        assert (night["outcome"], night["lease"]["pid"]) == ("lease_held", running.pid)
        assert night["lease"]["started"] in lost.stderr
        assert reports(store) == []
        lathe("nightly", job, "--json", "--exit-code", "lease_held=0", code=0)
    finally:
        running.kill()
        running.communicate()
    age(store)
    assert nightly(job_of(corpus, tmp_path / "out")).outcome == "done"
    assert newest_ids(store) == clean


@pytest.mark.parametrize(
    ("point", "outcome"), [("before_commit", "done"), ("before_snapshot", "done"), ("after_snapshot", "nothing")]
)
def test_night_after_a_kill_goes_on(corpus, clean, tmp_path, point, outcome):
    job, store = job_file(corpus, tmp_path), store_of(tmp_path / "out")
    killed = forked_command.run("nightly", job, *drill(point, tmp_path))
    assert killed.returncode == -9, killed.stderr
    age(store)
    night = nightly(job_of(corpus, tmp_path / "out"))
    assert (night.outcome, night.snapshot) == (outcome, 1)
    assert newest_ids(store) == clean
    assert verify_output(store).ok


def test_store_that_is_away_at_the_start_fails_the_night_and_a_wrong_profile_refuses_it(corpus, tmp_path, monkeypatch):
    """A scheduler repeats what failed (1), not what was refused (2)."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    job = job_file(corpus, tmp_path)

    def outcome(endpoint: str, code: int) -> str:
        remote = "--set", "output=s3://bucket/out", "--set", f"storage.endpoint_url={endpoint}"
        return json.loads(lathe("nightly", job, "--json", *remote, code=code).stdout)["outcome"]

    assert outcome("http://127.0.0.1:9", 1) == "failed"
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    assert outcome("http://127.0.0.1:10", 2) == "refused"


def test_text_json_and_exit_codes(corpus, tmp_path):
    job = job_file(corpus, tmp_path)
    text = lathe("nightly", job, code=0).stdout
    assert "snapshot  1: inputs +2 -0, 0 replaced; rows +2 -0" in text
    assert "too_short 2" in text
    assert "core-seconds" in text
    assert ": nothing" in lathe("nightly", job, code=0).stdout
    night = json.loads(lathe("nightly", job, "--json", "--exit-code", "nothing=10", code=10).stdout)
    assert (night["outcome"], night["snapshot"]) == ("nothing", 1)
    assert "outcomes: done, nothing" in lathe("nightly", job, "--exit-code", "fine=3", code=2).stderr
    changed = lathe("nightly", job, "--json", "--set", "decode.untagged_matrix=bt601", code=2)
    assert json.loads(changed.stdout)["outcome"] == "refused"
    assert changed.stderr.startswith("lathe: error: the fingerprint changed")
    (tmp_path / "wrong.yaml").write_text("inputs: x")
    for wrong, why in (("none.yaml", "cannot be read"), ("wrong.yaml", "output: is required")):
        refused = lathe("nightly", tmp_path / wrong, "--json", "--exit-code", "refused=7", "--debug", code=7)
        night = json.loads(refused.stdout)
        assert (night["outcome"], night["exit_code"]) == ("refused", 7)
        assert why in night["message"]
        assert "Traceback" in refused.stderr
    stopped = lathe("nightly", job, "--max-hours", "1e-12", code=0)
    assert ": nothing" in stopped.stdout, "a limit does not stop what has nothing to do"
    assert len(Snapshots(store_of(tmp_path / "out")).numbers()) == 1
