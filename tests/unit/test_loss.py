"""The clipped surrogate and the k3 divergence against their definitions."""

import math

import pytest
import torch

from rlgen.grpo.loss import (
    block_weights,
    clipped_surrogate,
    importance_weights,
    k3_divergence,
    token_mean,
)

RATIOS = ["token", "sequence"]


def surrogate(new, old, advantages, *, ratio="token", clip_low=0.2, clip_high=0.3):
    return clipped_surrogate(
        new, old, advantages, ratio=ratio, clip_low=clip_low, clip_high=clip_high
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_at_ratio_one_the_gradient_is_reinforces(ratio) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 9, generator=generator, requires_grad=True)
    tokens = torch.randint(9, (6, 5, 1), generator=generator)
    advantages = torch.randn(6, generator=generator)

    def logprobs() -> torch.Tensor:
        return logits.log_softmax(dim=-1).gather(-1, tokens)[..., 0]

    found = surrogate(logprobs(), logprobs().detach(), advantages, ratio=ratio)
    (gradient,) = torch.autograd.grad(found.loss_B.mean(), logits)
    reinforce = -(advantages * logprobs().mean(dim=1)).mean()
    (expected,) = torch.autograd.grad(reinforce, logits)
    # Gradients of order 1e-2 in float32.
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(found.ratio, torch.ones_like(found.ratio))
    assert not found.clipped.any()
    torch.testing.assert_close(found.loss_B.detach(), -advantages)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(
    ("value", "advantage", "loss", "is_clipped"),
    [
        (1.5, 2.0, -1.3 * 2.0, True),  # already likelier: no more to gain
        (0.5, 2.0, -0.5 * 2.0, False),
        # Min over the two, not max: a bad image that got likelier is pushed back at full size.
        (1.5, -2.0, 1.5 * 2.0, False),
        (0.5, -2.0, 0.8 * 2.0, True),
        (1.25, 2.0, -1.25 * 2.0, False),  # the upper limit is 1.3, the lower 0.8
        (0.85, -2.0, 0.85 * 2.0, False),
        (0.75, -2.0, 0.8 * 2.0, True),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_pessimistic_branch_is_taken(ratio, value, advantage, loss, is_clipped) -> None:
    old = torch.full((1, 4), -2.0)
    new = (old + math.log(value)).requires_grad_()
    found = surrogate(new, old, torch.tensor([advantage]), ratio=ratio)
    assert found.loss_B.item() == pytest.approx(loss, abs=1e-5)
    assert found.clipped.all().item() == found.clipped.any().item() == is_clipped
    found.loss_B.sum().backward()
    # One mean over four tokens; a clipped image has no gradient at all.
    expected = 0.0 if is_clipped else -advantage * value / 4
    torch.testing.assert_close(new.grad, torch.full((1, 4), expected), rtol=1e-5, atol=1e-6)


def test_sequence_ratio_is_the_exponential_of_the_mean_difference() -> None:
    new = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, -0.5]])
    old = torch.tensor([[-1.5, -1.9, -3.2], [-0.5, -0.5, -0.5]])
    found = surrogate(new, old, torch.ones(2), ratio="sequence")
    torch.testing.assert_close(found.ratio, torch.tensor([[math.exp(0.6 / 3)], [1.0]]))
    by_token = surrogate(new, old, torch.ones(2), ratio="token")
    torch.testing.assert_close(by_token.ratio, (new - old).exp())


def test_token_ratios_are_clipped_one_by_one() -> None:
    old = torch.zeros(1, 3)
    new = torch.tensor([[2.0, 1.1, 0.5]]).log().requires_grad_()
    found = surrogate(new, old, torch.tensor([3.0]))
    assert found.clipped.tolist() == [[True, False, False]]
    assert found.loss_B.item() == pytest.approx(-3.0 * (1.3 + 1.1 + 0.5) / 3, rel=1e-6)
    found.loss_B.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -1.1, -0.5]]), rtol=1e-5, atol=1e-6)


def test_each_image_has_its_own_advantage() -> None:
    old = torch.zeros(2, 3)
    found = surrogate(old.clone(), old, torch.tensor([1.0, -4.0]))
    assert found.loss_B.tolist() == [-1.0, 4.0]


def test_what_is_watched_carries_no_gradient() -> None:
    new = torch.zeros(1, 2, requires_grad=True)
    found = surrogate(new, torch.zeros(1, 2), torch.ones(1))
    assert not found.ratio.requires_grad and not found.clipped.requires_grad
    assert found.loss_B.requires_grad


