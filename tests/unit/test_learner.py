"""One policy update: the ratio gate, micro-batches, inner epochs, references, failures, resume.

Shapes: B images, L image tokens.
"""

import copy
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlgen.config import RunConfig
from rlgen.errors import CheckpointError, NumericsError
from rlgen.learner.batch import split_batch
from rlgen.learner.checkpoint import commit_checkpoint, write_parts
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import parse_state, restore_learner, snapshot_learner
from rlgen.nn.weights import state_sha256
from rlgen.types import LearnerBatch
from tests.tiny import CPU, sampled_batch, tiny_config, tiny_policy


def learner_for(config: RunConfig, seed: int = 0) -> Learner:
    return Learner(tiny_policy(seed), config, device=CPU)


def digest(module: nn.Module) -> str:
    return state_sha256(module.state_dict())


def gradients_of_next_step(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A dictionary that the learner's next optimiser step fills with (clipped) gradients."""
    found: dict[str, Tensor] = {}
    step = learner.optimizer.step

    def recording_step(*args: Any, **options: Any) -> Any:
        found.update({n: p.grad.clone() for n, p in learner.policy.named_parameters()})
        return step(*args, **options)

    monkeypatch.setattr(learner.optimizer, "step", recording_step)
    return found


def with_logprobs(batch: LearnerBatch, change_BL: np.ndarray | float) -> LearnerBatch:
    changed = (batch.rollout_logprobs_BL + change_BL).astype(np.float32)
    return replace(batch, rollout_logprobs_BL=changed)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout__cfg_scale": 1.5},
        {"rollout__temperature": 0.7, "rollout__top_k": 5, "rollout__top_p": 0.9},
        {"rollout__cfg_scale": 3.0, "rollout__top_k": 5, "grpo__ratio": "sequence"},
    ],
    ids=["plain", "guided", "truncated", "guided-sequence"],
)
def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(settings) -> None:
    config = tiny_config(**settings)
    learner = learner_for(config)
    before = digest(learner.policy)
    metrics = learner.update(sampled_batch(learner.policy, config))
    assert metrics["policy/ratio_max_deviation"] < 1e-4
    assert metrics["policy/ratio_clipped_frac"] == 0.0
    assert metrics["policy/lag_steps"] == 0.0
    assert metrics["policy/grad_norm"] > 0
    assert digest(learner.policy) != before
    assert learner.policy_version == 1


def test_the_gradient_on_policy_is_reinforces(monkeypatch) -> None:
    config = tiny_config(grpo__kl_coef=0.0, learner__max_grad_norm=1e9, rollout__cfg_scale=1.5)
    learner = learner_for(config)
    batch = sampled_batch(learner.policy, config)
    reference = copy.deepcopy(learner.policy)
    found = gradients_of_next_step(learner, monkeypatch)
    learner.update(batch)
    classes = torch.from_numpy(batch.class_ids_B)
    tokens = torch.from_numpy(batch.tokens_BL).long()
    conditional = reference.teacher_forced(classes, tokens)
    unconditional = reference.teacher_forced(torch.full_like(classes, 4), tokens)
    guided = unconditional + 1.5 * (conditional - unconditional)
    logprobs_BL = guided.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    (-torch.from_numpy(batch.advantages_B) * logprobs_BL.mean(dim=1)).mean().backward()
    largest = max(gradient.abs().max().item() for gradient in found.values())
    assert largest > 1e-3
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        # The ratio differs from 1 by some 1e-6, and float32 sums of 12 x 9 terms by as much.
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2e-5 * largest)


