"""The run on Kubernetes: schemas of all manifests, a valid command, numbers that agree with each other and with the job.

There is no API server here. The rules that KubeRay and Kueue have in code are repeated where a manifest has broken one, or could.
"""

import json

import pytest
import typer
import yaml

from pipeline.cli import app as cli
from pipeline.config import EngineConfig
from pipeline.engine.driver.draining import MARGIN_S
from pipeline.errors import ConfigError
from pipeline.nightly.night import EXIT_CODES
from tests.deploy.kubernetes_schemas import problems
from tests.deploy.manifests import (
    DEPLOY,
    JOB_MOUNT,
    JOB_PATH,
    PROJECT,
    RAYJOB_PATH,
    documents,
    load,
    night_of,
    patched,
    pins,
)

RAYJOB = load(RAYJOB_PATH)
SPEC = RAYJOB["spec"]
CLUSTER = SPEC["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}
GROUP_NAMES = ("gpu-spot", "decode-spot")
QUEUED = patched(RAYJOB, DEPLOY / "kueue" / "fixed_size.yaml")
NIGHTLY = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "nightly.yaml").read_text())}
CRONJOB = NIGHTLY["CronJob"]["spec"]
SUBMIT = CRONJOB["jobTemplate"]["spec"]["template"]["spec"]


def pods():
    return [CLUSTER["headGroupSpec"]["template"], *(group["template"] for group in GROUPS.values())]


def jobs():
    """Objects of kind Job, with their file's name."""
    return {path.name: item for path, item in documents() if item["kind"] == "Job"}


def limits(template):
    return template["spec"]["containers"][0]["resources"]["limits"]


def test_every_manifest_fits_its_schema():
    checked = [
        (path.relative_to(DEPLOY).as_posix(), item) for path, item in documents() if item["kind"] != "RayCronJob"
    ]
    assert {"nightly.yaml", "rayjob/rayjob.yaml", "kueue/queues.yaml", "monitoring/podmonitor.yaml"} <= {
        n for n, _ in checked
    }
    found = {name: problems(item) for name, item in [*checked, ("kueue", QUEUED)]}
    assert {name: problem for name, problem in found.items() if problem} == {}


def test_a_misspelt_field_is_a_problem():
    wrong = json.loads(json.dumps(RAYJOB).replace('"maxReplicas"', '"maxReplica"'))
    assert any("maxReplica" in problem for problem in problems(wrong))
    assert problems({**RAYJOB, "spec": {**SPEC, "submissionMode": 3}})


def test_command_is_valid_and_fits_the_cluster(monkeypatch):
    job, codes = night_of(SPEC["entrypoint"], monkeypatch)
    gpu = GROUPS["gpu-spot"]
    assert job.output.startswith("s3://")
    assert job.model.checkpoint.startswith("s3://")
    # With zero workers the cluster has no GPU yet: `auto` would mean CPU and one encoder.
    assert job.model.device == "cuda"
    assert job.engine.encoders == gpu["maxReplicas"] * limits(gpu["template"])["nvidia.com/gpu"]
    asked = job.engine.encoder_cpus + job.engine.decoders * job.engine.decoder_cpus
    assert asked <= int(limits(gpu["template"])["cpu"])
    assert all(frames % 4 == 1 for frames in job.clips.frames)
    # A night that ran out of its hours has published: no failure, no repetition.
    assert {outcome for outcome, code in codes.items() if code == 0} == {"done", "nothing", "budget"}


def test_decode_pods_take_decoders_only(monkeypatch):
    group = GROUPS["decode-spot"]
    cpus = limits(group["template"])
    assert "nvidia.com/gpu" not in cpus
    assert EngineConfig().decoder_cpus <= int(cpus["cpu"])
    more = group["maxReplicas"] * int(cpus["cpu"]) // GROUPS["gpu-spot"]["maxReplicas"]
    assert more == 23
    assert night_of(SPEC["entrypoint"], monkeypatch)[0].engine.decoders + more == 52


