"""The way of a unit from submit to take, with workers that die, answer late or answer twice."""

from dataclasses import replace

import numpy as np
import pytest

from rlgen.actors.dispatcher import Dispatcher
from rlgen.errors import RolloutError
from rlgen.types import Rollout, SamplingSettings, WorkUnit
from tests.tiny import scored


def unit_of(name: str, *, version: int = 0, purpose: str = "train") -> WorkUnit:
    return WorkUnit(
        unit_id=name,
        purpose=purpose,
        step=0,
        index=0,
        policy_version=version,
        seed=0,
        condition_indices_P=np.arange(3),
        class_ids_P=np.arange(3),
        group_size=2,
        settings=SamplingSettings(),
    )


def rollout_of(unit: WorkUnit, *, version: int | None = None) -> Rollout:
    return Rollout(
        unit=unit,
        policy_version=unit.policy_version if version is None else version,
        tokens_BL=np.zeros((6, 4), np.int32),
        rollout_logprobs_BL=np.zeros((6, 4), np.float32),
        sampling_s=0.1,
    )


def submitted(*names: str) -> Dispatcher:
    dispatcher = Dispatcher()
    dispatcher.submit([unit_of(name) for name in names])
    return dispatcher


def sample(dispatcher: Dispatcher, worker: str) -> str:
    """One turn of a rollout worker."""
    unit = dispatcher.lease_sampling(worker)
    assert unit is not None
    dispatcher.finish_sampling(worker, rollout_of(unit))
    return unit.unit_id


def score(dispatcher: Dispatcher, worker: str) -> str:
    """One turn of a reward worker."""
    rollout = dispatcher.lease_scoring(worker)
    assert rollout is not None
    dispatcher.finish_scoring(worker, scored(rollout))
    return rollout.unit.unit_id


def test_units_go_from_submit_to_take_in_order() -> None:
    dispatcher = submitted("a", "b", "c")
    assert [sample(dispatcher, f"r{i}") for i in range(3)] == ["a", "b", "c"]
    assert dispatcher.lease_sampling("r0") is None
    assert not dispatcher.are_scored(["a"])
    assert [score(dispatcher, "s0") for _ in range(3)] == ["a", "b", "c"]
    assert dispatcher.lease_scoring("s0") is None
    assert dispatcher.are_scored(["c", "a"])
    assert [item.rollout.unit.unit_id for item in dispatcher.take(["c", "a"])] == ["c", "a"]
    assert not dispatcher.are_scored(["a"])
    assert dispatcher.are_scored(["b"])
    assert not dispatcher.dropped


def test_results_may_come_in_any_order() -> None:
    dispatcher = submitted("a", "b")
    first, second = dispatcher.lease_sampling("r0"), dispatcher.lease_sampling("r1")
    dispatcher.finish_sampling("r1", rollout_of(second))
    assert score(dispatcher, "s0") == "b"
    assert dispatcher.are_scored(["b"]) and not dispatcher.are_scored(["a", "b"])
    dispatcher.finish_sampling("r0", rollout_of(first))
    assert score(dispatcher, "s0") == "a"
    assert [item.rollout.unit.unit_id for item in dispatcher.take(["a", "b"])] == ["a", "b"]


def test_what_a_lost_rollout_worker_held_goes_to_the_head() -> None:
    dispatcher = submitted("a", "b", "c")
    dispatcher.lease_sampling("r0")
    dispatcher.release("r0")
    assert [sample(dispatcher, "r1") for _ in range(3)] == ["a", "b", "c"]


def test_what_a_lost_reward_worker_held_goes_to_the_head() -> None:
    dispatcher = submitted("a", "b")
    sample(dispatcher, "r0"), sample(dispatcher, "r0")
    dispatcher.lease_scoring("s0")
    dispatcher.release("s0")
    assert [score(dispatcher, "s1") for _ in range(2)] == ["a", "b"]


def test_releasing_an_idle_worker_changes_nothing() -> None:
    dispatcher = submitted("a")
    sample(dispatcher, "r0")
    dispatcher.release("r0")
    dispatcher.release("never-seen")
    assert dispatcher.lease_sampling("r1") is None
    assert score(dispatcher, "s0") == "a"
    dispatcher.release("s0")
    assert dispatcher.lease_scoring("s1") is None


