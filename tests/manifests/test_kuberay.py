"""The Kubernetes objects, as kustomize makes them, against their schemas and against each other."""

import copy
import re
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.manifests.rendered import (
    FOLDERS,
    JOBS,
    OVERLAYS,
    ROOT,
    cluster_specs,
    groups,
    job,
    needs_kustomize,
    objects,
    only,
)
from tests.manifests.schemas import Manifest, complaints

pytestmark = [pytest.mark.manifests, needs_kustomize]

PART = {"app.kubernetes.io/part-of": "rlgen"}


def pods() -> dict[str, Manifest]:
    """Every pod template that is written here, by cluster and group."""
    found = {
        f"{name}, {group.get('groupName', 'head')}": group["template"]
        for name, cluster in cluster_specs().items()
        for group in groups(cluster)
    }
    submitters = {f"job {name}, submitter": job(name)["spec"] for name in JOBS}
    return {**found, **{name: spec["submitterPodTemplate"] for name, spec in submitters.items()}}


def test_there_is_a_job_for_each_family_on_digits_and_published() -> None:
    assert OVERLAYS == ["cpu", "gpu", "spot-gpu"]
    assert {"digits", "digits-var", "digits-vqgan"} <= set(JOBS)
    for family in ("llamagen-", "var-", "vqgan-"):
        assert any(name.startswith(family) for name in JOBS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_kustomize_makes_fits_the_schemas(folder: str) -> None:
    for manifest in objects(folder):
        assert complaints(manifest) == [], manifest["kind"]
        name = manifest["metadata"]
        assert (name["name"] if manifest["kind"] == "Namespace" else name["namespace"]) == "rlgen"


def test_a_single_object_fits_its_schema() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "jobs").glob("*.yaml")]
    documents = [d for text in texts for d in yaml.safe_load_all(text) if "apiVersion" in d]
    assert [complaints(document) for document in documents if complaints(document)] == []


def rename(tree: Manifest, old: str, new: str) -> None:
    tree[new] = tree.pop(old)


def head(manifest: Manifest) -> Manifest:
    return manifest["spec"]["rayClusterSpec"]["headGroupSpec"]


def head_pod(manifest: Manifest) -> Manifest:
    return head(manifest)["template"]["spec"]


