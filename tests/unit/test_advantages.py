"""From rewards to advantages: centring, scaling, clipping, the running scale, the sum."""

import math

import pytest
import torch

from rlgen.config.run import AdvantageConfig
from rlgen.errors import NumericsError
from rlgen.grpo.advantages import (
    RunningScale,
    WeightedReward,
    combine_advantages,
    normalize_rewards,
)

SCALES = ["group_std", "batch_std", "running", "none"]


def draw(groups: int = 5, size: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(groups, size, generator=generator, dtype=torch.float64)


def normalized(rewards_PG: torch.Tensor, **changes) -> torch.Tensor:
    options = {
        "center": "group",
        "scale": "group_std",
        "running_scale": 2.5,
        "epsilon": 1e-6,
        "clip": 100.0,
    }
    return normalize_rewards(rewards_PG, **(options | changes))


def reward(values_B: torch.Tensor, weight: float = 1.0, **changes) -> WeightedReward:
    return WeightedReward(
        values_B.flatten().double(), weight, **({"scale": "none", "center": "group"} | changes)
    )


@pytest.mark.parametrize("scale", SCALES)
def test_groups_sum_to_zero(scale) -> None:
    sums = normalized(draw(), scale=scale).sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros(5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_a_centred_batch_sums_to_zero_and_its_groups_do_not(scale) -> None:
    found = normalized(draw(), scale=scale, center="batch")
    if scale != "group_std":  # which weighs groups differently
        assert abs(found.sum().item()) < 1e-12
    assert found.sum(dim=1).abs().min() > 1e-3


def test_each_scale_divides_by_what_it_says() -> None:
    rewards = draw()
    centered = rewards - rewards.mean(dim=1, keepdim=True)
    variances = centered.square().mean(dim=1, keepdim=True)  # ddof 0
    expected = {
        "group_std": centered / (variances.sqrt() + 0.5),
        "batch_std": centered / (variances.mean().sqrt() + 0.5),
        "running": centered / (2.5 + 0.5),
        "none": centered,
    }
    for scale, values in expected.items():
        torch.testing.assert_close(normalized(rewards, scale=scale, epsilon=0.5), values)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1e9 / 3])
def test_constant_groups_get_exact_zeros(scale, value) -> None:
    rewards = draw(groups=3, size=7)
    rewards[1] = value  # seven times 0.1 doesn't average to 0.1 in floats
    found = normalized(rewards, scale=scale, running_scale=1e-30, epsilon=1e-30)
    assert not found[1].any()
    assert found[0].any() and found[2].any()


def test_a_constant_batch_gets_exact_zeros() -> None:
    rewards = torch.full((3, 7), 0.1, dtype=torch.float64)
    for scale in SCALES:
        assert not normalized(rewards, scale=scale, center="batch", running_scale=0.0).any()


@pytest.mark.parametrize("scale", SCALES)
def test_no_advantage_is_larger_than_the_clip(scale) -> None:
    rewards = draw(groups=2, size=30)
    rewards[0, 3], rewards[0, 4] = 1000.0, -1000.0  # opposite, so that the mean stays
    found = normalized(rewards, scale=scale, clip=1.5)
    assert found.max() == 1.5 and found.min() == -1.5
    free = normalized(rewards, scale=scale, clip=1e9)
    inside = free.abs() < 1.5
    assert inside.any() and torch.equal(found[inside], free[inside])


def test_running_scale_is_the_mean_of_the_first_steps_then_frozen() -> None:
    scale = RunningScale()
    for std in (1.0, 2.0, 6.0):
        scale = scale.updated(std, max_steps=3)
    assert scale == RunningScale(3.0, 3)
    assert scale.updated(1e6, max_steps=3) == scale


def test_running_scale_of_a_run_includes_the_present_step_until_it_freezes() -> None:
    config = AdvantageConfig(running_steps=2, epsilon=1e-12, clip=100.0)
    running: dict[str, RunningScale] = {}
    base = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])  # standard deviation 1
    found = []
    for factor in (1.0, 3.0, 10.0):
        advantages, running, metrics = combine_advantages(
            {"r": reward(factor * base, scale="running")}, running, group_size=2, config=config
        )
        found.append(advantages.abs().max().item())
        assert metrics["advantage/r_scale"] == running["r"].mean
    # Scales 1, (1 + 3) / 2, and the same 2 once frozen.
    assert found == pytest.approx([1.0, 1.5, 5.0])
    assert running["r"].num_steps == 2