@pytest.mark.parametrize("state", ["to score", "scoring", "scored", "taken"])
def test_a_second_rollout_is_ignored_and_its_groups_are_counted(state) -> None:
    dispatcher = submitted("a")
    dispatcher.lease_sampling("r0")
    dispatcher.release("r0")  # taken for dead, it answers after its replacement
    unit = dispatcher.lease_sampling("r1")
    dispatcher.finish_sampling("r1", rollout_of(unit))
    if state != "to score":
        rollout = dispatcher.lease_scoring("s0")
        if state != "scoring":
            dispatcher.finish_scoring("s0", scored(rollout))
        if state == "taken":
            dispatcher.take(["a"])
    dispatcher.finish_sampling("r0", rollout_of(unit))
    assert dispatcher.dropped == {"late": 3}
    if state == "to score":
        score(dispatcher, "s0")
    assert dispatcher.lease_scoring("s1") is None, "it must not be scored again"


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_second_score_is_ignored(is_taken) -> None:
    dispatcher = submitted("a")
    sample(dispatcher, "r0")
    rollout = dispatcher.lease_scoring("s0")
    dispatcher.release("s0")
    again = dispatcher.lease_scoring("s1")
    dispatcher.finish_scoring("s1", scored(again, scoring_s=1.0))
    if is_taken:
        dispatcher.take(["a"])
    dispatcher.finish_scoring("s0", scored(rollout, scoring_s=2.0))
    assert not dispatcher.dropped, "the group itself was sampled once"
    if is_taken:
        assert not dispatcher.are_scored(["a"])
    else:
        assert dispatcher.take(["a"])[0].scoring_s == 1.0, "the first answer counts"


def test_duplicates_of_evaluations_are_no_training_groups() -> None:
    dispatcher = Dispatcher()
    unit = unit_of("e", purpose="evaluate")
    dispatcher.submit([unit])
    sample(dispatcher, "r0")
    dispatcher.finish_sampling("r1", rollout_of(unit))
    assert not dispatcher.dropped
    assert score(dispatcher, "s0") == "e"
    assert dispatcher.lease_scoring("s0") is None


def test_only_the_holder_of_a_unit_may_answer() -> None:
    dispatcher = submitted("a", "b")
    first = dispatcher.lease_sampling("r0")
    dispatcher.release("r0")
    dispatcher.finish_sampling("r0", rollout_of(first))  # before anyone else began
    assert dispatcher.dropped == {"late": 3}
    second = dispatcher.lease_sampling("r1")
    assert second.unit_id == "a"
    dispatcher.finish_sampling("r1", rollout_of(unit_of("b")))
    assert dispatcher.dropped == {"late": 6}
    assert dispatcher.lease_scoring("s0") is None


def test_a_rewind_forgets_every_unit_and_counts_what_was_generated() -> None:
    dispatcher = submitted("a", "b", "c", "d", "e")
    for _ in range(3):
        sample(dispatcher, "r0")
    score(dispatcher, "s0")
    scoring, sampling = dispatcher.lease_scoring("s1"), dispatcher.lease_sampling("r1")
    assert dispatcher.counts().in_flight == 9
    dispatcher.rewind()
    assert dispatcher.dropped == {"rewound": 9}, "one scored, one in scoring, one waiting"
    assert dispatcher.counts().in_flight == 0
    dispatcher.finish_sampling("r1", rollout_of(sampling))
    dispatcher.finish_scoring("s1", scored(scoring))
    assert dispatcher.dropped == {"rewound": 9, "late": 3}
    dispatcher.submit([unit_of("a")])  # the same unit again, from the checkpoint's weights
    assert sample(dispatcher, "r1") == score(dispatcher, "s1") == "a"
    assert len(dispatcher.take(["a"])) == 1
    assert dispatcher.lease_sampling("r0") is None
    counts = dispatcher.counts()
    assert counts.generated == counts.taken + sum(counts.dropped.values()) + counts.in_flight == 15


def test_a_rollout_of_another_policy_version_is_refused() -> None:
    dispatcher = Dispatcher()
    unit = unit_of("a", version=4)
    dispatcher.submit([unit])
    dispatcher.lease_sampling("r0")
    with pytest.raises(RolloutError, match=r"unit a asks for policy version 4.*sampled with 3"):
        dispatcher.finish_sampling("r0", rollout_of(unit, version=3))
    assert dispatcher.lease_scoring("s0") is None


def test_a_unit_submitted_twice_is_refused_until_it_was_taken() -> None:
    dispatcher = submitted("a")
    with pytest.raises(RolloutError, match=r"unit a was submitted twice"):
        dispatcher.submit([unit_of("a")])
    sample(dispatcher, "r0"), score(dispatcher, "s0")
    with pytest.raises(RolloutError, match=r"collect it first"):
        dispatcher.submit([unit_of("a")])
    dispatcher.take(["a"])
    dispatcher.submit([replace(unit_of("a"), policy_version=1)])
    leased = dispatcher.lease_sampling("r0")
    assert leased is not None and leased.policy_version == 1


def test_the_state_in_words_counts_every_place() -> None:
    dispatcher = submitted("a", "b", "c", "d", "e")
    for _ in range(3):
        sample(dispatcher, "r0")
    score(dispatcher, "s0")
    dispatcher.lease_scoring("s7")
    dispatcher.lease_sampling("r3")
    assert dispatcher.describe() == (
        "1 units wait for a rollout worker, 1 are sampled (r3), 1 wait for a reward worker, "
        "1 are scored (s7), 1 are done"
    )
