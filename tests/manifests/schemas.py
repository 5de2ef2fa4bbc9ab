"""What a Kubernetes object may hold: schemas of KubeRay's and of Kubernetes' own kinds.

data/rayclusters_v1 and rayjobs_v1 hold versions[v1].schema.openAPIV3Schema of
ray.io_rayclusters.yaml and ray.io_rayjobs.yaml from ray-project/kuberay v1.7.0
(ray-operator/config/crd/bases, Apache-2.0), as JSON. data/core_v1.33 holds the strict definitions
of Kubernetes 1.33 (Apache-2.0) that are used here, without their descriptions, as the package
kubernetes-validate 1.37.0 brings them. Rules in Kubernetes' expression language
(x-kubernetes-validations) are not evaluated.
"""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

Manifest = dict[str, Any]

_DATA = Path(__file__).parent / "data"
_KUBERAY = {"RayCluster": "rayclusters_v1.json.gz", "RayJob": "rayjobs_v1.json.gz"}
_CORE = {
    "ConfigMap": "io.k8s.api.core.v1.ConfigMap",
    "Namespace": "io.k8s.api.core.v1.Namespace",
    "NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "PersistentVolumeClaim": "io.k8s.api.core.v1.PersistentVolumeClaim",
}


def complaints(manifest: Manifest) -> list[str]:
    """What the schema of the object's kind has against it."""
    found = _validator(manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


@functools.cache
def _validator(kind: str) -> Draft202012Validator:
    if kind in _CORE:
        core = _read("core_v1.33.json.gz")
        return Draft202012Validator({**core, "$ref": f"#/$defs/{_CORE[kind]}"})
    root = _strict(_read(_KUBERAY[kind]))
    # The API server itself checks metadata; the schema says no more than that it is an object.
    root["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 47, "pattern": r"^[a-z]([a-z0-9-]*[a-z0-9])?$"},
            "namespace": {"type": "string"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
        "additionalProperties": False,
        "required": ["name"],
    }
    root["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator(root)


def _read(name: str) -> Manifest:
    return json.loads(gzip.decompress((_DATA / name).read_bytes()))


def _strict(node: Any) -> Any:
    """Turn a structural schema of Kubernetes into JSON Schema that refuses unknown fields."""
    if not isinstance(node, dict):
        return node
    schema = {
        key: value
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key not in ("default", "format", "nullable")
    }
    if node.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in node:
        schema["properties"] = {k: _strict(v) for k, v in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(node["additionalProperties"])
    if "items" in node:
        schema["items"] = _strict(node["items"])
    if node.get("nullable"):
        return {"anyOf": [schema, {"type": "null"}]}
    return schema