def test_k3_is_never_negative_and_zero_for_equal_policies() -> None:
    generator = torch.Generator().manual_seed(1)
    new, ref = 3 * torch.randn(2, 500, 7, generator=generator)
    assert (k3_divergence(new, ref) > 0).all()
    assert not k3_divergence(new, new).any()


def test_k3_averages_to_the_exact_divergence() -> None:
    generator = torch.Generator().manual_seed(2)
    new, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(dim=-1)
    exact = (new.exp() * (new - ref)).sum()
    # The expectation over the policy, one code at a time: each code is an image of one token.
    per_code = k3_divergence(new[:, None], ref[:, None])
    torch.testing.assert_close((new.exp() * per_code).sum(), exact)
    reverse = (ref.exp() * (ref - new)).sum()
    assert abs(exact - reverse) > 1e-3, "the direction would not show"


def test_k3_is_the_mean_over_tokens() -> None:
    new, ref = torch.zeros(1, 2), torch.tensor([[0.0, math.log(2)]])
    # 2 - ln 2 - 1 for the second token, 0 for the first
    torch.testing.assert_close(k3_divergence(new, ref), torch.tensor([(1 - math.log(2)) / 2]))


def test_k3_pulls_the_policy_back() -> None:
    ref = torch.tensor([[-1.0, -1.0]])
    new = torch.tensor([[-0.5, -1.5]], requires_grad=True)
    k3_divergence(new, ref).sum().backward()
    # d/dnew of exp(ref - new) - (ref - new) - 1 is 1 - exp(ref - new).
    expected = (1 - (ref - new.detach()).exp()) / 2
    torch.testing.assert_close(new.grad, expected)
    assert new.grad[0, 0] > 0 > new.grad[0, 1]


def test_a_sequence_divergence_is_k3_of_the_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    new, ref = torch.randn(2, 4, 6, generator=generator)
    d = (ref - new).mean(dim=1)
    found = k3_divergence(new, ref, level="sequence")
    torch.testing.assert_close(found, d.exp() - d - 1)
    assert (found < k3_divergence(new, ref)).all(), "Jensen: the mean hides opposite tokens"


def test_tokens_of_a_large_scale_count_less_and_the_mean_weight_is_one() -> None:
    weights = block_weights((1, 4, 9), alpha=0.5)
    assert weights is not None
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    by_scale = weights.split((1, 4, 9))
    assert all((scale == scale[0]).all() for scale in by_scale)
    ratios = [float(scale[0] / by_scale[0][0]) for scale in by_scale]
    assert ratios == pytest.approx([1, 1 / 2, 1 / 3])
    # With alpha 1 every scale weighs the same in all.
    whole = [float(s.sum()) for s in block_weights((1, 4, 9), alpha=1.0).split((1, 4, 9))]
    assert whole == pytest.approx([14 / 3] * 3)


def test_one_token_at_a_time_needs_no_weights() -> None:
    assert block_weights((1,) * 16, alpha=0.7) is None
    assert block_weights((1, 4), alpha=0.0) is None


@pytest.mark.parametrize("ratio", RATIOS)
def test_weights_enter_the_surrogate_and_the_divergence(ratio) -> None:
    generator = torch.Generator().manual_seed(3)
    new, old = 0.1 * torch.randn(2, 4, 5, generator=generator)
    advantages = torch.ones(4)
    weights = block_weights((1, 4), alpha=1.0)
    assert weights is not None
    limits = {"clip_low": 0.9, "clip_high": 9.0}
    found = clipped_surrogate(new, old, advantages, ratio=ratio, weights_L=weights, **limits)
    difference = new - old
    if ratio == "token":
        expected = -(difference.exp() * weights).mean(dim=1)
    else:
        expected = -(difference * weights).mean(dim=1).exp()
    torch.testing.assert_close(found.loss_B, expected)
    k3 = (-difference).exp() + difference - 1
    torch.testing.assert_close(k3_divergence(new, old, weights), token_mean(k3, weights))


