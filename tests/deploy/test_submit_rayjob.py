"""The nightly submitter as a process of its own, against an HTTP server that answers like the Kubernetes API."""

import json
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.deploy.manifests import DEPLOY, RAYJOB_PATH, load

TOKEN = "first-token"


class Api:
    """RayJobs of one namespace; `steps` are the statuses that successive polls see, or HTTP error codes."""

    def __init__(self, steps, refuse=None):
        self.created = {}
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
                if name in api.created:
                    return self.answer(409, {"reason": "AlreadyExists"})
                assert self.path == "/apis/ray.io/v1/namespaces/encoding/rayjobs"
                api.created[name] = manifest
                return self.answer(201, manifest)

            def do_GET(self):
                api.tokens.append(self.headers["Authorization"])
                assert self.path.rsplit("/", 1)[1] in api.created
                step = api.steps.pop(0) if len(api.steps) > 1 else api.steps[0]
                if isinstance(step, int):
                    return self.answer(step, {})
                return self.answer(200, {"status": step} if step else {})

            def answer(self, code, body):
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def account(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("encoding")
    return tmp_path


def submit(api, account):
    child = subprocess.run(
        [
            *(sys.executable, str(DEPLOY / "submit_rayjob.py"), str(RAYJOB_PATH), "--prefix", "lathe-nightly"),
            *("--server", api.url, "--account", str(account), "--poll-s", "0.01"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    api.server.shutdown()
    api.server.server_close()
    return child


def test_job_of_the_night_is_created_and_waited_for(account):
    before = datetime.now(UTC)
    api = Api([{}, {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}])
    child = submit(api, account)
    assert child.returncode == 0, child.stdout + child.stderr
    ((name, manifest),) = api.created.items()
    assert name in {f"lathe-nightly-{day:%Y%m%d}" for day in (before, datetime.now(UTC))}
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 47, "the operator derives longer names from it"
    assert manifest["spec"] == load(RAYJOB_PATH)["spec"]
    assert api.tokens == [f"Bearer {TOKEN}"] * 4


@pytest.mark.parametrize(
    "end",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"},
        {"jobDeploymentStatus": "Failed"},
        404,
    ],
)
def test_failed_build_fails_the_pod(account, end):
    child = submit(Api([{"jobDeploymentStatus": "Running"}, end]), account)
    assert child.returncode == 1
    assert "Traceback" not in child.stderr


def test_restarted_pod_waits_for_the_existing_job(account):
    api = Api([{"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}])
    now = datetime.now(UTC)
    for day in (now, now + timedelta(minutes=5)):  # it may be midnight
        api.created[f"lathe-nightly-{day:%Y%m%d}"] = {}
    child = submit(api, account)
    assert child.returncode == 0, child.stderr
    assert "waiting for it" in child.stdout
    assert all(manifest == {} for manifest in api.created.values())


def test_short_outage_of_the_api_server_is_waited_out(account):
    api = Api([503, 503, {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}])
    assert submit(api, account).returncode == 0


def test_long_outage_of_the_api_server_fails_the_pod(account):
    api = Api([503])
    child = submit(api, account)
    assert child.returncode == 1
    assert len(api.tokens) == 1 + 20


def test_refusal_is_one_line_without_the_token(account):
    child = submit(Api([], refuse=403), account)
    assert child.returncode == 1
    assert "403" in child.stdout
    assert "forbidden" in child.stdout
    assert TOKEN not in child.stdout + child.stderr
    assert "Traceback" not in child.stderr
