"""What a run asks of a cluster, and whether that fits on its nodes: arithmetic without Ray.

Owns roles, nodes, the rule by which processes are put on nodes, and the words for what finds no
place. Must not import torch or Ray.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlgen.config.run import RunConfig

_EPSILON = 1e-6
"""Ray counts resources in steps of 1e-4; sums of such numbers are compared with this slack."""


@dataclass(frozen=True)
class Role:
    """Processes of one kind and what each of them gets."""

    name: str
    count: int
    """How many there must be; more may join later."""
    threads: int
    num_cpus: float
    num_gpus: float
    label_selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that a node must have, in Ray's language: `x`, `!x`, `in(x, y)`, `!in(x, y)`."""

    @property
    def resources(self) -> dict[str, float]:
        """What one process asks of its node; nothing that is zero."""
        asked = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in asked.items() if amount > 0}


@dataclass(frozen=True)
class Node:
    """A machine of the cluster."""

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def describe(self, names: Sequence[str] = ()) -> str:
        """What it has and what is free of it; of its labels those that were asked for."""
        parts = [
            f"{self.free.get(kind, 0.0):g} of {self.total.get(kind, 0.0):g} {kind} free"
            for kind in ("CPU", "GPU")
        ]
        parts += [f"{name}={self.labels.get(name, '')}" for name in names]
        return f"{self.name} ({', '.join(parts)})"


@dataclass(frozen=True)
class Unmet:
    """A role of which some processes find no node."""

    role: Role
    num_missing: int

    def __str__(self) -> str:
        """The bundle, and how many of it are missing."""
        role, each = self.role, ""
        who = f"a {role.name} process"
        if role.count > 1:
            who, each = f"{self.num_missing} of {role.count} {role.name} processes", " each"
        labels = " and ".join(f"{key}={value}" for key, value in role.label_selector.items())
        return (
            f"{who} with {role.num_cpus:g} CPU and {role.num_gpus:g} GPU{each}"
            f"{f' on a node with {labels}' if labels else ''}"
        )


def role_resources(config: RunConfig, *, with_learner: bool = True) -> list[Role]:
    """What a run asks of the cluster; without a learner it only samples and scores."""
    rollout, reward, learner = config.rollout, config.reward, config.learner
    roles = [
        Role(
            "rollout",
            rollout.fewest_workers,
            rollout.threads,
            rollout.num_cpus,
            rollout.num_gpus,
            rollout.label_selector,
        ),
        Role(
            "reward",
            reward.fewest_workers,
            reward.threads,
            reward.num_cpus,
            reward.num_gpus,
            reward.label_selector,
        ),
    ]
    if not with_learner:
        return roles
    return [
        *roles,
        Role("moment store", 1, reward.threads, reward.num_cpus, 0.0, learner.label_selector),
        Role(
            "learner",
            learner.num_workers,
            learner.threads,
            learner.num_cpus,
            learner.num_gpus,
            learner.label_selector,
        ),
    ]


def unmet_roles(roles: Sequence[Role], nodes: Sequence[Node], *, busy: bool = True) -> list[Unmet]:
    """Put the processes on the nodes, the most demanding first, and name those that find none.

    A process that asks for a part of a GPU gets it from one GPU. The rule is the usual one for
    packing and not perfect: it may leave out a process that another order would have placed.

    Args:
        roles: what the run asks for.
        nodes: of the cluster.
        busy: whether what others use counts; False tells what the nodes could hold alone.
    """
    bins = [_Bin(node, node.free if busy else node.total) for node in nodes]
    missing: Counter[int] = Counter()
    processes = [(i, role) for i, role in enumerate(roles) for _ in range(role.count)]
    for index, role in sorted(processes, key=lambda pair: _demand(pair[1]), reverse=True):
        if not any(one.take(role) for one in sorted(bins, key=lambda b: len(b.gpus))):
            missing[index] += 1
    return [Unmet(roles[index], count) for index, count in sorted(missing.items())]


def shared_gpus(config: RunConfig) -> dict[str, float]:
    """Shares of a GPU by role, for the roles that ask for less than a whole one each."""
    return {
        role.name: role.count * role.num_gpus
        for role in role_resources(config)
        if 0 < role.num_gpus < 1
    }


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector in Ray's language."""
    return all(_matches(labels.get(key), condition) for key, condition in selector.items())


def _matches(value: str | None, condition: str) -> bool:
    wanted = condition.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", wanted)
    values = [part.strip() for part in listed[1].split(",")] if listed else [wanted]
    return (value in values) != condition.startswith("!")


def _demand(role: Role) -> tuple[bool, float, float]:
    return bool(role.label_selector), role.num_gpus, role.num_cpus


class _Bin:
    """What is left of a node while processes are put on it."""

    def __init__(self, node: Node, amounts: Mapping[str, float]) -> None:
        self._labels = node.labels
        self._cpus = amounts.get("CPU", 0.0)
        whole, part = divmod(amounts.get("GPU", 0.0) + _EPSILON, 1.0)
        # Which GPU the parts are of isn't known; at best they are of one.
        self.gpus = [1.0] * int(whole) + [part] * (part > 2 * _EPSILON)

    def take(self, role: Role) -> bool:
        """Put one process of the role here, if it fits."""
        if not matches(self._labels, role.label_selector) or self._cpus + _EPSILON < role.num_cpus:
            return False
        if not self._take_gpus(role.num_gpus):
            return False
        self._cpus -= role.num_cpus
        return True

    def _take_gpus(self, wanted: float) -> bool:
        if wanted == 0:
            return True
        if wanted >= 1:
            whole = [gpu for gpu in self.gpus if gpu > 1 - _EPSILON]
            if len(whole) < wanted:
                return False
            for gpu in whole[: round(wanted)]:
                self.gpus.remove(gpu)
            return True
        fitting = [gpu for gpu in self.gpus if gpu + _EPSILON >= wanted]
        if not fitting:
            return False
        self.gpus.remove(min(fitting))  # the fullest one: whole GPUs stay whole
        self.gpus.append(min(fitting) - wanted)
        return True
