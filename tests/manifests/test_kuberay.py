"""The Kubernetes manifests against the schemas of KubeRay's custom resources.

data/ holds versions[v1].schema.openAPIV3Schema of ray.io_rayclusters.yaml and ray.io_rayjobs.yaml
from ray-project/kuberay v1.7.0 (ray-operator/config/crd/bases, Apache-2.0), as JSON. A claim for a
volume is checked against the copy of its schema inside them. Rules in Kubernetes' expression
language (x-kubernetes-validations) are not evaluated.
"""

import copy
import gzip
import importlib.util
import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from rlgen.jobs.cli import parse_request

pytestmark = pytest.mark.manifests

ROOT = Path(__file__).resolve().parents[2]
CRD_FILES = {"RayCluster": "rayclusters_v1.json.gz", "RayJob": "rayjobs_v1.json.gz"}
CLAIM = "spec headGroupSpec template spec volumes [] ephemeral volumeClaimTemplate spec"

Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """Every Kubernetes object under jobs/ and cluster/, by file and name."""
    files = [f for folder in ("jobs", "cluster") for f in sorted((ROOT / folder).rglob("*.yaml"))]
    documents = [(f, d) for f in files for d in yaml.safe_load_all(f.read_text())]
    return {f"{f.name}:{d['kind']}": d for f, d in documents if "kind" in d}


def strict_schema(node: Any) -> Any:
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
        schema["properties"] = {k: strict_schema(v) for k, v in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
    if isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = strict_schema(node["additionalProperties"])
    if "items" in node:
        schema["items"] = strict_schema(node["items"])
    if node.get("nullable"):
        return {"anyOf": [schema, {"type": "null"}]}
    return schema


def validator(kind: str) -> Draft202012Validator:
    if kind == "PersistentVolumeClaim":
        claim = crd("RayCluster")
        for part in CLAIM.split():
            claim = claim["items"] if part == "[]" else claim["properties"][part]
        properties = {name: {"type": "string"} for name in ("apiVersion", "kind")}
        root = {"type": "object", "properties": properties | {"metadata": {}, "spec": claim}}
    else:
        root = crd(kind)
    # The API server itself checks metadata; the schema says no more than that it is an object.
    root["properties"]["metadata"] = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 63, "pattern": r"^[a-z]([a-z0-9-]*[a-z0-9])?$"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
        },
    }
    root["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator(strict_schema(root))


def crd(kind: str) -> Manifest:
    packed = Path(__file__).parent / "data" / CRD_FILES[kind]
    return json.loads(gzip.decompress(packed.read_bytes()))


def complaints(manifest: Manifest) -> list[str]:
    found = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def cluster_spec(manifest: Manifest) -> Manifest:
    """The cluster inside a RayJob, or the RayCluster itself."""
    return manifest["spec"].get("rayClusterSpec", manifest["spec"])


def pod_specs(manifest: Manifest) -> list[Manifest]:
    cluster = cluster_spec(manifest)
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    return [group["template"]["spec"] for group in groups]


ALL = manifests()
RAY = {name: manifest for name, manifest in ALL.items() if manifest["kind"] in CRD_FILES}
JOBS = {name: manifest for name, manifest in RAY.items() if manifest["kind"] == "RayJob"}


def test_both_kinds_are_there() -> None:
    assert {manifest["kind"] for manifest in RAY.values()} == set(CRD_FILES)


@pytest.mark.parametrize("name", ALL)
def test_fits_its_schema(name: str) -> None:
    assert complaints(ALL[name]) == []


def rename(tree: Manifest, old: str, new: str) -> None:
    tree[new] = tree.pop(old)


MISTAKES: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "misspelt field of the job": (
        lambda m: rename(m["spec"], "entrypoint", "entryPoint"),
        "entryPoint",
    ),
    "misspelt field of the cluster": (
        lambda m: rename(cluster_spec(m)["headGroupSpec"], "rayStartParams", "rayStartParam"),
        "rayStartParam",
    ),
    "misspelt field of a container": (
        lambda m: rename(pod_specs(m)[0]["containers"][0], "volumeMounts", "volumeMount"),
        "volumeMount",
    ),
    "misspelt field of a security context": (
        lambda m: rename(pod_specs(m)[0]["securityContext"], "runAsNonRoot", "runAsNonroot"),
        "runAsNonroot",
    ),
    "number as text": (lambda m: m["spec"].update(backoffLimit="1"), "backoffLimit"),
    "no containers": (lambda m: pod_specs(m)[0].pop("containers"), "containers"),
    "no name": (lambda m: m.pop("metadata"), "metadata"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_found(mistake: str) -> None:
    manifest = copy.deepcopy(next(iter(JOBS.values())))
    make, word = MISTAKES[mistake]
    make(manifest)
    assert any(word in complaint for complaint in complaints(manifest))


def test_misspelt_claim_is_found() -> None:
    claim = copy.deepcopy(next(m for m in ALL.values() if m["kind"] == "PersistentVolumeClaim"))
    rename(claim["spec"], "accessModes", "accessMode")
    assert any("accessMode" in complaint for complaint in complaints(claim))


@pytest.mark.parametrize("name", JOBS)
def test_entrypoint_exists(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    python, option, module, *arguments = shlex.split(JOBS[name]["spec"]["entrypoint"])
    assert (python, option) == ("python", "-m")
    assert importlib.util.find_spec(module) is not None
    parse_request(arguments, job=module.rpartition(".")[2], description="")


@pytest.mark.parametrize("name", RAY)
def test_versions_are_the_projects(name: str) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    images = {c["image"] for pod in pod_specs(RAY[name]) for c in pod["containers"]}
    assert images == {f"rlgen:{tomllib.loads(project)['project']['version']}"}
    pins = (ROOT / "infra" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"ray=={cluster_spec(RAY[name])['rayVersion']}" in pins


@pytest.mark.parametrize("name", RAY)
def test_pods_are_confined(name: str) -> None:
    for pod in pod_specs(RAY[name]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("name", RAY)
def test_volumes_fit(name: str) -> None:
    claims = {m["metadata"]["name"] for m in ALL.values() if m["kind"] == "PersistentVolumeClaim"}
    for pod in pod_specs(RAY[name]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {v["mountPath"]: volumes[v["name"]] for v in container["volumeMounts"]}
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        named = [v["persistentVolumeClaim"] for v in pod["volumes"] if "emptyDir" not in v]
        assert {claim["claimName"] for claim in named} <= claims


@pytest.mark.parametrize("name", RAY)
def test_object_store_fits_into_shared_memory(name: str) -> None:
    """Ray falls back to files in /tmp, with a warning only, where /dev/shm is too small."""
    cluster = cluster_spec(RAY[name])
    for group in [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]:
        store = int(group["rayStartParams"]["object-store-memory"])
        volumes = group["template"]["spec"]["volumes"]
        [limit] = [v["emptyDir"]["sizeLimit"] for v in volumes if "emptyDir" in v]
        assert store < int(limit.removesuffix("Mi")) * 2**20
