"""What the sampler says it drew from is what the learner scores, and it is what was drawn.

Shapes: B images, L image tokens, V codebook, T positions, H heads, K head width.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from rlgen.errors import ConfigError, RolloutError
from rlgen.nn.attention import RotaryAttention
from rlgen.nn.rotary import apply_rotary, rotary_table_2d
from rlgen.sampling.decode import check_guidance, sample_tokens
from rlgen.sampling.logits import processed_logprobs
from rlgen.sampling.scoring import score_tokens
from rlgen.types import Rollout, SamplingSettings, WorkUnit
from tests.tiny import sampler_of, tiny_policy

SETTINGS = [
    SamplingSettings(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for cfg_scale, temperature, top_k, top_p in itertools.product(
        (1.0, 1.5, 3.0), (0.7, 1.0), (0, 5), (1.0, 0.9)
    )
]


def unit_of(
    classes: list[int], *, group_size: int, first: int = 0, settings: SamplingSettings
) -> WorkUnit:
    return WorkUnit(
        unit_id="u",
        purpose="train",
        step=2,
        index=0,
        policy_version=0,
        seed=11,
        condition_indices_P=np.arange(first, first + len(classes)),
        class_ids_P=np.array(classes),
        group_size=group_size,
        settings=settings,
    )


def classes_of(rollout: Rollout) -> torch.Tensor:
    unit = rollout.unit
    return torch.from_numpy(np.repeat(unit.class_ids_P, unit.group_size))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_logprobs_are_the_teacher_forced_ones(settings) -> None:
    policy = tiny_policy()
    rollout = sampler_of(policy).sample(unit_of([0, 3, 1, 2], group_size=6, settings=settings))
    tokens = torch.from_numpy(rollout.tokens_BL).long()
    with torch.no_grad():
        scored, _ = score_tokens(policy, classes_of(rollout), tokens, settings)
    # Log-probs of order 1 to 10 through two layers in float32: some 1e-6. The run's own gate
    # allows 1e-4.
    torch.testing.assert_close(
        torch.from_numpy(rollout.rollout_logprobs_BL), scored, rtol=0, atol=1e-4
    )
    assert scored.isfinite().all(), "a code of probability 0 was drawn"
    assert scored.std() > 0.1, "a uniform policy would prove nothing"


def test_scoring_with_other_settings_gives_other_logprobs() -> None:
    policy = tiny_policy()
    used = SamplingSettings(cfg_scale=1.5, temperature=0.7, top_k=5, top_p=0.9)
    rollout = sampler_of(policy).sample(unit_of([0, 1], group_size=6, settings=used))
    tokens = torch.from_numpy(rollout.tokens_BL).long()
    for other in (
        replace(used, cfg_scale=1.0),
        replace(used, temperature=1.0),
        replace(used, top_k=0),
        replace(used, top_p=1.0),
    ):
        with torch.no_grad():
            scored, _ = score_tokens(policy, classes_of(rollout), tokens, other)
        difference = (scored - torch.from_numpy(rollout.rollout_logprobs_BL)).abs().max()
        assert difference > 1e-2, other


@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_the_full_pass() -> None:
    policy = tiny_policy(seed=3)
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(policy.codebook_size, (5, policy.num_tokens), generator=generator)
    class_ids_B = torch.tensor([0, 1, 2, 3, 4])  # 4 is the null class
    full_BLV = policy.teacher_forced(class_ids_B, tokens_BL)
    cache = policy.allocate_cache(5)
    steps = [policy.prefill(class_ids_B, cache)]
    steps += [
        policy.decode_next(tokens_BL[:, position, None], position, cache)
        for position in range(policy.num_tokens - 1)
    ]
    # Logits of order 1 to 5 in float32.
    torch.testing.assert_close(torch.cat(steps, dim=1), full_BLV, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(cfg_scale=2.0),
        SamplingSettings(temperature=0.7, top_k=4, top_p=0.95),
    ],
    ids=str,
)
@torch.no_grad()
def test_first_two_codes_are_drawn_with_their_joint_probability(settings) -> None:
    policy = tiny_policy(seed=1, grid_size=2, codebook_size=6)
    num_images = 6000
    rollout = sampler_of(policy).sample(unit_of([2], group_size=num_images, settings=settings))
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    padded = torch.cat([pairs, torch.zeros(36, 2, dtype=torch.int64)], dim=1)
    logprobs_BL, _ = score_tokens(policy, torch.full((36,), 2), padded, settings)
    expected = logprobs_BL[:, :2].double().sum(dim=1).exp().numpy() * num_images
    codes = rollout.tokens_BL[:, 0] * 6 + rollout.tokens_BL[:, 1]
    observed = np.bincount(codes, minlength=36)
    assert observed[expected == 0].sum() == 0, "codes that were cut off were drawn"
    # Cells of fewer than five expected counts are put together, as the test's theory asks.
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
    expected *= observed.sum() / expected.sum()
    # The noise is fixed, so this p-value is the same in every run.
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_a_unit_sampled_twice_is_bitwise_the_same() -> None:
    sampler = sampler_of(tiny_policy())
    unit = unit_of([1, 2, 0], group_size=5, settings=SamplingSettings(cfg_scale=1.5))
    first = sampler.sample(unit)
    others = [
        sampler.sample(replace(unit, **change))
        for change in ({"step": 9}, {"seed": 12}, {"purpose": "bootstrap"})
    ]
    again = sampler.sample(unit)
    assert np.array_equal(first.tokens_BL, again.tokens_BL)
    assert np.array_equal(first.rollout_logprobs_BL, again.rollout_logprobs_BL)
    for other in others:
        assert not np.array_equal(first.tokens_BL, other.tokens_BL), other.unit


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_smaller_units_draw_the_same_images(cfg_scale) -> None:
    settings = SamplingSettings(cfg_scale=cfg_scale)
    sampler = sampler_of(tiny_policy())
    whole = sampler.sample(unit_of([3, 1, 0, 2, 1, 3], group_size=4, settings=settings))
    parts = [
        sampler.sample(unit_of([3], group_size=4, first=0, settings=settings)),
        sampler.sample(unit_of([1, 0, 2], group_size=4, first=1, settings=settings)),
        sampler.sample(unit_of([1, 3], group_size=4, first=4, settings=settings)),
    ]
    tokens = np.concatenate([part.tokens_BL for part in parts])
    logprobs = np.concatenate([part.rollout_logprobs_BL for part in parts])
    assert np.array_equal(tokens, whole.tokens_BL)
    # Matrix products of other sizes round differently in float32.
    np.testing.assert_allclose(logprobs, whole.rollout_logprobs_BL, rtol=0, atol=2e-5)


def test_same_class_in_two_groups_draws_different_images() -> None:
    sampler = sampler_of(tiny_policy())
    rollout = sampler.sample(unit_of([1, 1], group_size=4, settings=SamplingSettings()))
    assert len(np.unique(rollout.tokens_BL, axis=0)) == 8


def test_the_extreme_noise_draws_codes_that_exist() -> None:
    policy = tiny_policy()
    settings = SamplingSettings(top_k=3)
    for value in (0.0, 1.0 - 2.0**-53):
        noise = torch.full((4, policy.num_tokens), value, dtype=torch.float64)
        tokens, logprobs = sample_tokens(policy, torch.arange(4), noise, settings)
        assert logprobs.isfinite().all(), "a code of probability 0 was drawn"
        assert tokens.max() < policy.codebook_size


def test_a_sampler_refuses_units_of_other_weights_and_unknown_classes() -> None:
    sampler = sampler_of(tiny_policy(), version=4)
    unit = unit_of([0], group_size=2, settings=SamplingSettings())
    with pytest.raises(RolloutError, match=r"asks for policy version 0 and the sampler holds 4"):
        sampler.sample(unit)
    beyond = replace(unit, policy_version=4, class_ids_P=np.array([4]))
    with pytest.raises(RolloutError, match=r"class 4 and the policy has 4"):
        sampler.sample(beyond)


def test_guidance_needs_a_null_class() -> None:
    policy = tiny_policy()
    policy.null_class = None
    check_guidance(policy, SamplingSettings())
    with pytest.raises(ConfigError, match=r"cfg_scale = 1\.5 needs a null class.*use cfg_scale 1"):
        check_guidance(policy, SamplingSettings(cfg_scale=1.5))


def test_queries_and_keys_vanish_at_the_condition_slot() -> None:
    table = rotary_table_2d(3, 8, num_condition_slots=2)
    x_BTHK = torch.randn(1, 11, 2, 8, generator=torch.Generator().manual_seed(0))
    turned = apply_rotary(x_BTHK, table)
    assert not turned[:, :2].any()
    # A rotation keeps lengths.
    torch.testing.assert_close(turned[:, 2:].norm(dim=-1), x_BTHK[:, 2:].norm(dim=-1))


@torch.no_grad()
def test_the_first_code_gives_the_condition_the_weight_of_score_zero() -> None:
    width, head_width = 8, 8
    attention = RotaryAttention(width, heads=1)
    generator = torch.Generator().manual_seed(4)
    for parameter in attention.parameters():
        parameter.normal_(std=0.5, generator=generator)
    x_BTD = torch.randn(1, 2, width, generator=generator)  # condition, code 0
    table = rotary_table_2d(2, head_width, num_condition_slots=1)
    found = attention(x_BTD, table[:2])[0]
    query, key, value = attention.wqkv(x_BTD[0]).split(width, dim=-1)
    # Code 0 sits at row 0, column 0, where the rotation is the identity.
    own_score = (query[1] @ key[1]) / head_width**0.5
    weights = torch.stack([torch.tensor(0.0), own_score]).softmax(dim=0)
    torch.testing.assert_close(found[0], attention.wo(value[0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], attention.wo(weights @ value), rtol=1e-5, atol=1e-5)
    assert abs(own_score) > 0.1, "equal weights would prove nothing"


def test_rotary_turns_half_the_pairs_by_the_row_and_half_by_the_column() -> None:
    grid, head_width = 4, 16
    table = rotary_table_2d(grid, head_width, num_condition_slots=1)[1:]
    for row, column in itertools.product(range(grid), range(grid)):
        for pair in range(head_width // 2):
            place = row if pair < head_width // 4 else column
            angle = place * 10000.0 ** (-2 * (pair % (head_width // 4)) / (head_width // 2))
            cos, sin = table[row * grid + column, pair].tolist()
            assert cos == pytest.approx(np.cos(angle), abs=1e-6)
            assert sin == pytest.approx(np.sin(angle), abs=1e-6)


def test_rotary_scores_depend_on_row_and_column_differences_alone() -> None:
    grid, head_width = 5, 16
    table = rotary_table_2d(grid, head_width, num_condition_slots=1)[1:]
    query, key = torch.randn(2, head_width, generator=torch.Generator().manual_seed(5))
    queries = apply_rotary(query.expand(1, grid**2, 1, head_width), table)[0, :, 0]
    keys = apply_rotary(key.expand(1, grid**2, 1, head_width), table)[0, :, 0]
    scores = queries @ keys.T
    by_difference: dict[tuple[int, int], list[float]] = {}
    for i, j in itertools.product(range(grid**2), range(grid**2)):
        difference = (i // grid - j // grid, i % grid - j % grid)
        by_difference.setdefault(difference, []).append(scores[i, j].item())
    for found in by_difference.values():
        # Sums of 16 products of order 1 in float32.
        assert max(found) - min(found) < 1e-5
    means = sorted(np.mean(found) for found in by_difference.values())
    assert min(np.diff(means)) > 1e-5, "two differences give one score"


@torch.no_grad()
def test_processing_a_position_alone_equals_processing_the_image() -> None:
    policy = tiny_policy()
    logits_BLV = policy.teacher_forced(
        torch.arange(4), torch.zeros(4, policy.num_tokens, dtype=torch.int64)
    )
    settings = SamplingSettings(temperature=0.7, top_k=5, top_p=0.9)
    whole = processed_logprobs(logits_BLV, settings)
    for position in range(policy.num_tokens):
        assert torch.equal(
            processed_logprobs(logits_BLV[:, position], settings), whole[:, position]
        )