def test_running_scale_of_a_group_centred_reward_ignores_what_differs_between_groups() -> None:
    config = AdvantageConfig()
    rewards = torch.tensor([[-1.0, 1.0], [999.0, 1001.0]])
    for center, expected in (("group", 1.0), ("batch", math.sqrt(500.0**2 + 1))):
        _, running, _ = combine_advantages(
            {"r": reward(rewards, center=center)}, {}, group_size=2, config=config
        )
        assert running["r"].mean == pytest.approx(expected)


def test_normalize_then_sum_weighs_normalised_rewards() -> None:
    config = AdvantageConfig(combine="normalize_then_sum", epsilon=1e-12, clip=100.0)
    a, b = draw(seed=1), 1000 * draw(seed=2)
    found, _, _ = combine_advantages(
        {"a": reward(a, 0.25, scale="group_std"), "b": reward(b, 2.0, scale="group_std")},
        {},
        group_size=4,
        config=config,
    )
    expected = 0.25 * normalized(a) + 2.0 * normalized(b)
    # The result is float32, of order 1.
    torch.testing.assert_close(found, expected.flatten().float(), rtol=1e-5, atol=1e-5)


def test_sum_then_normalize_weighs_rewards_and_normalises_their_sum() -> None:
    config = AdvantageConfig(
        combine="sum_then_normalize", instance_scale="group_std", epsilon=1e-12, clip=100.0
    )
    a, b = draw(seed=1), 1000 * draw(seed=2)
    rewards = {"a": reward(a, 0.25), "b": reward(b, 2.0)}
    found, running, metrics = combine_advantages(rewards, {}, group_size=4, config=config)
    expected = normalized(0.25 * a + 2.0 * b)
    torch.testing.assert_close(found, expected.flatten().float(), rtol=1e-5, atol=1e-5)
    assert running.keys() == {"sum"} and "advantage/sum_std" in metrics
    apart, _, _ = combine_advantages(
        {"a": reward(a, 0.25, scale="group_std"), "b": reward(b, 2.0, scale="group_std")},
        {},
        group_size=4,
        config=AdvantageConfig(epsilon=1e-12, clip=100.0),
    )
    assert (found - apart).abs().max() > 0.1, "the two ways differ"


def test_weight_zero_leaves_a_reward_out_of_the_sum_but_in_the_metrics() -> None:
    a, b = draw(seed=1), draw(seed=2)
    config = AdvantageConfig()
    both, _, metrics = combine_advantages(
        {"a": reward(a), "b": reward(b, 0.0)}, {}, group_size=4, config=config
    )
    alone, _, _ = combine_advantages({"a": reward(a)}, {}, group_size=4, config=config)
    assert torch.equal(both, alone)
    assert metrics["advantage/b_std"] > 0


def test_constant_groups_are_counted() -> None:
    rewards = draw(groups=4)
    rewards[2] = 0.3
    _, _, metrics = combine_advantages(
        {"a": reward(rewards)}, {}, group_size=4, config=AdvantageConfig()
    )
    assert metrics["advantage/a_constant_groups_frac"] == 0.25


def test_small_differences_on_a_large_offset_survive() -> None:
    # In float32 1e4 + 1e-4 is 1e4: the sum is made in float64.
    rewards = 1e4 + 1e-4 * draw()
    found, _, _ = combine_advantages(
        {"a": reward(rewards, scale="group_std")},
        {},
        group_size=4,
        config=AdvantageConfig(epsilon=1e-12, clip=100.0),
    )
    torch.testing.assert_close(found, normalized(draw()).flatten().float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("combine", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(combine, bad) -> None:
    rewards = draw()
    rewards[3, 2] = bad
    running = {"clip": RunningScale(1.0, 3)}
    with pytest.raises(NumericsError) as caught:
        combine_advantages(
            {"fine": reward(draw()), "clip": reward(rewards, 0.0)},
            running,
            group_size=4,
            config=AdvantageConfig(combine=combine),
        )
    message = str(caught.value)
    assert f"reward clip is {bad} for condition 3, sample 2" in message
    assert "1 of 20" in message and "nothing was learned" in message
    assert running == {"clip": RunningScale(1.0, 3)}
