"""What `kubectl apply -k` sends to a cluster, built by kubectl itself. Skipped where kubectl is not installed."""

import shutil
import subprocess

import pytest
import yaml

from tests.deploy.kubernetes_schemas import problems
from tests.deploy.manifests import DEPLOY, JOB_PATH, RAYJOB_PATH, load, patched

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def built(folder):
    """Objects by kind and name."""
    command = ["kubectl", "kustomize", str(DEPLOY / folder)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert child.returncode == 0, child.stderr
    found = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(child.stdout)}
    assert {name: wrong for name, item in found.items() if (wrong := problems(item))} == {}
    return found


def test_nightly_run_brings_its_job_and_rayjob_along():
    found = built(".")
    assert set(found) == {
        ("ServiceAccount", "lathe-nightly"),
        ("Role", "lathe-nightly"),
        ("RoleBinding", "lathe-nightly"),
        ("CronJob", "lathe-nightly"),
        ("ConfigMap", "lathe-job"),
        ("ConfigMap", "lathe-rayjob"),
    }
    assert yaml.safe_load(found["ConfigMap", "lathe-rayjob"]["data"]["rayjob.yaml"]) == load(RAYJOB_PATH)
    assert found["ConfigMap", "lathe-job"]["data"] == {"job.yaml": JOB_PATH.read_text()}


def test_queued_run_is_the_patched_rayjob():
    assert list(built("kueue").values()) == [patched(load(RAYJOB_PATH), DEPLOY / "kueue" / "fixed_size.yaml")]


def test_gated_alternative_runs_the_same_job_and_nothing_else():
    (cron,) = built("raycronjob").values()
    assert cron["kind"] == "RayCronJob"
    assert cron["spec"]["jobTemplate"] == load(RAYJOB_PATH)["spec"]


def test_monitoring_has_the_dashboard():
    found = built("monitoring")
    assert set(found) == {("PodMonitor", "lathe"), ("ConfigMap", "lathe-dashboard")}
    assert found["ConfigMap", "lathe-dashboard"]["metadata"]["labels"] == {"grafana_dashboard": "1"}
