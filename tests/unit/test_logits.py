"""Guidance, temperature, top-k and top-p against plain loops; entropy of cut distributions."""

import math

import pytest
import torch

from rlgen.sampling.logits import entropy, guide, processed_logprobs
from rlgen.types import SamplingSettings

INF = math.inf


def by_loops(logits: list[float], settings: SamplingSettings) -> list[float]:
    """The same distribution, one code at a time in Python floats."""
    scaled = [x / settings.temperature for x in logits]
    if settings.top_k:
        kth = sorted(scaled, reverse=True)[min(settings.top_k, len(scaled)) - 1]
        scaled = [x if x >= kth else -INF for x in scaled]
    probs = normalized(scaled)
    mass = 0.0
    kept = [False] * len(probs)
    for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass > settings.top_p:
            break
        kept[index] = True
        mass += probs[index]
    return normalized([x if keep else -INF for x, keep in zip(scaled, kept, strict=True)])


def normalized(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def test_guidance_extrapolates_from_the_unconditional_logits() -> None:
    conditional, unconditional = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5])
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    # u + 3 (c - u) = 3 + 3 (-2), 0.5 + 3 (-2.5)
    assert torch.equal(guide(conditional, unconditional, 3.0), torch.tensor([-3.0, -7.0]))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 11, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_processing_equals_plain_loops(temperature, top_k, top_p) -> None:
    logits = torch.randn(3, 2, 11, generator=torch.Generator().manual_seed(1)) * 2
    settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    found = processed_logprobs(logits, settings)
    expected = torch.tensor([[by_loops(row, settings) for row in rows] for rows in logits.tolist()])
    # Probabilities of order 1 computed in float32, whose rounding is 6e-8.
    torch.testing.assert_close(found.exp(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found == -INF, expected == 0), "the codes cut off are others"


def test_codes_tied_with_the_kth_are_all_kept() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0, 0.0])
    kept = processed_logprobs(logits, SamplingSettings(top_k=3)) > -INF
    assert kept.tolist() == [True, True, True, True, True, False]


@pytest.mark.parametrize(
    ("top_p", "num_kept"), [(0.01, 1), (0.45, 1), (0.55, 2), (0.79, 2), (0.81, 3), (0.99, 4)]
)
def test_top_p_keeps_the_first_code_past_the_mass(top_p, num_kept) -> None:
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    kept = processed_logprobs(logits, SamplingSettings(top_p=top_p)) > -INF
    likeliest_first = [1, 3, 0, 2]
    assert sorted(likeliest_first[:num_kept]) == kept.nonzero().flatten().tolist()


def test_top_p_measures_the_mass_that_top_k_left() -> None:
    # Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7 and 3/7: 0.55 is then reached by the first.
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    alone = processed_logprobs(logits, SamplingSettings(top_p=0.55)).exp()
    both = processed_logprobs(logits, SamplingSettings(top_p=0.55, top_k=2)).exp()
    torch.testing.assert_close(alone, torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]))
    torch.testing.assert_close(both, torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_what_is_kept_sums_to_one() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2)) * 3
    for settings in (
        SamplingSettings(),
        SamplingSettings(top_k=7),
        SamplingSettings(temperature=0.3, top_k=50, top_p=0.9),
    ):
        total = processed_logprobs(logits, settings).double().exp().sum(dim=-1)
        # 300 float32 terms, each within 6e-8 of its own size.
        torch.testing.assert_close(total, torch.ones(50).double(), rtol=0, atol=1e-6)


def test_low_precision_logits_are_processed_in_float32() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = processed_logprobs(logits, SamplingSettings(temperature=0.7))
    assert found.dtype == torch.float32
    assert torch.equal(found, processed_logprobs(logits.float(), SamplingSettings(temperature=0.7)))


def test_entropy_ignores_codes_that_are_cut_off() -> None:
    logprobs = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    expected = torch.tensor([0.5 * math.log(2) + 0.5 * math.log(4), 0.0])
    torch.testing.assert_close(entropy(logprobs), expected)
    uniform = torch.zeros(64).log_softmax(dim=-1)
    torch.testing.assert_close(entropy(uniform), torch.tensor(math.log(64)))


@pytest.mark.parametrize("weight", [1e-3, 1.0, 100.0])
def test_entropys_gradient_is_finite_and_right_where_codes_are_cut_off(weight) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4], requires_grad=True)
    settings = SamplingSettings(top_k=3)
    (weight * entropy(processed_logprobs(logits, settings))).backward()
    kept = torch.tensor([0, 2, 3])
    free = logits.detach()[kept].requires_grad_()
    probs = free.softmax(dim=0)
    (-weight * (probs * probs.log()).sum()).backward()
    assert logits.grad is not None and free.grad is not None
    expected = torch.zeros(5).index_copy(0, kept, free.grad)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6 * weight)
