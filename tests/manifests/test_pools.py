"""What jobs ask for is what pools offer: every entrypoint executed, every role put on a node."""

import copy
import math
import shlex
from pathlib import Path

import pytest

from rlgen.config.load import load_config
from rlgen.config.models import MODELS
from rlgen.config.plan import check_required
from rlgen.config.roles import Node, role_resources, unmet_roles
from rlgen.config.run import RunConfig
from rlgen.jobs import grpo
from tests.manifests.rendered import (
    JOBS,
    ROOT,
    cluster_specs,
    files,
    job,
    needs_kustomize,
    only,
)
from tests.manifests.schemas import Manifest

pytestmark = [pytest.mark.manifests, needs_kustomize]

POLICIES = [name for name, spec in MODELS.items() if not spec.is_tokenizer]


def nodes(cluster: Manifest) -> list[Node]:
    """What Ray sees of a cluster at its largest; the head takes no work."""
    found = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        name, number = group["groupName"], group["maxReplicas"]
        found += [Node(f"{name}-{i}", has, has, group["labels"]) for i in range(number)]
    return found


def arguments(name: str, folder: Path) -> list[str]:
    """The entrypoint's words after the module, with the files that the head would find."""
    for kind in ("pool", "run"):
        text = files(f"jobs/kubernetes/{name}", f"rlgen-{kind}")[f"{kind}.yaml"]
        (folder / f"{kind}.yaml").write_text(text)
    python, option, module, *words = shlex.split(job(name)["spec"]["entrypoint"])
    assert (python, option, module) == ("python", "-m", "rlgen.jobs.grpo")
    places = {"/app/": f"{ROOT}/", "/etc/rlgen/": f"{folder}/"}
    for place, real in places.items():
        words = [word.replace(place, real) if word.startswith(place) else word for word in words]
    return words


def config_of(name: str, folder: Path) -> RunConfig:
    words = arguments(name, folder)
    return load_config([words[i + 1] for i, word in enumerate(words) if word == "--config"])


@pytest.mark.parametrize("name", JOBS)
def test_the_entrypoint_plans_its_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grpo.main([*arguments(name, tmp_path), "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "rollout" in plan and "rlgen/role=rollout" in plan
    assert "to be given" not in plan


@pytest.mark.parametrize("name", JOBS)
def test_a_job_has_all_it_needs_and_goes_on_after_a_loss(name: str, tmp_path: Path) -> None:
    config = config_of(name, tmp_path)
    check_required(config)
    assert config.checkpoint.resume == "auto"
    spec = job(name)["spec"]
    assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0 and spec["activeDeadlineSeconds"] > 0
    [pod] = [group["template"]["spec"] for group in [spec["rayClusterSpec"]["headGroupSpec"]]]
    [container] = pod["containers"]
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    words = arguments(name, tmp_path)
    output = Path(words[words.index("--output") + 1])
    assert str(output.parents[1]) in mounts, "the run folder outlives the pod"


def test_no_two_jobs_write_to_one_place(tmp_path: Path) -> None:
    places: list[str | None] = []
    for name in JOBS:
        words = arguments(name, tmp_path)
        places += [words[words.index("--output") + 1], config_of(name, tmp_path).checkpoint.uri]
    assert all(place and place.startswith(("/data/", "s3://")) for place in places)
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", JOBS)
def test_every_role_of_a_job_finds_a_node(name: str, tmp_path: Path) -> None:
    cluster = job(name)["spec"]["rayClusterSpec"]
    assert unmet(config_of(name, tmp_path), nodes(cluster)) == []


def unmet(config: RunConfig, offered: list[Node]) -> list[str]:
    """Roles without a node when all workers that may join have joined."""
    most = config.with_values({"rollout.min_workers": None, "reward.min_workers": None})
    return [role.role.name for role in unmet_roles(role_resources(most), offered)]


@pytest.mark.parametrize("preset", POLICIES)
@pytest.mark.parametrize("overlay", ["gpu", "spot-gpu"])
def test_every_published_preset_runs_on_the_gpu_pools(
    overlay: str, preset: str, tmp_path: Path
) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(files(f"cluster/overlays/{overlay}", "rlgen-pool")["pool.yaml"])
    config = load_config([str(ROOT / "jobs" / f"{preset}.yaml"), str(pool)])
    offered = nodes(only(f"cluster/overlays/{overlay}", "RayCluster")["spec"])
    assert unmet(config, offered) == []
    used = sum(role.num_gpus * role.count for role in role_resources(config))
    assert used <= math.fsum(node.total["GPU"] for node in offered)


@pytest.mark.parametrize("group", ["rollout", "reward", "learner"])
def test_a_label_that_differs_from_the_selector_is_found(group: str, tmp_path: Path) -> None:
    cluster = copy.deepcopy(job("vqgan-1.4b-256")["spec"]["rayClusterSpec"])
    [changed] = [one for one in cluster["workerGroupSpecs"] if one["groupName"] == group]
    changed["labels"]["rlgen/role"] = "sampler"
    missing = unmet(config_of("vqgan-1.4b-256", tmp_path), nodes(cluster))
    assert group in missing


def test_what_holds_the_state_of_a_run_is_not_on_spot_nodes(tmp_path: Path) -> None:
    spot = cluster_specs()["spot-gpu"]
    assert spot["enableInTreeAutoscaling"] is True and spot["autoscalerOptions"]["version"] == "v2"
    market = {}
    for group in spot["workerGroupSpecs"]:
        market[group["groupName"]] = group["labels"]["ray.io/market-type"]
        wanted = group["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"]
        assert wanted == market[group["groupName"]]
    assert market == {"rollout": "spot", "reward": "on-demand", "learner": "on-demand"}
    head = spot["headGroupSpec"]["template"]["spec"]
    assert head["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    config = config_of("vqgan-1.4b-256", tmp_path)
    assert config.rollout.min_workers == 1 and config.rollout.num_workers > 1
