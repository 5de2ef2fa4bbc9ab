"""What kustomize makes of the files in cluster/ and jobs/kubernetes, and how to look into it."""

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.manifests.schemas import Manifest

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.parent.name for path in ROOT.glob("cluster/overlays/*/kustomization.yaml"))
JOBS = sorted(path.parent.name for path in ROOT.glob("jobs/kubernetes/*/run.yaml"))
FOLDERS = [
    "cluster/namespace",
    *(f"cluster/overlays/{name}" for name in OVERLAYS),
    *(f"jobs/kubernetes/{name}" for name in JOBS),
]

_TOOLS = {"kubectl": "kustomize", "kustomize": "build"}
_TOOL = next((name for name in _TOOLS if shutil.which(name)), None)
needs_kustomize = pytest.mark.skipif(_TOOL is None, reason="needs kubectl or kustomize on the PATH")


@functools.cache
def objects(folder: str) -> tuple[Manifest, ...]:
    """The Kubernetes objects of a folder with a kustomization.yaml; must not be changed."""
    assert _TOOL is not None
    command = [_TOOL, _TOOLS[_TOOL], str(ROOT / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return tuple(yaml.safe_load_all(done.stdout))


def only(folder: str, kind: str) -> Manifest:
    """The one object of this kind."""
    [found] = [manifest for manifest in objects(folder) if manifest["kind"] == kind]
    return found


def job(name: str) -> Manifest:
    """The RayJob of jobs/kubernetes/NAME."""
    return only(f"jobs/kubernetes/{name}", "RayJob")


def cluster_specs() -> dict[str, Manifest]:
    """Every Ray cluster, of an overlay or inside a job."""
    return {
        **{name: only(f"cluster/overlays/{name}", "RayCluster")["spec"] for name in OVERLAYS},
        **{f"job {name}": job(name)["spec"]["rayClusterSpec"] for name in JOBS},
    }


def groups(cluster: Manifest) -> list[Manifest]:
    """The head's group and those of the workers."""
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def files(folder: str, name: str) -> dict[str, str]:
    """The files of the config map that was generated under this name."""
    maps = [m for m in objects(folder) if m["kind"] == "ConfigMap"]
    [found] = [m for m in maps if m["metadata"]["name"].startswith(f"{name}-")]
    return found["data"]
