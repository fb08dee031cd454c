"""Runs one night on Kubernetes: creates a RayJob from a manifest, waits for its end, and ends as it did. Pod of deploy/nightly.yaml.

Takes a RayJob manifest, the name and uid of the Job that this pod belongs to, and the pod's service account. The RayJob is named
`JOB-UID-ATTEMPT`, so a pod that Kubernetes starts again waits for the RayJob of the pod before it. If that one has failed, the next attempt
is created after `LEASE_S`, with `activeDeadlineSeconds` and `--max-hours` reduced by the time since the first one began.

Exit codes: that of the RayJob's command (0 succeeded); 1 failed without one (the head was lost, the cluster did not start); 2 the API
server or KubeRay refused the manifest; 3 no time is left, or the deadline ended it; 130 an operator stopped or deleted it.
deploy/nightly.yaml says which of them are repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
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
LEASE_S = 150.0  # a run that was killed holds the lease of its output for two minutes more
LEAST_HOURS = 0.25  # an attempt with less time for encoding would spend it on starting
FAILED, REFUSED, OUT_OF_TIME, STOPPED = 1, 2, 3, 130
REFUSALS = (400, 403, 404, 422)  # of the API server; another attempt would be refused as well
EXIT_CODE = re.compile(r"entrypoint command failed with exit code (\d+)")  # Ray's message about a failed job
MAX_HOURS = re.compile(r"(--max-hours[ =])([\d.]+)")


class RayJobs:
    """RayJobs of the pod's namespace, over the cluster's REST interface."""

    def __init__(self, server: str, account: Path) -> None:
        namespace = (account / "namespace").read_text().strip()
        self._url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._account = account
        authority = account / "ca.crt"
        self._tls = ssl.create_default_context(cafile=str(authority)) if server.startswith("https") else None

    def create(self, manifest: dict[str, Any]) -> None:
        """Creates it; does nothing if one of that name exists."""
        try:
            self._call("POST", self._url, json.dumps(manifest).encode())
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise

    def get(self, name: str) -> dict[str, Any] | None:
        """The RayJob; None if there is none of that name."""
        try:
            return self._call("GET", f"{self._url}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def _call(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        token = (self._account / "token").read_text().strip()  # read each time: the kubelet renews it
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30, context=self._tls) as response:
            answer: dict[str, Any] = json.load(response)
        return answer


def reduced(manifest: dict[str, Any], name: str, elapsed_s: float) -> dict[str, Any] | None:
    """The manifest of an attempt that begins `elapsed_s` after the first one. None: too little time is left.

    Raises:
        ValueError: the manifest is not a RayJob.
    """
    if manifest.get("kind") != "RayJob":
        raise ValueError(f"expected a RayJob manifest, got kind {manifest.get('kind')!r}")
    out = copy.deepcopy(manifest)
    out["metadata"] = {**manifest.get("metadata", {}), "name": name}
    spec = out["spec"]
    if elapsed_s <= 0:
        return out
    left_h = [float("inf")]
    if "activeDeadlineSeconds" in spec:
        spec["activeDeadlineSeconds"] -= int(elapsed_s)
        left_h.append(spec["activeDeadlineSeconds"] / 3600)
    if (asked := MAX_HOURS.search(spec["entrypoint"])) is not None:
        hours = float(asked[2]) - elapsed_s / 3600
        spec["entrypoint"] = MAX_HOURS.sub(rf"\g<1>{hours:.2f}", spec["entrypoint"])
        left_h.append(hours)
    return out if min(left_h) >= LEAST_HOURS else None


def ended(status: dict[str, Any]) -> int | None:
    """Exit code for a RayJob of this status; None while it has not ended."""
    state, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus")
    if state == "ValidationFailed":
        return REFUSED
    if state == "Complete":  # means that the job ended, not that it succeeded
        return {"SUCCEEDED": 0, "STOPPED": STOPPED}.get(job or "", FAILED)
    if state != "Failed":
        return None
    if status.get("reason") == "DeadlineExceeded":
        return OUT_OF_TIME
    code = EXIT_CODE.search(status.get("message") or "")
    return int(code[1]) if code is not None else FAILED


def run(jobs: RayJobs, manifest: dict[str, Any], prefix: str, period_s: float, lease_s: float) -> int:
    """Goes on with the attempt that runs, or begins the next one, after `lease_s` if one has failed. Returns the exit code."""
    began: datetime | None = None
    attempt = 1
    while (found := jobs.get(f"{prefix}-{attempt}")) is not None:
        began = began or datetime.fromisoformat(found["metadata"]["creationTimestamp"])
        if (code := ended(found.get("status", {}))) is None:
            say(f"{prefix}-{attempt} exists already; waiting for it")
            return wait(jobs, f"{prefix}-{attempt}", period_s)
        if code == 0:
            say(f"{prefix}-{attempt} has succeeded already")
            return 0
        attempt += 1
    name, elapsed_s = f"{prefix}-{attempt}", 0.0
    if began is not None:
        say(
            f"{prefix}-{attempt - 1} has failed; attempt {attempt} begins in {lease_s:.0f} s, when its lease has run out"
        )
        time.sleep(lease_s)
        elapsed_s = (datetime.now(UTC) - began).total_seconds()
    if (wanted := reduced(manifest, name, elapsed_s)) is None:
        say(f"no time is left for attempt {attempt}, {elapsed_s / 3600:.2f} hours after the first one began")
        return OUT_OF_TIME
    jobs.create(wanted)
    say(f"{name} created")
    return wait(jobs, name, period_s)


def wait(jobs: RayJobs, name: str, period_s: float) -> int:
    """Polls until the RayJob has ended. Returns the exit code."""
    failed_polls = 0
    while True:
        try:
            found = jobs.get(name)
            failed_polls = 0
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:  # HTTPError is a URLError
            failed_polls += 1
            say(f"the API server did not answer ({error})")
            if failed_polls >= MOST_FAILED_POLLS:
                raise
        else:
            if found is None:
                say(f"{name} was deleted while it ran")
                return STOPPED
            status = found.get("status", {})
            if (code := ended(status)) is not None:
                say(
                    f"{name}: {status.get('jobDeploymentStatus')}, job {status.get('jobStatus') or 'not submitted'}, exit code {code}: "
                    f"{status.get('message', '') or 'no message'}"
                )
                if code == STOPPED:
                    say(f"KubeRay keeps the cluster of a stopped run: kubectl delete rayjob {name}")
                return code
        time.sleep(period_s)


def say(text: str) -> None:
    """Prints one line to the pod's log."""
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="Creates the RayJob of a night and waits for its end.")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--job-name", default=os.environ.get("JOB_NAME"), help="of the Job of this pod [JOB_NAME]")
    parser.add_argument("--job-uid", default=os.environ.get("JOB_UID"), help="of the Job of this pod [JOB_UID]")
    parser.add_argument("--poll-s", type=float, default=30.0)
    parser.add_argument("--lease-s", type=float, default=LEASE_S)
    parser.add_argument("--server", default="https://kubernetes.default.svc", help="API server")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder of token, ca.crt and namespace")
    options = parser.parse_args(arguments)
    if not options.job_name or not options.job_uid:
        parser.error("expected --job-name and --job-uid, or JOB_NAME and JOB_UID in the environment")
    # KubeRay refuses names of more than 47 characters; this leaves four for the number of the attempt.
    prefix = f"{options.job_name[:36]}-{options.job_uid[:5]}"
    try:
        jobs = RayJobs(options.server, options.account)
        return run(jobs, yaml.safe_load(options.manifest.read_text()), prefix, options.poll_s, options.lease_s)
    except urllib.error.HTTPError as error:
        say(f"the API server refused {prefix}: {error.code} {error.reason}: {error.read(500).decode(errors='replace')}")
        return REFUSED if error.code in REFUSALS else FAILED
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        say(f"the API server did not answer ({error})")
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