def test_the_driver_stays_on_the_head_and_no_actor_does():
    head = CLUSTER["headGroupSpec"]
    assert head["resources"] == {"CPU": "0", "head": "1"}
    (name,) = json.loads(SPEC["entrypointResources"])
    assert name in head["resources"]
    assert head["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    assert head["template"]["metadata"]["annotations"]["karpenter.sh/do-not-disrupt"] == "true"


@pytest.mark.parametrize("manifest", [RAYJOB, QUEUED], ids=["rayjob", "kueue"])
def test_resources_of_a_group_are_given_in_one_place(manifest):
    """`validateRayGroupResources` of KubeRay 1.5 to 1.7; from `resources` it makes the parameters itself."""
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        started = {"num-cpus", "num-gpus", "memory", "resources"} & group["rayStartParams"].keys()
        assert not (started and group.get("resources"))


def test_the_driver_finds_the_job_file():
    spec = CLUSTER["headGroupSpec"]["template"]["spec"]
    (mount,), (volume,) = spec["containers"][0]["volumeMounts"], spec["volumes"]
    assert mount["name"] == volume["name"]
    generated = {item["name"]: item["files"] for item in load(DEPLOY / "kustomization.yaml")["configMapGenerator"]}
    assert [f"{mount['mountPath']}/{name}" for name in generated[volume["configMap"]["name"]]] == [JOB_MOUNT]
    # Names inside a config map are not rewritten, so they must not get a hash.
    assert load(DEPLOY / "kustomization.yaml")["generatorOptions"] == {"disableNameSuffixHash": True}


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_a_preempted_pod_has_time_to_drain(name):
    spec = GROUPS[name]["template"]["spec"]
    environment = {item["name"]: item["value"] for item in spec["containers"][0]["env"]}
    drain_s = float(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    grace_s = spec["terminationGracePeriodSeconds"]
    assert drain_s - MARGIN_S >= 60, "most shards are handed back: their last clip and upload do not fit"
    assert grace_s - drain_s >= 10, "no time for Ray to stop its processes"
    assert grace_s <= 120, "AWS takes a spot machine two minutes after the notice"
    assert spec["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}


def test_a_limit_comes_before_every_deadline(monkeypatch):
    job, _ = night_of(SPEC["entrypoint"], monkeypatch)
    assert job.nightly.max_hours * 3600 + 2 * 3600 <= SPEC["activeDeadlineSeconds"]
    job_spec = CRONJOB["jobTemplate"]["spec"]
    assert SPEC["activeDeadlineSeconds"] < job_spec["activeDeadlineSeconds"] < 24 * 3600
    minute, hour, *rest = CRONJOB["schedule"].split()
    assert rest == ["*", "*", "*"]
    assert (minute.isdigit(), hour.isdigit(), CRONJOB["concurrencyPolicy"]) == (True, True, "Forbid")


def test_ends_that_a_repetition_cannot_change_are_not_repeated():
    assert SPEC["backoffLimit"] == 0, "KubeRay repeats every failure; submit_rayjob.py chooses"
    policy = CRONJOB["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    final = {code for rule in policy if rule["action"] == "FailJob" for code in rule["onExitCodes"]["values"]}
    assert final == {EXIT_CODES[name] for name in ("refused", "budget", "gate_failed", "interrupted")}
    assert {EXIT_CODES[name] for name in ("failed", "lease_held")}.isdisjoint(final)
    (container,) = {rule["onExitCodes"]["containerName"] for rule in policy if "onExitCodes" in rule}
    assert container == SUBMIT["containers"][0]["name"]
    assert {"type": "DisruptionTarget"} in policy[0]["onPodConditions"], (
        "before the exit codes: an evicted pod counts for nothing"
    )
    assert SUBMIT["restartPolicy"] == "Never", "demanded beside a podFailurePolicy"


def test_every_pod_is_our_image_without_root():
    specs = [pod["spec"] for pod in [*pods(), SPEC["submitterPodTemplate"]]] + [SUBMIT]
    specs += [job["spec"]["template"]["spec"] for job in jobs().values()]
    images = set()
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        (container,) = spec["containers"]
        images.add(container["image"])
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert CLUSTER["autoscalerOptions"]["securityContext"] == pods()[0]["spec"]["containers"][0]["securityContext"]
    (image,) = images
    assert image.rsplit(":", 1)[1] == PROJECT["version"]
    for pod in pods():
        resources = pod["spec"]["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"], "Ray sizes itself by the limits"


def test_ray_is_the_pinned_one_and_asks_for_a_token():
    assert CLUSTER["rayVersion"] == pins()["ray"]
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_finished_jobs_are_removed_after_their_machines():
    rules = SPEC["deletionStrategy"]["deletionRules"]
    # KubeRay refuses both ways at once, and to delete workers beside its autoscaler (validation.go of 1.7.0).
    assert not {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "suspend"} & set(SPEC)
    order = (
        ["DeleteCluster", "DeleteSelf"]
        if CLUSTER["enableInTreeAutoscaling"]
        else ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    )
    ends = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        ((kind, state),) = condition.items()
        assert (kind, state) in {("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed")}
        ends.setdefault((kind, state), []).append((seconds, rule["policy"]))
    assert len(ends) == 3
    for steps in ends.values():
        assert [policy for _, policy in sorted(steps)] == order


def test_queued_run_has_a_fixed_size_and_fits_its_queue(monkeypatch):
    queues = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kueue" / "queues.yaml").read_text())}
    spec, cluster = QUEUED["spec"], QUEUED["spec"]["rayClusterSpec"]
    assert QUEUED["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": queues["LocalQueue"]["metadata"]["name"]}
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    # Kueue's webhook refuses a job that does not remove its cluster, or scales; KubeRay one that also has deletion rules.
    assert (spec["suspend"], spec["shutdownAfterJobFinishes"], "deletionStrategy" in spec) == (True, True, False)
    assert (cluster["enableInTreeAutoscaling"], "autoscalerOptions" in cluster) == (False, False)
    asked = {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    templates = [(1, cluster["headGroupSpec"]["template"]), (1, spec["submitterPodTemplate"])]
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"]
        templates.append((group["replicas"], group["template"]))
    for count, template in templates:
        for name, amount in limits(template).items():
            asked[name] += count * quantity(amount)
    (resources,) = queues["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = resources["flavors"]
    assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
    quota = {item["name"]: quantity(item["nominalQuota"]) for item in flavor["resources"]}
    assert set(quota) == set(resources["coveredResources"]) == set(asked)
    assert all(asked[name] <= quota[name] < asked[name] * 1.01 + 1 for name in asked), (asked, quota)
    # A cluster that does not grow is refused by the driver unless all encoders and decoders fit.
    job, _ = night_of(spec["entrypoint"], monkeypatch)
    sized = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}["gpu-spot"]
    assert job.engine.encoders == sized["replicas"]


def quantity(text):
    """A Kubernetes quantity as a number; memory in GiB."""
    text = str(text)
    for suffix, factor in (("Gi", 1.0), ("Mi", 1 / 1024), ("m", 1 / 1000)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def test_nightly_account_may_create_and_get_rayjobs_only():
    assert NIGHTLY["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    account = NIGHTLY["ServiceAccount"]["metadata"]["name"]
    assert NIGHTLY["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert NIGHTLY["RoleBinding"]["roleRef"]["name"] == NIGHTLY["Role"]["metadata"]["name"]
    assert SUBMIT["serviceAccountName"] == account


def test_the_nightly_pod_finds_its_script_and_the_manifest():
    (container,) = SUBMIT["containers"]
    interpreter, script, manifest = container["command"]
    assert interpreter == "python"
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    folder, _, name = script.rpartition("/")
    assert f"WORKDIR {folder}\n" in dockerfile
    assert f"COPY deploy/{name} ./" in dockerfile
    (mount,), (volume,) = container["volumeMounts"], SUBMIT["volumes"]
    assert mount["name"] == volume["name"]
    generated = {item["name"]: item["files"] for item in load(DEPLOY / "kustomization.yaml")["configMapGenerator"]}
    (source,) = generated[volume["configMap"]["name"]]
    assert DEPLOY / source == RAYJOB_PATH
    assert f"{mount['mountPath']}/{RAYJOB_PATH.name}" == manifest


def test_the_gated_alternative_has_the_same_times():
    cron = load(DEPLOY / "raycronjob" / "raycronjob.yaml")
    # It knows no concurrency policy, history or starting deadline.
    assert set(cron["spec"]) <= {"jobTemplate", "schedule", "suspend", "timeZone"}
    assert (cron["spec"]["schedule"], cron["spec"]["timeZone"]) == (CRONJOB["schedule"], CRONJOB["timeZone"])
    assert len(cron["metadata"]["name"]) <= 36, "KubeRay appends eleven characters"


def test_prometheus_and_grafana_find_what_they_look_for():
    monitor = load(DEPLOY / "monitoring" / "podmonitor.yaml")["spec"]
    # Both are KubeRay's: the label of every Ray pod, the name of the port that it adds to every Ray container.
    assert monitor["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert [endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]] == ["metrics"]
    dashboard = load(DEPLOY / "grafana" / "kustomization.yaml")
    assert dashboard["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}
    (generated,) = dashboard["configMapGenerator"]
    for name in generated["files"]:
        assert json.loads((DEPLOY / "grafana" / name).read_text())["panels"]


def test_no_manifest_holds_a_secret():
    for path in (*DEPLOY.rglob("*.yaml"), DEPLOY / "Dockerfile"):
        text = path.read_text().lower()
        for word in ("aws_access_key", "aws_secret", "akia", "password", "kind: secret", "auth_token:"):
            assert word not in text, path.name


@pytest.mark.parametrize("name", ["takedown", "compact", "gc"])
def test_maintenance_jobs_run_valid_commands_on_the_same_output(name):
    job = jobs()[f"{name}.yaml"]
    spec = job["spec"]["template"]["spec"]
    program, command, output, *rest = spec["containers"][0]["command"]
    assert (program, command, output) == ("lathe", name, load(JOB_PATH)["output"])
    # Parsed by the command line itself: a flag that is gone raises.
    typer.main.get_command(cli.app).commands[command].make_context(command, [output, *rest])
    assert (name == "gc") == ("--dry-run" in rest)
    assert job["metadata"]["generateName"] == f"lathe-{name}-"
    assert spec["restartPolicy"] == "Never", "demanded beside a podFailurePolicy"
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [ConfigError.exit_code])
