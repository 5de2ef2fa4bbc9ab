"""What the autoscaler of the installed Ray makes of a pool: the nodes that it would add for a run.

It reads the cluster as KubeRay would give it to it, and gets the run's request for room, which is
one placement group; nothing is started.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import BundleSelector, GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator

from rlgen.config.roles import Role, role_resources
from tests.manifests.rendered import OVERLAYS, needs_kustomize, only
from tests.manifests.schemas import Manifest
from tests.manifests.test_pools import config_of, nodes

pytestmark = [pytest.mark.manifests, needs_kustomize]

IS_IN = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")


def pool(name: str) -> Manifest:
    """A copy of the RayCluster of an overlay."""
    return copy.deepcopy(only(f"cluster/overlays/{name}", "RayCluster"))


def added_nodes(cluster: Manifest, roles: Sequence[Role]) -> dict[str, int] | None:
    """Nodes by group that the autoscaler would add for these roles; None if they can't fit."""
    read = AutoscalingConfig(
        _derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True
    )
    bundles = [
        ResourceRequestUtil.make(
            role.resources,
            label_selectors=[[(key, IS_IN, [value]) for key, value in role.label_selector.items()]],
        )
        for role in roles
        for _ in range(role.count)
    ]
    group = GangResourceRequest(bundle_selectors=[BundleSelector(resource_requests=bundles)])
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=read.get_node_type_configs(),
            max_num_nodes=read.get_max_num_nodes(),
            gang_resource_requests=[group],
        )
    )
    if reply.infeasible_gang_resource_requests:
        return None
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("name", OVERLAYS)
def test_it_reads_the_groups_as_they_are_meant(name: str) -> None:
    cluster = pool(name)
    read = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        node_type = read[group["groupName"]]
        assert node_type["labels"] == group["labels"]
        assert node_type["max_workers"] == group["maxReplicas"]
        expected = nodes({"workerGroupSpecs": [{**group, "maxReplicas": 1}]})[0]
        assert node_type["resources"]["CPU"] == expected.total["CPU"]
        assert node_type["resources"].get("GPU", 0) == expected.total["GPU"]
    assert read["headgroup"]["resources"]["CPU"] == 0


def test_a_run_gets_the_nodes_that_it_starts_with_and_then_those_that_may_join(
    tmp_path: Path,
) -> None:
    config = config_of("vqgan-1.4b-256", tmp_path)
    started = added_nodes(pool("spot-gpu"), role_resources(config))
    assert started == {"rollout": 1, "reward": 1, "learner": 1}
    most = config.with_values({"rollout.min_workers": None})
    joined = added_nodes(pool("spot-gpu"), role_resources(most))
    assert joined == {"rollout": 4, "reward": 1, "learner": 1}


@pytest.mark.parametrize("label", ["rlgen/role", "ray.io/market-type"])
def test_no_node_is_added_for_labels_that_no_group_has(label: str, tmp_path: Path) -> None:
    cluster = pool("spot-gpu")
    cluster["spec"]["workerGroupSpecs"][0]["labels"][label] = "other"
    roles = role_resources(config_of("vqgan-1.4b-256", tmp_path))
    assert added_nodes(cluster, roles) is None
