"""Leave-one-out rewards against their definition, over random and degenerate cases."""

from __future__ import annotations

import pytest
import torch

from rlgen.moments.coordinates import to_coordinates
from rlgen.moments.ema import EmaState, rho_eff
from rlgen.moments.leave_one_out import leave_one_out
from tests.numerics import loo_fid_brute_force as brute

# Full rank: sums of a few hundred numbers of order 1, and square roots of eigenvalues down to
# 1e-4. Singular: square roots of eigenvalues that are rounding, sqrt(1e-16) = 1e-8 each; about
# ten of them where the history, too, has fewer samples than dimensions.
ATOL_FULL_RANK = 1e-11
ATOL_SINGULAR = 3e-8
ATOL_LOW_RANK_HISTORY = 1e-7


def draw(count: int, width: int, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    rows = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return scale * rows / torch.arange(1, width + 1) ** 0.5 + 0.3


CASES = {
    # name: dimensions, history, N, decay, rank of the reference, tolerance
    "generic": (6, 40, 12, 0.8, None, ATOL_FULL_RANK),
    "one_dimension": (1, 30, 10, 0.5, None, ATOL_FULL_RANK),
    "two_dimensions": (2, 30, 10, 0.5, None, ATOL_FULL_RANK),
    "pair": (6, 40, 2, 0.9, None, ATOL_FULL_RANK),
    "slow": (10, 60, 40, 0.999, None, ATOL_FULL_RANK),
    "batch_only": (6, 40, 30, 0.0, None, ATOL_FULL_RANK),
    "batch_only_at_full_rank_limit": (6, 40, 7, 0.0, None, ATOL_SINGULAR),
    "batch_only_low_rank": (20, 40, 8, 0.0, None, ATOL_SINGULAR),
    "batch_only_pair": (6, 40, 2, 0.0, None, ATOL_SINGULAR),
    "singular_reference": (12, 60, 10, 0.8, 5, ATOL_FULL_RANK),
    "batch_only_singular_reference": (12, 60, 9, 0.0, 4, ATOL_FULL_RANK),
    "low_rank_history": (20, 6, 8, 0.7, None, ATOL_LOW_RANK_HISTORY),
}


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
@pytest.mark.parametrize("name", CASES)
def test_rewards_equal_definition(name: str, method: str, unbiased: bool) -> None:
    width, past, num, decay, rank, atol = CASES[name]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        moments = brute.reference_of(draw(200, width, generator), singular_rank=rank)
        history_HF = draw(past, width, generator, 1.2)
        batch_NF = draw(num, width, generator, 1.1)
        reference = to_coordinates(moments)
        state = EmaState.bootstrap(history_HF, reference)
        result = leave_one_out(
            state, batch_NF, reference, decay=decay, method=method, unbiased=unbiased
        )
        weights_H = torch.full((past,), 1 / past, dtype=torch.float64)
        expected_N, fid = brute.rewards(
            history_HF, weights_H, batch_NF, moments, decay=decay, unbiased=unbiased
        )
        torch.testing.assert_close(result.rewards_B, expected_N, rtol=0, atol=atol)
        torch.testing.assert_close(
            result.centred_B, expected_N - expected_N.mean(), rtol=0, atol=atol
        )
        assert result.fid == pytest.approx(fid, rel=0, abs=max(atol, 1e-11))


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("num", [2, 9])
def test_diagonal_rewards_equal_definition(num: int, decay: float, unbiased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    moments = brute.reference_of(draw(100, 7, generator))
    history_HF, batch_NF = draw(20, 7, generator), draw(num, 7, generator)
    history_HF[:, 2] = batch_NF[:, 2] = 0.25  # a dead feature: 0 / 0 in the std
    reference = to_coordinates(moments)
    result = leave_one_out(
        EmaState.bootstrap(history_HF, reference),
        batch_NF,
        reference,
        decay=decay,
        covariance="diagonal",
        unbiased=unbiased,
    )
    weights_H = torch.full((20,), 1 / 20, dtype=torch.float64)
    expected_N, fid = brute.rewards(
        history_HF,
        weights_H,
        batch_NF,
        moments,
        decay=decay,
        unbiased=unbiased,
        diagonal=True,
    )
    # std of a pair without one sample is exactly 0; its square comes from differences of 1e-16.
    torch.testing.assert_close(
        result.rewards_B, expected_N, rtol=0, atol=1e-7 if num == 2 else 1e-12
    )
    assert result.fid == pytest.approx(fid, rel=0, abs=1e-12)


def test_several_steps_equal_explicit_weights() -> None:
    """The recursion, with N and decay that vary, is the weighted sum over everything seen."""
    generator = torch.Generator().manual_seed(4)
    moments = brute.reference_of(draw(100, 6, generator))
    reference = to_coordinates(moments)
    rows_HF = draw(30, 6, generator)
    weights_H = torch.full((30,), 1 / 30, dtype=torch.float64)
    state = EmaState.bootstrap(rows_HF, reference)
    for num, decay in [(5, 0.9), (12, 0.5), (3, 0.8)]:
        batch_NF = draw(num, 6, generator, 1.3)
        result = leave_one_out(state, batch_NF, reference, decay=decay)
        expected_N, fid = brute.rewards(rows_HF, weights_H, batch_NF, moments, decay=decay)
        torch.testing.assert_close(result.rewards_B, expected_N, rtol=0, atol=ATOL_FULL_RANK)
        assert result.fid == pytest.approx(fid, rel=0, abs=ATOL_FULL_RANK)
        rows_HF = torch.cat([rows_HF, batch_NF])
        shares_N = torch.full((num,), (1 - decay) / num, dtype=torch.float64)
        weights_H = torch.cat([decay * weights_H, shares_N])
        state = result.state
    assert state.sum_sq_weights == pytest.approx(float(weights_H.square().sum()), rel=1e-12)


def test_rho_eff_equals_zero_initialised_moving_average() -> None:
    """m <- rho m + (1 - rho) batch from 0, divided by 1 - rho^t, step by step."""
    generator = torch.Generator().manual_seed(5)
    reference = to_coordinates(brute.reference_of(draw(100, 5, generator)))
    state = EmaState.empty(reference)
    raw_F, raw_FF = torch.zeros(5).double(), torch.zeros(5, 5).double()
    rho = 0.9
    for step in range(1, 6):
        batch_NF = draw(8, 5, generator)
        raw_F = rho * raw_F + (1 - rho) * batch_NF.mean(dim=0)
        raw_FF = rho * raw_FF + (1 - rho) * batch_NF.T @ batch_NF / 8
        decay = rho_eff(rho, state.num_updates + 1)
        state = leave_one_out(state, batch_NF, reference, decay=decay).state
        debias = 1 - rho**step
        expected = EmaState.from_raw_moments(raw_F / debias, raw_FF / debias, 0.0, reference)
        torch.testing.assert_close(state.mean_F, expected.mean_F, rtol=0, atol=1e-14)
        torch.testing.assert_close(state.var_F, expected.var_F, rtol=0, atol=1e-14)
        torch.testing.assert_close(state.cov_RR, expected.cov_RR, rtol=0, atol=1e-14)
    assert rho_eff(rho, 1) == 0.0
    assert rho_eff(rho, 1000) == pytest.approx(rho)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("width", [4, 15])
def test_duplicates_are_rewarded_alike(decay: float, width: int) -> None:
    generator = torch.Generator().manual_seed(6)
    moments = brute.reference_of(draw(100, width, generator))
    history_HF, batch_NF = draw(60, width, generator), draw(9, width, generator)
    batch_NF[4] = batch_NF[1]
    batch_NF[7] = batch_NF[1]
    reference = to_coordinates(moments)
    result = leave_one_out(
        EmaState.bootstrap(history_HF, reference), batch_NF, reference, decay=decay
    )
    weights_H = torch.full((60,), 1 / 60, dtype=torch.float64)
    expected_N, _ = brute.rewards(history_HF, weights_H, batch_NF, moments, decay=decay)
    atol = ATOL_SINGULAR if decay == 0 else ATOL_FULL_RANK
    torch.testing.assert_close(result.rewards_B, expected_N, rtol=0, atol=atol)
    spread = result.rewards_B[[1, 4, 7]]
    assert float(spread.max() - spread.min()) <= atol


@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
def test_steep_spectrum_keeps_its_small_eigenvalues(method: str) -> None:
    """Standard deviations from 1 to 1e-3: eigenvalues of the cross term span 12 decades."""
    generator = torch.Generator().manual_seed(8)
    steepness_F = torch.logspace(0, -3, 30, dtype=torch.float64)
    rows = [
        steepness_F * torch.randn(count, 30, generator=generator, dtype=torch.float64)
        for count in (300, 200, 12)
    ]
    moments = brute.reference_of(rows[0])
    reference = to_coordinates(moments)
    state = EmaState.bootstrap(rows[1], reference)
    result = leave_one_out(state, rows[2], reference, decay=0.9, method=method)
    weights_H = torch.full((200,), 1 / 200, dtype=torch.float64)
    expected_N, fid = brute.rewards(rows[1], weights_H, rows[2], moments, decay=0.9)
    # The matrix is graded, so its small eigenvalues keep their digits. A floor at 1e-9 of the
    # largest one would make rewards wrong by 1e-4.
    torch.testing.assert_close(result.rewards_B, expected_N, rtol=0, atol=ATOL_FULL_RANK)
    assert result.fid == pytest.approx(fid, rel=0, abs=1e-9)
    assert result.guard_fraction == 0
