"""`rayjob.yaml`, `nightly.yaml`, `raycronjob.yaml`: fields of KubeRay, a valid command, consistent numbers.

There is no API server here; the rest needs `kubectl apply --dry-run=server` on a cluster with the operator.
"""

import itertools
import json

import pytest
import yaml

from pipeline.config import EngineConfig
from tests.deploy.manifests import DEPLOY, PROJECT, job_of, load, pins

RAYJOB = load(DEPLOY / "rayjob.yaml")
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
NIGHTLY = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "nightly.yaml").read_text())}
CRONJOB = NIGHTLY["CronJob"]["spec"]

# Field names of the ray.io/v1 types (KubeRay 1.6 and 1.7): a misspelt one would be pruned in silence by the API server.
KNOWN = {
    "RayJobSpec": """activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus
        entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes
        submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished""",
    "RayClusterSpec": """authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec
        headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs""",
    "HeadGroupSpec": "enableIngress headService labels rayStartParams resources serviceType template",
    "WorkerGroupSpec": """groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas
        resources scaleStrategy suspend template""",
    "AutoscalerOptions": """env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode version
        volumeMounts""",
}
GROUP_NAMES = ("gpu-spot", "decode-spot")


def known(kind, value):
    assert set(value) <= set(KNOWN[kind].split()), kind


def pods():
    return [CLUSTER["headGroupSpec"]["template"], *(group["template"] for group in GROUPS.values())]


def job(monkeypatch):
    return job_of(RAYJOB["spec"]["entrypoint"], monkeypatch)


def test_manifest_has_only_fields_of_kuberay():
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    known("RayJobSpec", RAYJOB["spec"])
    known("RayClusterSpec", CLUSTER)
    known("AutoscalerOptions", CLUSTER["autoscalerOptions"])
    known("HeadGroupSpec", CLUSTER["headGroupSpec"])
    assert tuple(GROUPS) == GROUP_NAMES
    for group in GROUPS.values():
        known("WorkerGroupSpec", group)
        # Required by the schema even where there is nothing to say.
        assert group["rayStartParams"] == {}
        assert group["minReplicas"] == 0 < group["maxReplicas"]
    assert RAYJOB["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")


def test_command_is_valid_and_fits_the_cluster(monkeypatch):
    built = job(monkeypatch)
    gpu = GROUPS["gpu-spot"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert built.output.startswith("s3://")
    assert built.model.checkpoint.startswith("s3://")
    # With zero workers the cluster has no GPU yet: `auto` would mean CPU and one encoder.
    assert built.model.device == "cuda"
    assert built.engine.encoders == gpu["maxReplicas"] * limits["nvidia.com/gpu"]
    assert built.engine.encoder_cpus + built.engine.decoders * built.engine.decoder_cpus <= int(limits["cpu"])
    assert all(frames % 4 == 1 for frames in built.clips.frames)


def test_decode_pods_take_decoders_only(monkeypatch):
    group = GROUPS["decode-spot"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits
    assert EngineConfig().decoder_cpus <= int(limits["cpu"])
    more = group["maxReplicas"] * int(limits["cpu"]) // GROUPS["gpu-spot"]["maxReplicas"]
    assert more == 23
    assert job(monkeypatch).engine.decoders + more == 52


def test_the_driver_stays_on_the_head_and_no_actor_does():
    head = CLUSTER["headGroupSpec"]
    assert head["resources"] == {"CPU": "0", "head": "1"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    (name,) = json.loads(RAYJOB["spec"]["entrypointResources"])
    assert name in head["resources"]
    assert head["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert head["template"]["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_a_preempted_pod_has_time_to_drain(name):
    spec = GROUPS[name]["template"]["spec"]
    environment = {item["name"]: item["value"] for item in spec["containers"][0]["env"]}
    assert spec["terminationGracePeriodSeconds"] > float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) > 30
    assert spec["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}


def test_every_pod_is_our_image_without_root():
    specs = [pod["spec"] for pod in pods()] + [CRONJOB["jobTemplate"]["spec"]["template"]["spec"]]
    images = set()
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        (container,) = spec["containers"]
        images.add(container["image"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    (image,) = images
    assert image.rsplit(":", 1)[1] == PROJECT["version"]
    for pod in pods():
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"], "Ray sizes itself by the limits"


def test_ray_is_the_pinned_one_and_asks_for_a_token():
    assert CLUSTER["rayVersion"] == pins()["ray"]
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_finished_jobs_are_removed_after_their_machines():
    rules = RAYJOB["spec"]["deletionStrategy"]["deletionRules"]
    # The operator refuses both ways at once.
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} & set(RAYJOB["spec"])
    ends = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        ((kind, state),) = condition.items()
        assert (kind, state) in {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
        ends.setdefault((kind, state), []).append((seconds, rule["policy"]))
    assert len(ends) == 3
    order = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    for steps in ends.values():
        places = [order.index(policy) for _, policy in sorted(steps)]
        assert places == sorted(set(places))
        assert {"DeleteCluster", "DeleteSelf"} <= {policy for _, policy in steps}


def test_nights_do_not_overlap():
    job_spec = CRONJOB["jobTemplate"]["spec"]
    assert CRONJOB["concurrencyPolicy"] == "Forbid"
    assert RAYJOB["spec"]["activeDeadlineSeconds"] < job_spec["activeDeadlineSeconds"] < 24 * 3600
    minute, hour, *rest = CRONJOB["schedule"].split()
    assert rest == ["*", "*", "*"]
    assert (minute.isdigit(), hour.isdigit()) == (True, True)


def test_nightly_account_may_create_and_get_rayjobs_only():
    assert NIGHTLY["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    account = NIGHTLY["ServiceAccount"]["metadata"]["name"]
    assert NIGHTLY["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert NIGHTLY["RoleBinding"]["roleRef"]["name"] == NIGHTLY["Role"]["metadata"]["name"]
    assert CRONJOB["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"] == account


def test_the_nightly_pod_finds_its_script_and_the_manifest():
    spec = CRONJOB["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    interpreter, script, manifest, *_ = container["command"]
    assert interpreter == "python"
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    folder, _, name = script.rpartition("/")
    assert f"WORKDIR {folder}\n" in dockerfile
    assert f"COPY deploy/{name} ./" in dockerfile
    (mount,) = container["volumeMounts"]
    (volume,) = spec["volumes"]
    assert mount["name"] == volume["name"]
    kustomization = load(DEPLOY / "kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    assert generated["name"] == volume["configMap"]["name"]
    assert [f"{mount['mountPath']}/{name}" for name in generated["files"]] == [manifest]
    for name in itertools.chain(generated["files"], kustomization["resources"]):
        assert (DEPLOY / name).is_file()


def test_the_gated_alternative_runs_the_same_job():
    cron = load(DEPLOY / "raycronjob.yaml")
    assert (cron["apiVersion"], cron["kind"]) == ("ray.io/v1", "RayCronJob")
    # It knows no concurrency policy, history or starting deadline.
    assert set(cron["spec"]) <= {"jobTemplate", "schedule", "suspend", "timeZone"}
    assert cron["spec"]["jobTemplate"] == RAYJOB["spec"]
    assert cron["spec"]["schedule"] == CRONJOB["schedule"]
    assert cron["spec"]["timeZone"] == CRONJOB["timeZone"]


def test_no_manifest_holds_a_secret():
    for path in (*DEPLOY.glob("*.yaml"), DEPLOY / "Dockerfile"):
        text = path.read_text().lower()
        for word in ("aws_access_key", "aws_secret", "akia", "password", "kind: secret", "auth_token:"):
            assert word not in text, path.name
