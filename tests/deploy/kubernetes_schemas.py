"""Closed JSON schemas of the kinds in `deploy/`, cut from the operators' CRDs and from Kubernetes' own definitions.

`problems(document)` checks one document against `kubernetes_schemas.json`. A misspelt field is a problem here; an API server drops it in
silence. Not checked: rules that the operators have in code (`test_kubernetes.py` repeats those that matter).

To cut them anew: put the CRDs of KubeRay 1.7.0 (`ray.io_rayjobs.yaml`, `ray.io_raycronjobs.yaml`), of Kueue 0.19.2
(`kueue.x-k8s.io_clusterqueues.yaml`, `…_localqueues.yaml`, `…_resourceflavors.yaml`) and of the Prometheus operator
(`monitoring.coreos.com_podmonitors.yaml`) into a folder, with `_definitions.json` of Kubernetes 1.37 (kubernetes-validate on PyPI), then
`python -m tests.deploy.kubernetes_schemas FOLDER`. All of them are under the Apache License 2.0.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml

PATH = Path(__file__).with_name("kubernetes_schemas.json")
OF_KUBERNETES = {
    ("batch/v1", "CronJob"): "io.k8s.api.batch.v1.CronJob",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("rbac.authorization.k8s.io/v1", "Role"): "io.k8s.api.rbac.v1.Role",
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): "io.k8s.api.rbac.v1.RoleBinding",
    ("v1", "ConfigMap"): "io.k8s.api.core.v1.ConfigMap",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
}
# Parts that no manifest here should have, and that are most of the bytes: a manifest that has one fails as with an unknown field.
LEFT_OUT = {"affinity", "initContainers", "ephemeralContainers", "managedFields", "gcsFaultToleranceOptions"}
VOLUMES = {"name", "configMap", "emptyDir", "hostPath", "persistentVolumeClaim", "projected", "secret"}


def problems(document: dict[str, Any]) -> list[str]:
    """Where the document differs from its kind's schema; empty if it is valid."""
    kind = f"{document['apiVersion']} {document['kind']}"
    validators = _validators()
    if kind not in validators:
        return [f"no schema of {kind}"]
    errors = validators[kind].iter_errors(document)
    return [f"{kind} {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@functools.cache
def _validators() -> dict[str, jsonschema.Draft7Validator]:
    stored = json.loads(PATH.read_text())
    parts = {"definitions": stored["definitions"]}
    return {kind: jsonschema.Draft7Validator({**schema, **parts}) for kind, schema in stored["kinds"].items()}


class Cut:
    """Closes schemas, drops prose, and stores each object schema once, in `definitions`."""

    def __init__(self, kubernetes: dict[str, Any]) -> None:
        self.definitions: dict[str, Any] = {}
        self._kubernetes = kubernetes
        self._names: dict[str, str] = {}

    def schema(self, source: dict[str, Any]) -> dict[str, Any]:
        """`source` with references resolved, closed."""
        if "$ref" in source:
            return self.schema(self._kubernetes[source["$ref"].rsplit("/", 1)[1]])
        if source.get("x-kubernetes-int-or-string") or source.get("oneOf") == [{"type": "string"}, {"type": "integer"}]:
            return {"type": ["integer", "string"]}
        out = {
            key: source[key] for key in ("type", "enum", "required", "pattern", "minimum", "maximum") if key in source
        }
        if "items" in source:
            out["items"] = self.schema(source["items"])
        if isinstance(more := source.get("additionalProperties"), dict):
            out["additionalProperties"] = self.schema(more)
        if "properties" not in source:
            return out
        kept = {name: part for name, part in source["properties"].items() if name not in LEFT_OUT}
        if {"name", "awsElasticBlockStore"} <= set(kept):
            kept = {name: part for name, part in kept.items() if name in VOLUMES}
        out["properties"] = {name: self.schema(part) for name, part in kept.items()}
        if not source.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
        return self._shared(out)

    def _shared(self, schema: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(schema, sort_keys=True)
        name = self._names.setdefault(text, f"d{len(self._names)}")
        self.definitions[name] = schema
        return {"$ref": f"#/definitions/{name}"}


def cut(folder: Path) -> dict[str, Any]:
    """What `kubernetes_schemas.json` holds: {"kinds": "apiVersion kind" -> schema, "definitions": name -> schema}."""
    kubernetes = json.loads((folder / "_definitions.json").read_text())
    kubernetes = kubernetes.get("$defs") or kubernetes["definitions"]
    cutter, kinds = Cut(kubernetes), {}
    meta = kubernetes["io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"]
    for (version, kind), name in OF_KUBERNETES.items():
        kinds[f"{version} {kind}"] = _of_kind(cutter, kubernetes[name], version, kind, meta)
    for path in sorted(folder.glob("*.yaml")):
        crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        (version,) = (item for item in crd["versions"] if item["storage"])
        name = f"{crd['group']}/{version['name']}"
        source = version["schema"]["openAPIV3Schema"]
        kinds[f"{name} {crd['names']['kind']}"] = _of_kind(cutter, source, name, crd["names"]["kind"], meta)
    return {"kinds": kinds, "definitions": cutter.definitions}


def _of_kind(cutter: Cut, source: dict[str, Any], version: str, kind: str, meta: dict[str, Any]) -> dict[str, Any]:
    of_users = {name: part for name, part in source["properties"].items() if name != "status"}
    own = {"apiVersion": {"enum": [version]}, "kind": {"enum": [kind]}, "metadata": meta}
    required = sorted({"apiVersion", "kind", "metadata", *source.get("required", ())})
    return cutter.schema({**source, "properties": {**of_users, **own}, "required": required})


if __name__ == "__main__":
    PATH.write_text(json.dumps(cut(Path(sys.argv[1])), separators=(",", ":"), sort_keys=True) + "\n")