@pytest.mark.parametrize("change", [1e-3, -1e-3, math.nan])
def test_the_gate_stops_a_run_whose_sampler_and_learner_differ(change) -> None:
    config = tiny_config()
    learner = learner_for(config)
    changes_BL = np.zeros((config.images_per_step, learner.policy.num_tokens))
    changes_BL[7, 3] = change  # a single token is enough
    batch = with_logprobs(sampled_batch(learner.policy, config), changes_BL)
    before = digest(learner.policy)
    with pytest.raises(NumericsError) as caught:
        learner.update(batch)
    message = str(caught.value)
    assert re.search("reaches nan" if math.isnan(change) else r"reaches (0\.001|0\.00099)", message)
    assert "allowed: 0.0001" in message
    for hint in ("digests", "dtype", "cfg_scale", "temperature", "top_k", "top_p", "dropout"):
        assert hint in message
    assert digest(learner.policy) == before
    assert learner.policy_version == 0
    assert all(parameter.grad is None for parameter in learner.policy.parameters())


def test_the_gate_compares_the_settings_of_sampler_and_learner() -> None:
    sampled_with = tiny_config(rollout__cfg_scale=1.5)
    learner = learner_for(tiny_config())
    with pytest.raises(NumericsError, match="scores another distribution"):
        learner.update(sampled_batch(learner.policy, sampled_with))


def test_rounding_passes_the_gate_and_so_does_a_wider_tolerance() -> None:
    config = tiny_config()
    learner = learner_for(config)
    learner.update(with_logprobs(sampled_batch(learner.policy, config), 2e-5))
    wide = tiny_config(grpo__ratio_tolerance=1e-2)
    learner = learner_for(wide)
    learner.update(with_logprobs(sampled_batch(learner.policy, wide), 1e-3))


def test_the_gate_is_for_the_first_update_and_equal_versions() -> None:
    config = tiny_config()
    learner = learner_for(config)
    learner.update(sampled_batch(learner.policy, config))
    stale = sampled_batch(tiny_policy(), config, step=1)  # version 0, the learner has 1
    metrics = learner.update(stale)
    assert metrics["policy/lag_steps"] == 1.0
    assert metrics["policy/logprob_gap_max"] > 1e-4, "the gate would have stopped it"
    assert metrics["policy/ratio_max_deviation"] == 0.0, "to the policy before the update"


def test_the_gate_waits_for_a_batch_of_the_learners_own_version() -> None:
    config = tiny_config()
    learner = learner_for(config)
    learner.policy_version = 1  # as after a resume, with samplers that are a step behind
    learner.update(with_logprobs(sampled_batch(learner.policy, config, step=1), 0.01))
    wrong = with_logprobs(sampled_batch(learner.policy, config, step=2, version=2), 0.01)
    with pytest.raises(NumericsError, match="scores another distribution"):
        learner.update(wrong)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rollout__cfg_scale": 1.5, "grpo__ratio": "sequence", "entropy__base_coef": 0.01}],
    ids=["plain", "guided-sequence-entropy"],
)
@pytest.mark.parametrize("micro_batch_size", [1, 5, 12])
def test_micro_batches_change_nothing(settings, micro_batch_size, monkeypatch) -> None:
    results = []
    for size in (480, micro_batch_size):
        config = tiny_config(learner__micro_batch_size=size, grpo__kl_coef=0.1, **settings)
        learner = learner_for(config)
        with torch.no_grad():  # so that the KL to the reference is not 0
            learner.reference.output.weight.mul_(0.9)
        gradients = gradients_of_next_step(learner, monkeypatch)
        metrics = learner.update(sampled_batch(tiny_policy(), config))
        results.append((gradients, metrics, learner.policy.state_dict()))
    (gradients, metrics, state), (other_gradients, other_metrics, other_state) = results
    assert metrics["loss/kl"] > 1e-4
    # Sums of 12 images in another order: float32 rounding, relative to the largest gradient.
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            other_gradients[name], gradient, rtol=0, atol=2e-6 * largest, msg=name
        )
        # AdamW's first step is lr * sign of the gradient but where that is near 1e-8.
        is_clear = gradient.abs() > 1e-4 * largest
        torch.testing.assert_close(
            other_state[name][is_clear], state[name][is_clear], rtol=0, atol=1e-6, msg=name
        )
    for key, value in metrics.items():
        # The largest deviation from ratio 1 is itself rounding.
        tolerance = 1e-5 if key == "policy/ratio_max_deviation" else 2e-6
        assert other_metrics[key] == pytest.approx(value, abs=tolerance, rel=1e-5), key


