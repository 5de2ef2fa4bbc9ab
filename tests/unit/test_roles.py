"""What fits on which nodes, and how the plan and the errors say it."""

import pytest

from rlgen.config import load_config
from rlgen.config.plan import describe_plan
from rlgen.config.roles import Node, Role, Unmet, matches, role_resources, unmet_roles
from rlgen.errors import ConfigError

SPOT, ON_DEMAND = {"market": "spot"}, {"market": "on-demand"}


def node(cpus: float, gpus: float = 0.0, *, free: dict | None = None, labels=None) -> Node:
    total = {"CPU": cpus, "GPU": gpus}
    return Node("10.0.0.1", total, total if free is None else free, labels or {})


def role(count: int, cpus: float, gpus: float = 0.0, *, labels=None, name: str = "rollout") -> Role:
    return Role(name, count, 1, cpus, gpus, labels or {})


def missing(roles: list[Role], nodes: list[Node], **options) -> dict[str, int]:
    return {unmet.role.name: unmet.num_missing for unmet in unmet_roles(roles, nodes, **options)}


def test_what_fits_is_not_missing() -> None:
    assert missing([role(4, 1, 1), role(8, 0.5, name="reward")], [node(4, 2), node(4, 2)]) == {}


def test_missing_processes_are_counted_by_role() -> None:
    roles = [role(5, 1, 1), role(9, 1, name="reward")]
    assert missing(roles, [node(8, 2), node(2, 1)]) == {"rollout": 2, "reward": 2}


def test_the_large_ones_come_first_so_that_small_ones_do_not_block_them() -> None:
    roles = [role(2, 1, name="small"), role(1, 4, name="large")]
    assert missing(roles, [node(4), node(2)]) == {}


def test_processes_without_a_gpu_leave_the_cpus_of_gpu_nodes_alone() -> None:
    roles = [role(4, 1, name="reward"), role(2, 2, 1)]
    assert missing(roles, [node(4, 2), node(4)]) == {}


def test_a_part_of_a_gpu_comes_from_one_gpu() -> None:
    assert missing([role(2, 0, 0.6)], [node(8, 2)]) == {}
    assert missing([role(3, 0, 0.6)], [node(8, 2)]) == {"rollout": 1}, "1.8 of 2, in the sum"


def test_whole_gpus_are_kept_for_who_needs_whole_ones() -> None:
    roles = [role(3, 0, 0.3, name="parts"), role(1, 0, 1.0, name="whole")]
    assert missing(roles, [node(8, 2)]) == {}
    assert missing([role(1, 0, 2.0)], [node(8, 2, free={"CPU": 8, "GPU": 1.5})]) == {"rollout": 1}


def test_shares_that_add_up_to_one_fit_one_gpu() -> None:
    shares = [role(1, 0, 0.4), role(1, 0, 0.2, name="reward"), role(1, 0, 0.4, name="learner")]
    assert missing(shares, [node(4, 1)]) == {}


def test_what_others_use_does_not_count_as_free() -> None:
    nodes = [node(4, free={"CPU": 1.0})]
    assert missing([role(2, 1)], nodes) == {"rollout": 1}
    assert missing([role(2, 1)], nodes, busy=False) == {}


def test_a_role_with_labels_goes_to_their_nodes_only() -> None:
    nodes = [node(4, labels=SPOT), node(4, labels=ON_DEMAND)]
    roles = [role(4, 1, labels=SPOT), role(4, 1, labels=ON_DEMAND, name="learner")]
    assert missing(roles, nodes) == {}
    roles = [role(5, 1, labels=SPOT), role(1, 1, labels=ON_DEMAND, name="learner")]
    assert missing(roles, nodes) == {"rollout": 1}


@pytest.mark.parametrize(
    ("condition", "values"),
    [
        ("a", {"a"}),
        ("!a", {"b", "c", None}),
        ("in(a, b)", {"a", "b"}),
        ("!in(a,b)", {"c", None}),
    ],
)
def test_selectors_mean_what_ray_means(condition: str, values: set[str | None]) -> None:
    for value in ("a", "b", "c", None):
        labels = {} if value is None else {"zone": value}
        assert matches(labels, {"zone": condition}) == (value in values), value


def test_the_words_name_bundle_count_and_labels() -> None:
    assert str(Unmet(role(4, 1, 0.5, labels=SPOT), 2)) == (
        "2 of 4 rollout processes with 1 CPU and 0.5 GPU each on a node with market=spot"
    )
    assert str(Unmet(role(1, 0.25, name="learner"), 1)) == (
        "a learner process with 0.25 CPU and 0 GPU"
    )
    seen = node(4, 1, free={"CPU": 2.5}, labels=SPOT).describe(["market"])
    assert seen == "10.0.0.1 (2.5 of 4 CPU free, 0 of 1 GPU free, market=spot)"


def test_a_run_asks_for_its_smallest_crew_and_keeps_its_state_with_the_learner() -> None:
    words = ["rollout.num_workers=6", "rollout.min_workers=2", "reward.num_workers=3"]
    words += ["rollout.label_selector={market: spot}", "learner.label_selector={market: on-demand}"]
    roles = {r.name: r for r in role_resources(load_config(None, words))}
    assert (roles["rollout"].count, roles["reward"].count) == (2, 3)
    assert roles["rollout"].label_selector == SPOT and not roles["reward"].label_selector
    assert roles["learner"].label_selector == roles["moment store"].label_selector == ON_DEMAND


def test_a_crew_that_is_larger_than_its_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout.min_workers = 3 is above .*num_workers = 2"):
        load_config(None, ["rollout.min_workers=3"])


def test_the_plan_tells_the_range_of_an_elastic_crew_and_its_nodes() -> None:
    words = ["rollout.num_workers=6", "rollout.min_workers=2", "rollout.label_selector={a: b}"]
    plan = describe_plan(load_config(None, words))
    assert "2 to 6 x rollout" in plan and "set aside for each, a=b" in plan
    assert "shared:" not in plan


def test_the_plan_tells_how_roles_divide_a_gpu_and_what_they_need() -> None:
    words = ["policy.model=llamagen-b-256", "tokenizer.model=llamagen-vq-ds16"]
    words += ["rollout.num_workers=1"]
    shares = ["rollout.num_gpus=0.4", "reward.num_gpus=0.2", "learner.num_gpus=0.4"]
    plan = describe_plan(load_config(None, words + shares))
    assert "shared: rollout 0.4, reward 0.2, learner 0.4: 1, on one GPU" in plan
    totals = [float(line.split()[1]) for line in plan.split("\n") if " GiB: " in line]
    assert len(totals) == 3
    assert f"it needs {sum(totals) / 0.9:.1f}" in plan.replace("\n", " ")
    two = describe_plan(load_config(None, [*words, "rollout.num_gpus=0.7", "reward.num_gpus=0.7"]))
    assert "1.4, on at least 2 GPUs" in two
