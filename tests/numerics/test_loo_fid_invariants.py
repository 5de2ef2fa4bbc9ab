"""Symmetries, closed forms and limits of the leave-one-out rewards."""

from __future__ import annotations

import pytest
import torch

from rlgen.moments.coordinates import to_coordinates
from rlgen.moments.ema import EmaState
from rlgen.moments.leave_one_out import LeaveOneOut, leave_one_out
from rlgen.moments.reference import ReferenceMoments
from tests.numerics import loo_fid_brute_force as brute

WIDTH, NUM = 12, 20
# Rewards here are of order 1e-2; another order of operations moves them by 1e-14 to 1e-13.
ATOL = 1e-12


def draw(seed: int, count: int, width: int = WIDTH) -> torch.Tensor:
    rows = torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return rows / torch.arange(1, width + 1) ** 0.5 + 0.2


def run(
    reference_rows: torch.Tensor,
    history_HF: torch.Tensor,
    batch_BF: torch.Tensor,
    decay: float = 0.8,
    **options: object,
) -> LeaveOneOut:
    reference = to_coordinates(brute.reference_of(reference_rows))
    state = EmaState.bootstrap(history_HF, reference)
    return leave_one_out(state, batch_BF, reference, decay=decay, **options)


ROWS = (draw(0, 200), 1.2 * draw(1, 60), 1.1 * draw(2, NUM))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_permutation_permutes_rewards(covariance: str, decay: float) -> None:
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(7))
    base = run(*ROWS, decay=decay, covariance=covariance)
    permuted = run(*ROWS[:2], ROWS[2][order], decay=decay, covariance=covariance)
    torch.testing.assert_close(permuted.rewards_B, base.rewards_B[order], rtol=0, atol=ATOL)
    assert permuted.fid == pytest.approx(base.fid, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_rotation_keeps_rewards(decay: float) -> None:
    rotation = torch.linalg.qr(draw(8, WIDTH)).Q
    base = run(*ROWS, decay=decay)
    rotated = run(*(rows @ rotation for rows in ROWS), decay=decay)
    torch.testing.assert_close(rotated.rewards_B, base.rewards_B, rtol=0, atol=ATOL)
    # The diagonal distance, by contrast, depends on the axes: the two must not be confused.
    first = run(*ROWS, decay=decay, covariance="diagonal")
    second = run(*(rows @ rotation for rows in ROWS), decay=decay, covariance="diagonal")
    assert float((first.rewards_B - second.rewards_B).abs().max()) > 1e-4


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("factor", [1e-3, 7.0, 1e4])
def test_scaling_features_scales_rewards_by_the_square(covariance: str, factor: float) -> None:
    base = run(*ROWS, covariance=covariance)
    scaled = run(*(factor * rows for rows in ROWS), covariance=covariance)
    torch.testing.assert_close(scaled.rewards_B / factor**2, base.rewards_B, rtol=0, atol=ATOL)
    assert scaled.fid / factor**2 == pytest.approx(base.fid, rel=1e-11)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_translation_keeps_rewards(covariance: str) -> None:
    base = run(*ROWS, covariance=covariance)
    moved = run(*(rows + 1000.0 for rows in ROWS), covariance=covariance)
    # Features of 1000 carry rounding of 1e-13 each.
    torch.testing.assert_close(moved.rewards_B, base.rewards_B, rtol=0, atol=1e-11)


def test_bounds_hold_without_guards() -> None:
    assert run(*ROWS, method="eigh").guard_fraction == 0
    assert run(*ROWS, method="tridiagonal").guard_fraction == 0


@pytest.mark.parametrize("unbiased", [False, True])
def test_methods_agree(unbiased: bool) -> None:
    rows = (draw(10, 900, 96), 1.2 * draw(11, 600, 96), draw(12, 300, 96))
    eigh = run(*rows, method="eigh", unbiased=unbiased)
    tridiagonal = run(*rows, method="tridiagonal", unbiased=unbiased)
    # 1e-9 of the deviation: both reach 1e-12 of delta, of which the deviation is a small part.
    atol = 1e-9 * float(eigh.rewards_B.std())
    torch.testing.assert_close(tridiagonal.rewards_B, eigh.rewards_B, rtol=0, atol=atol)
    assert tridiagonal.fid == pytest.approx(eigh.fid, rel=1e-11)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_one_dimension_has_a_closed_form(covariance: str) -> None:
    """FID = (mean - mean_r)^2 + (std - std_r)^2."""
    reference_rows, history_HF, batch_BF = draw(13, 50, 1), draw(14, 12, 1), 2 * draw(15, 6, 1)
    decay, mean_r, std_r = 0.7, reference_rows.mean(), reference_rows.std(correction=0)

    def fid(batch: torch.Tensor) -> torch.Tensor:
        m1 = decay * history_HF.mean() + (1 - decay) * batch.mean()
        m2 = decay * history_HF.square().mean() + (1 - decay) * batch.square().mean()
        return (m1 - mean_r) ** 2 + ((m2 - m1**2).sqrt() - std_r) ** 2

    kept = [fid(batch_BF[torch.arange(6) != i]) for i in range(6)]
    result = run(reference_rows, history_HF, batch_BF, decay, covariance=covariance)
    expected_B = torch.stack(kept) - fid(batch_BF)
    torch.testing.assert_close(result.rewards_B, expected_B, rtol=0, atol=ATOL)
    assert result.fid == pytest.approx(float(fid(batch_BF)), rel=1e-12)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_zero_reference_covariance_leaves_mean_and_trace(covariance: str, decay: float) -> None:
    moments = ReferenceMoments(
        "zero", 10, torch.ones(WIDTH).double(), torch.zeros(WIDTH, WIDTH).double()
    )
    reference = to_coordinates(moments)
    state = EmaState.bootstrap(ROWS[1], reference)
    result = leave_one_out(state, ROWS[2], reference, decay=decay, covariance=covariance)

    def fid(batch_BF: torch.Tensor) -> torch.Tensor:
        mean_F = decay * ROWS[1].mean(dim=0) + (1 - decay) * batch_BF.mean(dim=0)
        square = decay * ROWS[1].square().sum(dim=1).mean()
        square = square + (1 - decay) * batch_BF.square().sum(dim=1).mean()
        return (mean_F - 1).square().sum() + square - mean_F @ mean_F

    kept = torch.stack([fid(ROWS[2][torch.arange(NUM) != i]) for i in range(NUM)])
    torch.testing.assert_close(result.rewards_B, kept - fid(ROWS[2]), rtol=0, atol=ATOL)
    assert result.fid == pytest.approx(float(fid(ROWS[2])), rel=1e-12)


def test_influence_converges_as_decay_goes_to_one() -> None:
    """rewards / c tends to the influence function, with an error linear in 1 - rho."""
    limit = run(*ROWS, decay=1 - 1e-7).influence_B
    far = run(*ROWS, decay=1 - 1e-2).influence_B - limit
    near = run(*ROWS, decay=1 - 1e-3).influence_B - limit
    assert float(far.norm() / near.norm()) == pytest.approx(10, rel=0.1)
    assert float(near.norm() / limit.norm()) < 1e-2


def test_centred_and_relative_rewards_differ_by_constants() -> None:
    absolute = run(*ROWS)
    relative = run(*ROWS, absolute=False)
    assert relative.fid is None
    torch.testing.assert_close(relative.centred_B, absolute.centred_B, rtol=0, atol=ATOL)
    assert float((absolute.rewards_B - relative.rewards_B).std()) < ATOL
    assert abs(float(absolute.centred_B.sum())) < ATOL
    c = (1 - 0.8) / (NUM - 1)
    torch.testing.assert_close(absolute.influence_B * c, absolute.centred_B)


def test_a_sample_towards_the_reference_helps() -> None:
    """Positive means the sample helps."""
    batch_BF = torch.cat([ROWS[0][:1] * 0 + ROWS[0].mean(dim=0), ROWS[2][1:]])
    batch_BF[1:] += 1.0
    rewards_B = run(*ROWS[:2], batch_BF, absolute=True).rewards_B
    assert float(rewards_B[0]) > 0
    assert int(rewards_B.argmax()) == 0


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("kept", [3, WIDTH - 1])
def test_truncation_equals_projected_features(kept: int, decay: float) -> None:
    moments = brute.reference_of(ROWS[0])
    truncated = to_coordinates(moments, max_components=kept)
    axes_FR = truncated.components_FR
    projected = to_coordinates(brute.reference_of(ROWS[0] @ axes_FR))
    first = leave_one_out(EmaState.bootstrap(ROWS[1], truncated), ROWS[2], truncated, decay=decay)
    second = leave_one_out(
        EmaState.bootstrap(ROWS[1] @ axes_FR, projected), ROWS[2] @ axes_FR, projected, decay=decay
    )
    torch.testing.assert_close(first.rewards_B, second.rewards_B, rtol=0, atol=ATOL)
    assert first.fid == pytest.approx(second.fid, rel=1e-11)
    assert not to_coordinates(moments, max_components=WIDTH).is_truncated