def test_the_loss_is_the_mean_over_all_images() -> None:
    config = tiny_config(grpo__kl_coef=0.0)
    learner = learner_for(config)
    batch = sampled_batch(learner.policy, config)
    metrics = learner.update(batch)
    # At ratio 1 an image's loss is minus its advantage.
    assert metrics["loss/policy"] == pytest.approx(-batch.advantages_B.mean(), abs=1e-5)
    assert metrics["loss/total"] == metrics["loss/policy"]
    assert metrics["policy/entropy_normalized"] == pytest.approx(
        metrics["policy/entropy"] / math.log(17)
    )


def test_without_advantages_nothing_moves() -> None:
    config = tiny_config(grpo__kl_coef=0.0, learner__weight_decay=0.0)
    learner = learner_for(config)
    before = digest(learner.policy)
    batch = sampled_batch(learner.policy, config)
    learner.update(replace(batch, advantages_B=np.zeros_like(batch.advantages_B)))
    assert digest(learner.policy) == before
    assert learner.policy_version == 1


def test_the_penalty_alone_pulls_towards_the_reference() -> None:
    config = tiny_config(grpo__kl_coef=1.0, learner__lr=1e-3, learner__final_lr_fraction=1.0)
    learner = learner_for(config)
    with torch.no_grad():
        learner.reference.output.weight.mul_(0.8)
    batch = sampled_batch(learner.policy, config)
    batch = replace(batch, advantages_B=np.zeros_like(batch.advantages_B))
    divergences = [learner.update(replace(batch, step=step))["loss/kl"] for step in range(4)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.99 * divergences[0]


def test_the_entropy_bonus_raises_entropy() -> None:
    config = tiny_config(
        grpo__kl_coef=0.0,
        entropy__base_coef=1.0,
        entropy__max_coef=1.0,
        entropy__target=1.0,
        entropy__warmup_fraction=0.0,
        entropy__decay_start_fraction=1.0,
    )
    learner = learner_for(config)
    batch = sampled_batch(learner.policy, config)
    batch = replace(batch, advantages_B=np.zeros_like(batch.advantages_B))
    found = [learner.update(replace(batch, step=step)) for step in range(4)]
    entropies = [metrics["policy/entropy"] for metrics in found]
    assert entropies == sorted(entropies) and entropies[-1] > entropies[0]
    assert [metrics["policy/entropy_coef"] for metrics in found] == [1.0] * 4


def test_an_update_makes_good_images_likelier() -> None:
    config = tiny_config(grpo__kl_coef=0.0, learner__lr=1e-3)
    learner = learner_for(config)
    batch = sampled_batch(learner.policy, config)
    first = learner.update(batch)["loss/policy"]
    again = learner.update(replace(batch, step=1))["loss/policy"]
    assert again < first - 1e-3


def test_inner_epochs_are_updates_on_the_same_batch() -> None:
    constant_rate = {"learner__final_lr_fraction": 1.0, "grpo__kl_coef": 0.05}
    twice = tiny_config(grpo__inner_epochs=2, **constant_rate)
    once = tiny_config(grpo__inner_epochs=1, **constant_rate)
    batch = sampled_batch(tiny_policy(), once)
    together, apart = learner_for(twice), learner_for(once)
    metrics = together.update(batch)
    first = apart.update(batch)
    after_one = digest(apart.policy)
    apart.policy_version = 0  # else the same batch would count as an older policy's
    apart.update(batch)
    assert digest(together.policy) == digest(apart.policy) != after_one
    # The step's metrics are those before its first optimiser step.
    assert metrics["loss/policy"] == first["loss/policy"]
    assert metrics["policy/entropy"] == first["policy/entropy"]


def test_the_clip_fraction_is_the_last_inner_epochs() -> None:
    config = tiny_config(grpo__inner_epochs=3, learner__lr=0.05, learner__max_grad_norm=100.0)
    learner = learner_for(config)
    metrics = learner.update(sampled_batch(learner.policy, config))
    assert metrics["policy/ratio_max_deviation"] < 1e-4, "of the first epoch"
    assert metrics["policy/ratio_clipped_frac"] > 0


def test_learning_rate_falls_linearly_to_its_last_share() -> None:
    config = tiny_config(steps=3, learner__lr=1e-3, learner__final_lr_fraction=0.2)
    learner = learner_for(config)
    rates = [
        learner.update(sampled_batch(learner.policy, config, step=step, version=step))["policy/lr"]
        for step in range(3)
    ]
    assert rates == pytest.approx([1e-3, 0.6e-3, 0.2e-3])
    assert learner.optimizer.param_groups[0]["lr"] == rates[-1]


def test_gradients_are_limited_to_the_norm(monkeypatch) -> None:
    config = tiny_config(learner__max_grad_norm=0.01)
    learner = learner_for(config)
    gradients = gradients_of_next_step(learner, monkeypatch)
    metrics = learner.update(sampled_batch(learner.policy, config))
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    assert metrics["policy/grad_norm"] > 0.1, "the norm before the limit"
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_a_frozen_reference_stays_and_an_ema_reference_follows() -> None:
    for kind in ("frozen", "ema"):
        config = tiny_config(grpo__reference=kind, grpo__reference_decay=0.9)
        learner = learner_for(config)
        old = copy.deepcopy(learner.reference.state_dict())
        learner.update(sampled_batch(learner.policy, config))
        new = learner.policy.state_dict()
        for name, tensor in learner.reference.state_dict().items():
            expected = 0.9 * old[name] + 0.1 * new[name] if kind == "ema" else old[name]
            atol = 5e-7 if kind == "ema" else 0.0  # weights of order 1 in float32
            torch.testing.assert_close(tensor, expected, rtol=0, atol=atol)
        moved = digest(learner.reference) != state_sha256(old)
        assert moved == (kind == "ema")


def test_kl_coef_zero_saves_the_reference() -> None:
    config = tiny_config(grpo__kl_coef=0.0)
    learner = learner_for(config)
    assert learner.reference is None
    assert learner.update(sampled_batch(learner.policy, config))["loss/kl"] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_advantage_that_is_not_finite_stops_before_the_step(bad) -> None:
    config = tiny_config()
    learner = learner_for(config)
    batch = sampled_batch(learner.policy, config)
    advantages_B = batch.advantages_B.copy()
    advantages_B[5] = bad
    before = digest(learner.policy)
    with pytest.raises(NumericsError, match=r"gradient norm is (nan|inf) at step 0.*not stepped"):
        learner.update(replace(batch, advantages_B=advantages_B))
    assert digest(learner.policy) == before
    assert not learner.optimizer.state, "no moment of AdamW may hold it"
    assert all(parameter.grad is None for parameter in learner.policy.parameters())
    assert learner.policy_version == 0 and learner.entropy.mean_entropy is None
    # The learner goes on as if nothing had happened.
    other = learner_for(config)
    learner.update(batch)
    other.update(batch)
    assert digest(learner.policy) == digest(other.policy)


def test_a_gradient_that_is_not_finite_stops_before_the_step() -> None:
    config = tiny_config()
    learner = learner_for(config)
    learner.update(sampled_batch(learner.policy, config))
    before = digest(learner.policy)
    batch = sampled_batch(learner.policy, config, step=1, version=1)
    # exp(200) overflows, and a negative advantage takes the free branch of the surrogate.
    broken = with_logprobs(batch, -200.0)
    with pytest.raises(NumericsError, match=r"at step 1.*lower learner\.lr"):
        learner.update(broken)
    assert digest(learner.policy) == before
    assert learner.policy_version == 1


def older_batch(config: RunConfig) -> LearnerBatch:
    """Step 3, drawn by a policy that is a little behind the base."""
    older = tiny_policy()
    with torch.no_grad():
        older.output.weight.mul_(0.8)
    return sampled_batch(older, config, step=3, version=2)


def importance_by_hand(
    batch: LearnerBatch, proximal_BL: Tensor, *, ratio: str, cap: float
) -> Tensor:
    """[B, L] or [B, 1]."""
    difference = proximal_BL - torch.from_numpy(batch.rollout_logprobs_BL)
    if ratio == "sequence":
        difference = difference.mean(dim=1, keepdim=True)
    return torch.minimum(difference.exp(), torch.tensor(cap))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_an_older_policys_samples_are_weighted_and_the_ratio_is_to_the_policy_before(
    ratio, monkeypatch
) -> None:
    cap = 1.02
    config = tiny_config(
        grpo__ratio=ratio,
        grpo__importance_cap=cap,
        grpo__kl_coef=0.0,
        learner__max_grad_norm=1e9,
        learner__micro_batch_size=5,
    )
    learner = learner_for(config)
    learner.policy_version = 3
    stale = older_batch(config)
    before = copy.deepcopy(learner.policy)
    found = gradients_of_next_step(learner, monkeypatch)
    metrics = learner.update(stale)

    tokens = torch.from_numpy(stale.tokens_BL).long()
    logits = before.teacher_forced(torch.from_numpy(stale.class_ids_B), tokens)
    logprobs_BL = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    weights = importance_by_hand(stale, logprobs_BL.detach(), ratio=ratio, cap=cap)
    advantages_B = torch.from_numpy(stale.advantages_B)
    # At ratio 1 the gradient of the ratio is that of the log-prob: REINFORCE, weighted.
    (-advantages_B * (weights * logprobs_BL).mean(dim=1)).mean().backward()
    largest = max(gradient.abs().max().item() for gradient in found.values())
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2e-5 * largest)
    truncated = (weights == cap).float().mean().item()
    assert 0.1 < truncated < 0.9, "or the cap is not tested"
    assert metrics["grpo/importance_truncated"] == pytest.approx(truncated)
    assert metrics["grpo/importance_mean"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert metrics["loss/policy"] == pytest.approx(
        -(advantages_B * weights.mean(dim=1)).mean().item(), rel=1e-4, abs=1e-6
    )


def test_later_inner_epochs_are_clipped_around_the_policy_before_the_update() -> None:
    settings = {"grpo__kl_coef": 0.0, "learner__lr": 0.02, "learner__max_grad_norm": 1e9}
    config = tiny_config(grpo__inner_epochs=2, **settings)
    learner = learner_for(config)
    learner.policy_version = 3
    stale = older_batch(config)
    metrics = learner.update(stale)
    # The same samples with the log-probs of the policy before the update are on policy.
    tokens = torch.from_numpy(stale.tokens_BL).long()
    with torch.no_grad():
        logits = tiny_policy().teacher_forced(torch.from_numpy(stale.class_ids_B), tokens)
    logprobs_BL = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    fresh = replace(stale, policy_version=3, rollout_logprobs_BL=logprobs_BL.numpy())
    other = learner_for(tiny_config(grpo__inner_epochs=2, **settings))
    other.policy_version = 3
    assert metrics["policy/ratio_max_deviation"] == 0.0
    on_policy = other.update(fresh)
    assert on_policy["policy/ratio_clipped_frac"] > 0
    # Not equal: the weights turn the first step a little.
    assert metrics["policy/ratio_clipped_frac"] == pytest.approx(
        on_policy["policy/ratio_clipped_frac"], abs=0.1
    )


def test_one_log_prob_that_is_far_off_counts_no_more_than_the_cap() -> None:
    config = tiny_config(grpo__importance_cap=3.0)
    learner = learner_for(config)
    learner.policy_version = 1
    stale = sampled_batch(tiny_policy(), config, step=1)
    metrics = learner.update(with_logprobs(stale, -200.0))  # exp(200) would overflow
    assert metrics["grpo/importance_mean"] == 3.0
    assert metrics["grpo/importance_truncated"] == 1.0


def test_the_cap_changes_nothing_on_policy() -> None:
    digests = set()
    for cap in (1.0, 2.0):
        config = tiny_config(grpo__importance_cap=cap, grpo__inner_epochs=2)
        learner = learner_for(config)
        metrics = learner.update(sampled_batch(learner.policy, config))
        assert metrics["grpo/importance_mean"] == 1.0
        assert metrics["grpo/importance_truncated"] == 0.0
        digests.add(digest(learner.policy))
    assert len(digests) == 1


def run_steps(learner: Learner, config: RunConfig, steps: range) -> None:
    for step in steps:
        learner.update(sampled_batch(learner.policy, config, step=step, version=step))


@pytest.mark.parametrize(
    "settings",
    [
        {"grpo__kl_coef": 0.0},
        {
            "grpo__reference": "ema",
            "grpo__inner_epochs": 2,
            "entropy__base_coef": 0.01,
            "rollout__cfg_scale": 1.5,
            "learner__weight_decay": 0.01,
        },
    ],
    ids=["plain", "everything"],
)
def test_two_steps_and_resume_end_like_an_uninterrupted_run_to_the_last_bit(settings) -> None:
    config = tiny_config(**settings)
    whole = learner_for(config)
    run_steps(whole, config, range(4))

    first = learner_for(config)
    run_steps(first, config, range(2))
    uri = f"memory://test-learner/{len(settings)}/step-00002"
    commit_checkpoint(uri, write_parts(uri, snapshot_learner(first)), meta={})
    resumed = learner_for(config, seed=9)  # every weight must come from the checkpoint
    restore_learner(resumed, uri)
    assert resumed.policy_version == 2
    run_steps(resumed, config, range(2, 4))

    assert digest(resumed.policy) == digest(whole.policy)
    if whole.reference is not None:
        assert digest(resumed.reference) == digest(whole.reference)
    assert resumed.entropy == whole.entropy
    # And the optimiser's moments matter: without them the end differs.
    forgetful = learner_for(config)
    forgetful.policy.load_state_dict(first.policy.state_dict())
    forgetful.policy_version = 2
    run_steps(forgetful, config, range(2, 4))
    assert digest(forgetful.policy) != digest(whole.policy)


def test_state_of_a_run_with_another_reference_is_refused() -> None:
    with_reference = learner_for(tiny_config(grpo__kl_coef=0.1))
    without = learner_for(tiny_config(grpo__kl_coef=0.0))
    with pytest.raises(CheckpointError, match=r"has a reference policy and grpo\.kl_coef = 0\.0"):
        without.load_state_dict(with_reference.state_dict())
    with pytest.raises(CheckpointError, match=r"lacks a reference policy.*kl_coef = 0\.1"):
        with_reference.load_state_dict(without.state_dict())


@pytest.mark.parametrize("payload", [b"", b"no torch file"])
def test_state_that_is_no_torch_file_is_refused(payload) -> None:
    with pytest.raises(CheckpointError, match="memory://x holds no readable state"):
        parse_state(payload, "memory://x")


def test_splitting_gives_every_rank_its_whole_groups() -> None:
    config = tiny_config()
    batch = sampled_batch(tiny_policy(), config)
    parts = [split_batch(batch, rank=rank, world_size=2) for rank in range(2)]
    assert [len(part.class_ids_B) for part in parts] == [6, 6]
    for name in ("class_ids_B", "tokens_BL", "rollout_logprobs_BL", "advantages_B"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(batch, name)), name
    assert {part.num_images_total for part in parts} == {12}
