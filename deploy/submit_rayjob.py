"""Creates the RayJob of the night from a manifest and waits for its end. Runs in the CronJob's pod (deploy/nightly.yaml).

Takes a RayJob manifest, a name prefix and the pod's service account. Creates the RayJob `PREFIX-YYYYMMDD` (UTC). Exit code 0: the build
completed; 1: it failed, or the cluster refused. Safe to run again: an existing RayJob of that name is waited for.
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MOST_FAILED_POLLS = 20  # in a row: an API server may be away for a rolling upgrade, ten minutes at the default period


class RayJobs:
    """RayJobs of the pod's namespace, over the cluster's REST interface."""

    def __init__(self, server: str, account: Path) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if server.startswith("https") else None

    def create(self, manifest: dict[str, Any]) -> bool:
        """True if it was created, False if one of that name exists."""
        try:
            self._call("POST", self._url, json.dumps(manifest).encode())
        except urllib.error.HTTPError as error:
            if error.code == 409:
                return False
            raise
        return True

    def status(self, name: str) -> dict[str, Any]:
        """Status of the RayJob; empty until the operator has set it."""
        status: dict[str, Any] = self._call("GET", f"{self._url}/{name}").get("status", {})
        return status

    def _call(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        token = (self._account / "token").read_text().strip()  # read each time: the kubelet renews it
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def named(manifest: dict[str, Any], prefix: str, night: datetime) -> dict[str, Any]:
    """The manifest with the name of the night.

    Raises:
        ValueError: the manifest is not a RayJob.
    """
    if manifest.get("kind") != "RayJob":
        raise ValueError(f"expected a RayJob manifest, got kind {manifest.get('kind')!r}")
    metadata = {**manifest.get("metadata", {}), "name": f"{prefix}-{night:%Y%m%d}"}
    return {**manifest, "metadata": metadata}


def wait(jobs: RayJobs, name: str, period_s: float) -> int:
    """Polls until the build has ended: 0 completed, 1 failed."""
    failed_polls = 0
    while True:
        try:
            status = jobs.status(name)
            failed_polls = 0
        except urllib.error.HTTPError as error:
            if error.code == 404:
                say(f"{name} was deleted while it ran")
                return 1
            failed_polls = _count(failed_polls, error)
            status = {}
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failed_polls = _count(failed_polls, error)
            status = {}
        state = status.get("jobDeploymentStatus", "")
        if state in ("Complete", "Failed"):
            # "Complete" means that the job ended, not that it succeeded: a run that exits with 1 is Failed, a stopped one STOPPED.
            succeeded = state == "Complete" and status.get("jobStatus") == "SUCCEEDED"
            say(f"{name}: {state}, job {status.get('jobStatus')}: {status.get('message', '') or 'no message'}")
            return 0 if succeeded else 1
        time.sleep(period_s)


def _count(failed_polls: int, error: OSError) -> int:
    say(f"the API server did not answer ({error})")
    if failed_polls + 1 >= MOST_FAILED_POLLS:
        raise error
    return failed_polls + 1


def say(text: str) -> None:
    """Prints one line to the pod's log."""
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Creates the RayJob of the night and waits for its end.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--poll-s", type=float, default=30.0)
    parser.add_argument("--server", default="https://kubernetes.default.svc", help="API server")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder of token, ca.crt and namespace")
    options = parser.parse_args(arguments)
    manifest = named(yaml.safe_load(options.manifest.read_text()), options.prefix, datetime.now(UTC))
    name = manifest["metadata"]["name"]
    jobs = RayJobs(options.server, options.account)
    try:
        say(f"{name} created" if jobs.create(manifest) else f"{name} exists already; waiting for it")
        return wait(jobs, name, options.poll_s)
    except urllib.error.HTTPError as error:
        say(f"the API server refused {name}: {error.code} {error.reason}: {error.read(500).decode(errors='replace')}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