def test_importance_weights_are_truncated_ratios_of_the_policy_before_to_the_samplers() -> None:
    proximal = torch.tensor([[0.5, 0.6, 0.1], [0.2, 0.2, 0.2]]).log().requires_grad_()
    rollout = torch.tensor([[0.4, 0.2, 0.2], [0.2, 0.1, 0.4]]).log()
    by_token = importance_weights(proximal, rollout, ratio="token", cap=1.5)
    expected = torch.tensor([[1.25, 1.5, 0.5], [1.0, 1.5, 0.5]])
    torch.testing.assert_close(by_token.weights, expected)
    assert by_token.truncated.tolist() == [[False, True, False], [False, True, False]]
    assert not by_token.weights.requires_grad, "a weight is no path for the gradient"

    by_image = importance_weights(proximal, rollout, ratio="sequence", cap=1.2)
    # Geometric means over the tokens: (1.25 * 3 * 0.5)^(1/3) = 1.233 and (1 * 2 * 0.5)^(1/3) = 1.
    torch.testing.assert_close(by_image.weights, torch.tensor([[1.2], [1.0]]))
    assert by_image.truncated.tolist() == [[True], [False]]


def test_importance_multiplies_the_clipped_gain_by_hand() -> None:
    proximal = torch.zeros(1, 3)
    new = torch.tensor([[2.0, 1.1, 0.5]]).log().requires_grad_()
    rollout = torch.tensor([[1.0, 0.5, 4.0]]).log()
    importance = importance_weights(proximal, rollout, ratio="token", cap=1.5)
    found = clipped_surrogate(
        new,
        proximal,
        torch.tensor([3.0]),
        ratio="token",
        clip_low=0.2,
        clip_high=0.3,
        importance=importance,
    )
    # Weights 1, 1.5 of 2, and 0.25; gains 1.3, 1.1 and 0.5: the first is clipped.
    assert found.loss_B.item() == pytest.approx(-3.0 * (1.3 + 1.65 + 0.125) / 3, rel=1e-6)
    found.loss_B.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.0, -1.65, -0.125]]))
    assert found.clipped.tolist() == [[True, False, False]], "the ratio alone decides"


def test_an_image_counts_by_its_own_weight_and_weights_of_tokens_enter_its_ratio() -> None:
    generator = torch.Generator().manual_seed(3)
    proximal, rollout = 0.1 * torch.randn(2, 4, 5, generator=generator)
    weights = block_weights((1, 4), alpha=1.0)
    found = importance_weights(proximal, rollout, ratio="sequence", cap=9.0, weights_L=weights)
    expected = token_mean(proximal - rollout, weights).exp()
    torch.testing.assert_close(found.weights[:, 0], expected)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0])
    surrogate = clipped_surrogate(
        proximal,
        proximal,
        advantages,
        ratio="sequence",
        clip_low=0.2,
        clip_high=0.2,
        weights_L=weights,
        importance=found,
    )
    torch.testing.assert_close(surrogate.loss_B, -advantages * expected)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_token_that_the_filter_leaves_out_by_now_counts_nothing(ratio) -> None:
    """An older policy drew it inside its top-k; the policy before the update has it outside."""
    out = -math.inf
    rollout = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]])
    proximal = torch.tensor([[-1.0, out], [-1.5, -0.5]])
    logits = torch.tensor([[-0.8, 0.0], [-1.5, -0.7]], requires_grad=True)
    logprobs = logits.masked_fill(torch.tensor([[False, True], [False, False]]), out)
    importance = importance_weights(proximal, rollout, ratio=ratio, cap=2.0)
    assert not importance.truncated.any()
    found = clipped_surrogate(
        logprobs,
        proximal,
        torch.ones(2),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.3,
        importance=importance,
    )
    # Image 0: e^0.2 and nothing for the token outside; the whole image, if it counts as one.
    first = -math.exp(0.2) / 2 if ratio == "token" else 0.0
    second = -(1 + math.exp(-0.2)) / 2 if ratio == "token" else -math.exp(-0.1)
    torch.testing.assert_close(found.loss_B.detach(), torch.tensor([first, second]))
    (gradient,) = torch.autograd.grad(found.loss_B.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0.0


def test_k3_of_a_token_outside_either_filter_is_zero() -> None:
    new = torch.tensor([[-1.0, -math.inf, -2.0]], requires_grad=True)
    found = k3_divergence(new, torch.tensor([[-1.5, -1.0, -math.inf]]))
    expected = (math.exp(-0.5) + 0.5 - 1.0) / 3
    torch.testing.assert_close(found.detach(), torch.tensor([expected]))
    (gradient,) = torch.autograd.grad(found.sum(), new)
    assert gradient.isfinite().all()
