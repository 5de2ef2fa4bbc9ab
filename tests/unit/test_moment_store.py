"""The moment store: idempotent commits in order, failures that change nothing, exact resume.

Shapes: P conditions, G group, B = P*G images, F features.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.config import RunConfig
from rlgen.errors import NumericsError, RewardError
from rlgen.jobs.grpo import bootstrap_moments
from rlgen.learner.sample_size import few_samples
from rlgen.learner.state_io import dump_state, parse_state
from rlgen.moments.coordinates import to_coordinates
from rlgen.moments.ema import EmaState
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.leave_one_out import leave_one_out
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import ReferenceMoments, load_reference, save_reference
from rlgen.rewards.moment_store import MomentStore
from rlgen.types import StepRewards
from tests.tiny import tiny_config

NUM_FEATURES = 5
NUM_IMAGES = 12  # 4 conditions of 3 samples, as tiny_config says


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, NUM_FEATURES)).astype(np.float32)


def step_rewards(seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng([seed, 1])
    return {
        name: generator.normal(size=NUM_IMAGES).astype(np.float32)
        for name in ("clip", "preference")
    }


@pytest.fixture
def reference(tmp_path) -> str:
    moments = batch_moments(torch.from_numpy(draw(300, seed=99)))
    path = str(tmp_path / "reference.npz")
    save_reference(path, ReferenceMoments("toy:5", 300, moments.mean_F, moments.cov_FF))
    return path


def config_of(reference: str, **values: Any) -> RunConfig:
    weights = {
        "reward__scorers__clip__weight": 0.5,
        "reward__scorers__preference__weight": 0.25,
        "reward__loo_fid__reference": reference,
    }
    return tiny_config(**(weights | values))


def started(config: RunConfig) -> MomentStore:
    store = MomentStore(config)
    store.bootstrap(draw(50, seed=1) + 0.5)
    return store


def commit(store: MomentStore, step: int) -> StepRewards:
    return store.commit(step, step_rewards(step), draw(NUM_IMAGES, seed=10 + step))


def state_bytes(store: MomentStore) -> bytes:
    return dump_state(store.state_dict())


def assert_same_answer(a: StepRewards, b: StepRewards) -> None:
    assert a.step == b.step and a.metrics == b.metrics
    assert np.array_equal(a.advantages_B, b.advantages_B)
    assert a.rewards.keys() == b.rewards.keys()
    for name, values in a.rewards.items():
        assert np.array_equal(values, b.rewards[name]), name


def test_a_commit_repeated_changes_nothing_and_answers_the_same(reference) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    first = commit(store, 1)
    state = state_bytes(store)
    assert_same_answer(commit(store, 1), first)
    assert state_bytes(store) == state
    never_repeated = started(config_of(reference))
    for step in range(2):
        commit(never_repeated, step)
    assert_same_answer(commit(store, 2), commit(never_repeated, 2))


def test_every_commit_moves_the_state(reference) -> None:
    store = started(config_of(reference))
    states = [state_bytes(store)]
    for step in range(3):
        commit(store, step)
        states.append(state_bytes(store))
    assert len(set(states)) == 4


@pytest.mark.parametrize("what", ["reward", "feature"])
def test_other_content_for_the_same_step_is_refused(reference, what) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    state = state_bytes(store)
    rewards, features = step_rewards(0), draw(NUM_IMAGES, seed=10)
    if what == "reward":
        rewards["clip"][3] += 1e-6
    else:
        features[3, 2] += 1e-6
    with pytest.raises(RewardError, match=r"step 0 was committed before with other scores"):
        store.commit(0, rewards, features)
    assert state_bytes(store) == state


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_step_out_of_order_is_refused(reference, step) -> None:
    store = started(config_of(reference))
    for done in range(3):
        commit(store, done)
    state = state_bytes(store)
    with pytest.raises(RewardError, match=f"step {step} was committed but step 3 is next.*rewind"):
        commit(store, step)
    assert state_bytes(store) == state
    commit(store, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_is_named_and_nothing_changes(reference, bad) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    state = state_bytes(store)
    features = draw(NUM_IMAGES, seed=11)
    features[7, 2] = bad
    with pytest.raises(NumericsError, match=r"condition 2, sample 1 are not finite \(1 of 12"):
        store.commit(1, step_rewards(1), features)
    assert state_bytes(store) == state
    fresh = started(config_of(reference))
    commit(fresh, 0)
    assert_same_answer(commit(store, 1), commit(fresh, 1))


def test_a_reward_that_is_not_finite_is_named_and_nothing_changes(reference) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    state = state_bytes(store)
    rewards = step_rewards(1)
    rewards["preference"][5] = math.nan
    with pytest.raises(NumericsError, match=r"reward preference is nan for condition 1, sample 2"):
        store.commit(1, rewards, draw(NUM_IMAGES, seed=11))
    assert state_bytes(store) == state
    commit(store, 1)


def test_state_travels_and_the_next_commit_is_bitwise_the_same(reference) -> None:
    config = config_of(reference, advantage__running_steps=3)
    store = started(config)
    for step in range(2):
        commit(store, step)
    restored = MomentStore(config)
    restored.load_state_dict(parse_state(state_bytes(store), "here"))
    for step in (2, 3):
        assert_same_answer(commit(store, step), commit(restored, step))
    assert state_bytes(store) == state_bytes(restored)


def test_rewinding_forgets_what_came_after(reference) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    state = store.state_dict()
    first = commit(store, 1)
    other = store.commit(2, step_rewards(7), draw(NUM_IMAGES, seed=7))
    store.load_state_dict(state)
    assert_same_answer(commit(store, 1), first)
    assert not np.array_equal(commit(store, 2).advantages_B, other.advantages_B)


def test_a_rewound_step_may_be_committed_with_other_content(reference) -> None:
    store = started(config_of(reference))
    commit(store, 0)
    state = store.state_dict()
    commit(store, 1)
    store.load_state_dict(state)
    found = store.commit(1, step_rewards(7), draw(NUM_IMAGES, seed=7))
    never_rewound = started(config_of(reference))
    commit(never_rewound, 0)
    expected = never_rewound.commit(1, step_rewards(7), draw(NUM_IMAGES, seed=7))
    assert_same_answer(found, expected)


def test_advantages_are_the_weighted_sum_of_what_each_reward_gives(reference) -> None:
    found = commit(started(config_of(reference)), 0)
    parts = []
    for name, weight in (("clip", 0.5), ("preference", 0.25), ("loo_fid", 1.0)):
        weights = {
            "reward__scorers__clip__weight": 0.0,
            "reward__scorers__preference__weight": 0.0,
            "reward__loo_fid__weight": 0.0,
        }
        key = "reward__loo_fid__weight" if name == "loo_fid" else f"reward__scorers__{name}__weight"
        alone = commit(started(config_of(reference, **(weights | {key: weight}))), 0)
        assert alone.advantages_B.any()
        parts.append(alone.advantages_B)
    # Three float32 numbers of order 1.
    np.testing.assert_allclose(found.advantages_B, sum(parts), rtol=0, atol=1e-6)


def test_the_distribution_reward_is_the_leave_one_out_of_the_pooled_batch(reference) -> None:
    store = started(config_of(reference, reward__loo_fid__decay=0.3))
    found = commit(store, 0)
    coordinates = to_coordinates(load_reference(reference))
    state = EmaState.bootstrap(torch.from_numpy(draw(50, seed=1) + np.float32(0.5)), coordinates)
    expected = leave_one_out(
        state, torch.from_numpy(draw(NUM_IMAGES, seed=10)), coordinates, decay=0.3
    )
    np.testing.assert_array_equal(found.rewards["loo_fid"], expected.rewards_B.float().numpy())
    assert found.metrics["moments/ema_fid"] == expected.fid
    assert found.metrics["moments/n_eff"] == expected.n_eff
    # 12 images, old weight 0.3 of 50: 1 / (0.7^2 / 12 + 0.3^2 / 50)
    assert expected.n_eff == pytest.approx(1 / (0.49 / 12 + 0.09 / 50))
    assert found.rewards.keys() == {"clip", "preference", "loo_fid"}
    np.testing.assert_array_equal(found.rewards["clip"], step_rewards(0)["clip"])


def test_unscaled_distribution_advantages_are_the_influences(reference) -> None:
    """Not the raw rewards, whose scale falls with the number of images and rises with 1 - decay."""
    config = config_of(
        reference,
        reward__scorers__clip__weight=0.0,
        reward__scorers__preference__weight=0.0,
        advantage__distribution_scale="none",
        advantage__clip=1e9,
    )
    found = commit(started(config), 0)
    coordinates = to_coordinates(load_reference(reference))
    state = EmaState.bootstrap(torch.from_numpy(draw(50, seed=1) + np.float32(0.5)), coordinates)
    features = torch.from_numpy(draw(NUM_IMAGES, seed=10))
    outcome = leave_one_out(state, features, coordinates, decay=0.5)
    # Influences of order 1 as float32.
    np.testing.assert_allclose(found.advantages_B, outcome.influence_B.numpy(), rtol=0, atol=1e-6)
    assert abs(outcome.influence_B.sum()) < 1e-9
    assert abs(outcome.influence_B).max() > 0.1


@pytest.mark.parametrize("center", ["batch", "group"])
def test_influences_sum_to_zero_over_what_they_are_centred_on(reference, center) -> None:
    store = started(
        config_of(
            reference,
            reward__scorers__clip__weight=0.0,
            reward__scorers__preference__weight=0.0,
            advantage__distribution_center=center,
            advantage__clip=1e9,
        )
    )
    advantages_PG = commit(store, 0).advantages_B.reshape(4, 3).astype(np.float64)
    assert abs(advantages_PG).max() > 0.1
    # Float32 values of order 1.
    assert abs(advantages_PG.sum()) < 1e-5
    group_sums = abs(advantages_PG.sum(axis=1)).max()
    assert group_sums < 1e-5 if center == "group" else group_sums > 1e-2


def test_weight_zero_still_tracks_the_moments(reference) -> None:
    weighted = started(config_of(reference))
    unweighted = started(config_of(reference, reward__loo_fid__weight=0.0))
    for step in range(2):
        a, b = commit(weighted, step), commit(unweighted, step)
        assert a.metrics["moments/ema_fid"] == b.metrics["moments/ema_fid"]
        np.testing.assert_array_equal(a.rewards["loo_fid"], b.rewards["loo_fid"])
        assert not np.array_equal(a.advantages_B, b.advantages_B)


def test_scorers_of_weight_zero_give_no_advantage(reference) -> None:
    config = config_of(reference, reward__scorers__clip__weight=0.0)
    rewards = step_rewards(0)
    features = draw(NUM_IMAGES, seed=10)
    first = started(config).commit(0, rewards, features)
    rewards["clip"] = rewards["clip"][::-1].copy()
    second = started(config).commit(0, rewards, features)
    np.testing.assert_array_equal(first.advantages_B, second.advantages_B)


def test_a_run_without_a_distribution_reward_needs_no_features() -> None:
    store = MomentStore(tiny_config(reward__loo_fid=None))
    found = store.commit(0, step_rewards(0), None)
    assert found.rewards.keys() == {"clip", "preference"}
    assert found.advantages_B.any()
    restored = MomentStore(tiny_config(reward__loo_fid=None))
    restored.load_state_dict(parse_state(state_bytes(store), "here"))
    assert_same_answer(
        restored.commit(1, step_rewards(1), None), store.commit(1, step_rewards(1), None)
    )


def test_missing_features_and_an_empty_store_are_named(reference) -> None:
    with pytest.raises(RewardError, match="bootstrap the store first"):
        commit(MomentStore(config_of(reference)), 0)
    with pytest.raises(RewardError, match="the step has no features"):
        started(config_of(reference)).commit(0, step_rewards(0), None)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_steps_own_distance_is_logged_beside_the_emas(reference, covariance) -> None:
    store = started(config_of(reference, reward__loo_fid__covariance=covariance))
    for step in range(2):
        found = commit(store, step)
    batch = batch_moments(torch.from_numpy(draw(NUM_IMAGES, seed=11)))
    moments = load_reference(reference).moments
    if covariance == "full":
        expected = frechet_distance(batch, moments)
    else:
        gaps = batch.mean_F - moments.mean_F
        spread = batch.cov_FF.diagonal().sqrt() - moments.cov_FF.diagonal().sqrt()
        expected = float(gaps @ gaps + spread @ spread)
    assert found.metrics["moments/batch_fid"] == pytest.approx(expected, rel=1e-9)
    assert found.metrics["moments/batch_images"] == NUM_IMAGES
    assert found.metrics["moments/batch_fid"] != found.metrics["moments/ema_fid"]


def test_the_emas_distance_may_fall_while_the_policys_rises(reference) -> None:
    """The lag that a reader of the EMA alone does not see."""
    store = MomentStore(config_of(reference, reward__loo_fid__decay=0.9))
    store.bootstrap(draw(200, seed=1) + 3.0)
    first = store.commit(0, step_rewards(0), draw(NUM_IMAGES, seed=2))
    second = store.commit(1, step_rewards(1), draw(NUM_IMAGES, seed=2) + np.float32(0.8))
    assert second.metrics["moments/ema_fid"] < first.metrics["moments/ema_fid"] - 1
    assert second.metrics["moments/batch_fid"] > first.metrics["moments/batch_fid"] + 1


def test_the_ema_may_start_from_the_reference_and_needs_no_bootstrap(reference) -> None:
    config = config_of(reference, reward__loo_fid__start="reference")
    bootstrap_moments(config, None)  # type: ignore[arg-type]  # the runtime is asked nothing
    found = commit(MomentStore(config), 0)
    coordinates = to_coordinates(load_reference(reference))
    state = EmaState.from_reference(coordinates)
    features = torch.from_numpy(draw(NUM_IMAGES, seed=10))
    expected = leave_one_out(state, features, coordinates, decay=0.5)
    np.testing.assert_array_equal(found.rewards["loo_fid"], expected.rewards_B.float().numpy())
    # 12 images, old weight 0.5 of 300 of the reference.
    assert found.metrics["moments/n_eff"] == pytest.approx(1 / (0.25 / 12 + 0.25 / 300))


def test_a_state_that_started_from_the_reference_resumes(reference) -> None:
    config = config_of(reference, reward__loo_fid__start="reference")
    store = MomentStore(config)
    commit(store, 0)
    restored = MomentStore(config)
    restored.load_state_dict(parse_state(state_bytes(store), "here"))
    assert_same_answer(commit(store, 1), commit(restored, 1))


def test_the_expected_sample_size_is_where_the_measured_one_settles(reference) -> None:
    config = config_of(reference, reward__loo_fid__decay=0.8)
    store = started(config)
    for step in range(40):
        found = commit(store, step)
    assert config.reward.loo_fid is not None
    expected = config.reward.loo_fid.effective_samples(NUM_IMAGES)
    assert expected == pytest.approx(12 * 1.8 / 0.2)
    # What is left of the start after 40 steps weighs 0.8^80.
    assert found.metrics["moments/n_eff"] == pytest.approx(expected, rel=1e-6)


def few(num_features: int, count: int = 300, **values: Any) -> str:
    given = {f"reward__loo_fid__{key}": value for key, value in values.items()}
    return few_samples(tiny_config(**given), num_features=num_features, reference_count=count)


def test_too_few_effective_samples_are_told_with_numbers_and_a_way_out() -> None:
    # 12 images a step at decay 0.5 are worth 36, and 2 * 18 are wanted.
    assert few(18) == ""
    told = few(19)
    assert "as few as 36 effective samples for 19 feature dimensions" in told
    assert "reliable from 38" in told and "decay of at least 0.52)" in told
    assert few(19, decay=0.52) == ""
    assert "bootstrap_images" not in told
    assert "starts from 30 images (raise" in few(18, bootstrap_images=30)
    assert few(18, start="reference", bootstrap_images=30) == ""
    assert "a reference of 30 images" in few(18, count=30, start="reference")


def test_a_diagonal_covariance_asks_for_no_sample_size() -> None:
    assert few(1000, covariance="diagonal") == ""
    assert few_samples(tiny_config(reward__loo_fid=None), num_features=9, reference_count=1) == ""
