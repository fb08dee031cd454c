"""The nightly submitter against an HTTP server that answers like the Kubernetes API."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.ledger.lease import TTL_S
from tests.deploy.manifests import DEPLOY, RAYJOB_PATH, load

TOKEN = "first-token"
PATH = DEPLOY / "submit_rayjob.py"
_spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
SCRIPT = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(SCRIPT)
PREFIX = "lathe-nightly-29384720-9f3c1"
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}


def failed(code):
    """As Ray says it and KubeRay passes it on."""
    message = f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\nexit code 9"
    return {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": message}


class Api:
    """RayJobs of one namespace; `steps` are the statuses that successive polls of a created one see, or HTTP error codes."""

    def __init__(self, steps, refuse=None, existing=None):
        self.created = {}
        self.existing = existing or {}
        self.steps = list(steps)
        self.refuse = refuse
        self.tokens = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                api.tokens.append(self.headers["Authorization"])
                manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = manifest["metadata"]["name"]
                if api.refuse:
                    return self.answer(api.refuse, {"message": "rayjobs.ray.io is forbidden"})
                if name in api.existing or name in api.created:
                    return self.answer(409, {"reason": "AlreadyExists"})
                assert self.path == "/apis/ray.io/v1/namespaces/encoding/rayjobs"
                api.created[name] = manifest
                return self.answer(201, manifest)

            def do_GET(self):
                api.tokens.append(self.headers["Authorization"])
                name = self.path.rsplit("/", 1)[1]
                if name in api.existing and isinstance(api.existing[name], dict):
                    return self.answer(200, api.existing[name])
                if name not in api.created and name not in api.existing:
                    return self.answer(404, {})
                step = api.steps.pop(0) if len(api.steps) > 1 else api.steps[0]
                if isinstance(step, int):
                    return self.answer(step, {})
                return self.answer(200, rayjob(step))

            def answer(self, code, body):
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"


def rayjob(status, age=timedelta(0)):
    """An object as the API server stores it."""
    return {"metadata": {"creationTimestamp": f"{datetime.now(UTC) - age:%Y-%m-%dT%H:%M:%SZ}"}, "status": status}


@pytest.fixture
def account(tmp_path, monkeypatch):
    """Folder of the pod's service account; the pod's environment is set."""
    monkeypatch.setenv("JOB_NAME", "lathe-nightly-29384720")
    monkeypatch.setenv("JOB_UID", "9f3c1d6e-5a10-4c11-8c43-6f1d1c1b2a3e")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("encoding")
    return tmp_path


def arguments(api, account):
    return [str(RAYJOB_PATH), "--server", api.url, "--account", str(account), "--poll-s", "0.01", "--lease-s", "0"]


def submit(api, account):
    """Exit code of the script, run in this process."""
    try:
        return SCRIPT.main(arguments(api, account))
    finally:
        api.server.shutdown()
        api.server.server_close()


def test_job_of_the_night_is_created_and_waited_for(account):
    api = Api([{}, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Suspended"}, RUNNING, SUCCEEDED])
    child = subprocess.run(
        [sys.executable, str(PATH), *arguments(api, account)], capture_output=True, text=True, timeout=240
    )
    assert child.returncode == 0, child.stdout + child.stderr
    ((name, manifest),) = api.created.items()
    assert name == f"{PREFIX}-1"
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47, "the operator derives longer names from it"
    assert manifest["spec"] == load(RAYJOB_PATH)["spec"]
    assert api.tokens == [f"Bearer {TOKEN}"] * 7


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (failed(4), 4),
        (failed(130), 130),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "Ray head pod not found."}, 1),
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, 1),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING", "reason": "DeadlineExceeded"}, 3),
        ({"jobDeploymentStatus": "ValidationFailed", "message": "The RayJob spec is invalid"}, 2),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 130),
        (404, 130),
    ],
)
def test_pod_ends_with_the_exit_code_of_the_run(account, end, code):
    assert submit(Api([RUNNING, end]), account) == code


def test_an_operator_who_stops_a_run_is_told_how_its_cluster_goes(account, capsys):
    submit(Api([RUNNING, {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}]), account)
    assert f"kubectl delete rayjob {PREFIX}-1" in capsys.readouterr().out


def test_exit_code_is_read_from_the_message_that_ray_writes():
    ray = Path(importlib.util.find_spec("ray").origin).parent
    source = (ray / "dashboard" / "modules" / "job" / "job_supervisor.py").read_text()
    written = "".join(re.findall(r'f?"([^"\n]*)"', source)).replace("{return_code}", "130")
    assert SCRIPT.EXIT_CODE.search(written)[1] == "130"


def test_evicted_pod_waits_for_the_rayjob_that_runs(account, capsys):
    api = Api([RUNNING, SUCCEEDED], existing={f"{PREFIX}-1": None})
    assert submit(api, account) == 0
    assert "waiting for it" in capsys.readouterr().out
    assert api.created == {}


def test_evicted_pod_does_not_run_again_what_has_succeeded(account):
    api = Api([RUNNING], existing={f"{PREFIX}-1": rayjob(SUCCEEDED)})
    assert submit(api, account) == 0
    assert api.created == {}


def test_next_attempt_has_the_hours_that_are_left(account):
    api = Api([SUCCEEDED], existing={f"{PREFIX}-1": rayjob(failed(1), timedelta(hours=6))})
    assert submit(api, account) == 0
    first, second = load(RAYJOB_PATH)["spec"], api.created[f"{PREFIX}-2"]["spec"]
    assert 0 <= first["activeDeadlineSeconds"] - 6 * 3600 - second["activeDeadlineSeconds"] < 300
    hours = [float(re.search(r"--max-hours ([\d.]+) ", spec["entrypoint"])[1]) for spec in (first, second)]
    assert 0 <= hours[0] - 6 - hours[1] < 0.1
    assert {**second, "entrypoint": "", "activeDeadlineSeconds": 0} == {
        **first,
        "entrypoint": "",
        "activeDeadlineSeconds": 0,
    }


def test_next_attempt_begins_when_the_lease_of_a_killed_run_has_run_out():
    assert SCRIPT.LEASE_S > TTL_S


def test_no_attempt_begins_that_has_no_time(account, capsys):
    api = Api([SUCCEEDED], existing={f"{PREFIX}-1": rayjob(failed(1), timedelta(hours=19.9))})
    assert (submit(api, account), api.created) == (3, {})
    assert "no time is left" in capsys.readouterr().out


def test_short_outage_of_the_api_server_is_waited_out(account):
    api = Api([503, 503, SUCCEEDED])
    assert submit(api, account) == 0


def test_long_outage_of_the_api_server_fails_the_pod(account):
    api = Api([503])
    assert submit(api, account) == 1
    assert len(api.tokens) == 2 + 20


def test_refusal_is_one_line_without_the_token(account, capsys):
    assert submit(Api([], refuse=403), account) == 2
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert "403" in line
    assert "forbidden" in line
    assert TOKEN not in printed.out + printed.err