MISTAKES: dict[str, tuple[str, Callable[[Manifest], Any], str]] = {
    "misspelt field of the job": (
        "RayJob",
        lambda m: rename(m["spec"], "entrypoint", "entryPoint"),
        "entryPoint",
    ),
    "misspelt field of the cluster": (
        "RayJob",
        lambda m: rename(head(m), "rayStartParams", "rayStartParam"),
        "rayStartParam",
    ),
    "misspelt field of a container": (
        "RayJob",
        lambda m: rename(head_pod(m)["containers"][0], "volumeMounts", "volumeMount"),
        "volumeMount",
    ),
    "misspelt field of a security context": (
        "RayJob",
        lambda m: rename(head_pod(m)["securityContext"], "runAsNonRoot", "runAsNonroot"),
        "runAsNonroot",
    ),
    "misspelt field of a probe": (
        "RayJob",
        lambda m: rename(head_pod(m)["containers"][0]["livenessProbe"], "httpGet", "httpget"),
        "httpget",
    ),
    "number as text": ("RayJob", lambda m: m["spec"].update(backoffLimit="1"), "backoffLimit"),
    "no containers": ("RayJob", lambda m: head_pod(m).pop("containers"), "containers"),
    "no name": ("RayJob", lambda m: m["metadata"].pop("name"), "name"),
    "name of 48 characters": (
        "RayJob",
        lambda m: m["metadata"].update(name="a" * 48),
        "metadata.name",
    ),
    "text as a list": (
        "ConfigMap",
        lambda m: m["data"].update({"run.yaml": ["steps: 3"]}),
        "run.yaml",
    ),
    "misspelt field of a policy": (
        "NetworkPolicy",
        lambda m: rename(m["spec"], "ingress", "ingres"),
        "ingres",
    ),
    "misspelt field of a claim": (
        "PersistentVolumeClaim",
        lambda m: rename(m["spec"], "accessModes", "accessMode"),
        "accessMode",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    kind, make, word = MISTAKES[mistake]
    all_objects = [*objects("jobs/kubernetes/digits"), *objects("cluster/namespace")]
    manifest = copy.deepcopy(next(m for m in all_objects if m["kind"] == kind))
    make(manifest)
    assert any(word in complaint for complaint in complaints(manifest))


def test_image_and_ray_are_the_project_s() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = tomllib.loads(project)["project"]["version"]
    for name, pod in pods().items():
        assert {c["image"] for c in pod["spec"]["containers"]} == {f"rlgen:{version}"}, name
    pins = (ROOT / "infra" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for name, cluster in cluster_specs().items():
        assert f"ray=={cluster['rayVersion']}" in pins, name


def test_every_pod_may_enter_a_restricted_namespace() -> None:
    labels = only("cluster/namespace", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, pod in pods().items():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 1000, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["spec"]["containers"]:
            confine(container["securityContext"])
            assert container["resources"]["requests"] == container["resources"]["limits"], name
        kinds = {next(kind for kind in v if kind != "name") for v in pod["spec"].get("volumes", [])}
        assert kinds <= {"persistentVolumeClaim", "emptyDir", "projected"}, name
    for cluster in cluster_specs().values():
        if cluster["enableInTreeAutoscaling"]:
            confine(cluster["autoscalerOptions"]["securityContext"])


def confine(security: Manifest) -> None:
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_only_the_head_may_talk_to_kubernetes() -> None:
    """Its autoscaler adds pods there; a worker has no business with it."""
    for name, pod in pods().items():
        is_head = name.endswith(", head")
        assert pod["spec"].get("automountServiceAccountToken", True) is is_head, name


def test_pods_take_connections_from_each_other_the_operator_and_prometheus_alone() -> None:
    policy = only("cluster/namespace", "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == PART and policy["policyTypes"] == ["Ingress"]
    for name, pod in pods().items():
        assert PART.items() <= pod["metadata"]["labels"].items(), name
    inside, operator, prometheus = policy["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": PART}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert {port["port"] for port in prometheus["ports"]}.isdisjoint({8265, 6379, 10001})
    for rule in (operator, prometheus):
        assert all(any(source[key] for key in source) for source in rule["from"])


def test_claims_and_config_maps_that_pods_name_exist() -> None:
    claim = only("cluster/namespace", "PersistentVolumeClaim")["metadata"]["name"]
    for folder in FOLDERS[1:]:
        made = {m["metadata"]["name"] for m in objects(folder) if m["kind"] == "ConfigMap"}
        [ray] = [m for m in objects(folder) if m["kind"] != "ConfigMap"]
        cluster = ray["spec"].get("rayClusterSpec", ray["spec"])
        assert set(re.findall(r"'configMap': {'name': '([^']+)'}", str(cluster))) == made
        assert set(re.findall(r"'claimName': '([^']+)'", str(cluster))) == {claim}


def test_secrets_are_named_and_never_written() -> None:
    readme = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"create secret generic (\S+)((?:\\\n|[^\n])*)", readme)
    made = {name: set(re.findall(r"--from-literal=(\w+)=", words)) for name, words in commands}
    for name, cluster in cluster_specs().items():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "rlgen-ray"}, name
        for group in groups(cluster):
            for variable in group["template"]["spec"]["containers"][0]["env"]:
                if not re.search(r"KEY|SECRET|TOKEN|PASSWORD|USERNAME", variable["name"]):
                    continue
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["key"] in made[reference["name"]], reference
    assert made["rlgen-ray"] == {"auth_token"}
    assert not any(m["kind"] == "Secret" for folder in FOLDERS for m in objects(folder))


def test_probes_ask_what_answers_without_a_token() -> None:
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    for name, cluster in cluster_specs().items():
        for group in groups(cluster):
            [container] = group["template"]["spec"]["containers"]
            is_head = "groupName" not in group
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container[kind]["httpGet"]
                if is_head:
                    assert asked == {"path": "/api/gcs_healthz", "port": 8265}, name
                else:
                    assert asked["path"] in PUBLIC_EXACT_PATHS and asked["port"] == 52365, name


def test_the_object_store_fits_into_shared_memory() -> None:
    """Ray falls back to files in /tmp, with a warning only, where /dev/shm is too small."""
    for cluster in cluster_specs().values():
        for group in groups(cluster):
            pod = group["template"]["spec"]
            [container] = pod["containers"]
            mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            shared_memory = volumes[mounts["/dev/shm"]]["emptyDir"]
            assert shared_memory["medium"] == "Memory"
            limit = num_bytes(shared_memory["sizeLimit"])
            assert int(group["rayStartParams"]["object-store-memory"]) < limit
            assert limit < num_bytes(container["resources"]["limits"]["memory"]) / 2


def num_bytes(quantity: str) -> int:
    number, unit = quantity[:-2], quantity[-2:]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]
