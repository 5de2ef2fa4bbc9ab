"""Degenerate batches, rejected samples, and the EMA state's checkpoints and errors."""

from __future__ import annotations

import io

import pytest
import torch

from rlgen.errors import CheckpointError, ConfigError, NumericsError
from rlgen.moments.coordinates import ReferenceCoordinates, to_coordinates
from rlgen.moments.ema import EmaState, ema_step, rho_eff
from rlgen.moments.leave_one_out import leave_one_out
from tests.numerics import loo_fid_brute_force as brute

WIDTH = 8


def draw(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) + 0.2


@pytest.fixture(scope="module")
def reference() -> ReferenceCoordinates:
    return to_coordinates(brute.reference_of(draw(0, 100)))


@pytest.fixture(scope="module")
def state(reference: ReferenceCoordinates) -> EmaState:
    return EmaState.bootstrap(1.3 * draw(1, 40), reference)


BOTH = pytest.mark.parametrize("covariance", ["full", "diagonal"])


@BOTH
def test_empty_batch_changes_nothing(
    reference: ReferenceCoordinates, state: EmaState, covariance: str
) -> None:
    result = leave_one_out(
        state, torch.empty(0, WIDTH), reference, decay=0.9, covariance=covariance
    )
    assert result.state is state
    assert result.rewards_B.shape == (0,)
    one = leave_one_out(state, draw(2, 1), reference, decay=0.999999, covariance=covariance)
    # One sample of weight 1e-6 moves the distance by about that much.
    assert result.fid == pytest.approx(one.fid, abs=1e-4)


@BOTH
def test_single_sample_updates_the_state_without_reward(
    reference: ReferenceCoordinates, state: EmaState, covariance: str
) -> None:
    batch_BF = draw(2, 1)
    result = leave_one_out(state, batch_BF, reference, decay=0.9, covariance=covariance)
    assert result.rewards_B.tolist() == [0.0]
    assert result.influence_B.tolist() == [0.0]
    torch.testing.assert_close(result.state.mean_F, 0.9 * state.mean_F + 0.1 * batch_BF[0])
    assert result.state.num_updates == state.num_updates + 1
    assert result.state.sum_sq_weights == pytest.approx(0.81 * state.sum_sq_weights + 0.01)


@BOTH
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_equal_samples_get_exactly_zero(
    reference: ReferenceCoordinates, state: EmaState, covariance: str, decay: float
) -> None:
    batch_BF = draw(3, 1).expand(7, WIDTH) / 3
    result = leave_one_out(state, batch_BF, reference, decay=decay, covariance=covariance)
    assert result.rewards_B.tolist() == [0.0] * 7
    assert result.centred_B.tolist() == [0.0] * 7


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_non_finite_samples_are_left_out(
    reference: ReferenceCoordinates,
    state: EmaState,
    covariance: str,
    bad: float,
    dtype: torch.dtype,
) -> None:
    batch_BF = draw(4, 9).to(dtype)
    broken_BF = batch_BF.clone()
    broken_BF[2, 5] = bad
    broken_BF[6] = bad
    keep = [0, 1, 3, 4, 5, 7, 8]
    result = leave_one_out(state, broken_BF, reference, decay=0.9, covariance=covariance)
    expected = leave_one_out(state, batch_BF[keep], reference, decay=0.9, covariance=covariance)
    assert result.valid_B.tolist() == [i in keep for i in range(9)]
    assert torch.equal(result.rewards_B[keep], expected.rewards_B)
    assert torch.equal(result.influence_B[keep], expected.influence_B)
    assert result.rewards_B[[2, 6]].tolist() == [0.0, 0.0]
    assert torch.equal(result.state.cov_RR, expected.state.cov_RR)
    assert result.fid == expected.fid


def test_all_samples_rejected(reference: ReferenceCoordinates, state: EmaState) -> None:
    batch_BF = torch.full((3, WIDTH), float("nan"))
    result = leave_one_out(state, batch_BF, reference, decay=0.9)
    assert result.state is state
    assert result.rewards_B.tolist() == [0.0, 0.0, 0.0]


def test_dead_features_change_nothing() -> None:
    alive = (draw(5, 60), 1.2 * draw(6, 40), draw(7, 10))
    dead = [torch.cat([rows, torch.full((len(rows), 3), 0.7).double()], dim=1) for rows in alive]
    for covariance in ("full", "diagonal"):
        results = []
        for rows in (alive, dead):
            reference = to_coordinates(brute.reference_of(rows[0]))
            start = EmaState.bootstrap(rows[1], reference)
            results.append(
                leave_one_out(start, rows[2], reference, decay=0.8, covariance=covariance)
            )
        torch.testing.assert_close(results[1].rewards_B, results[0].rewards_B, rtol=0, atol=1e-12)
        assert results[1].fid == pytest.approx(results[0].fid, rel=1e-11)


def test_start_at_reference_has_distance_zero(reference: ReferenceCoordinates) -> None:
    start = EmaState.from_reference(reference)
    result = leave_one_out(start, torch.empty(0, WIDTH), reference, decay=0.9)
    # tr S + tr S - 2 tr S, with traces of order 10.
    assert result.fid == pytest.approx(0, abs=1e-13)
    assert result.n_eff == pytest.approx(100)


def test_bootstrap_leaves_out_broken_rows(reference: ReferenceCoordinates) -> None:
    rows = draw(8, 30)
    broken = torch.cat([rows, torch.full((2, WIDTH), float("nan")).double()])
    start = EmaState.bootstrap(broken, reference)
    assert torch.equal(start.cov_RR, EmaState.bootstrap(rows, reference).cov_RR)
    assert start.sum_sq_weights == 1 / 30
    with pytest.raises(ConfigError, match="at least one finite"):
        EmaState.bootstrap(broken[30:], reference)


def test_bootstrap_equals_raw_moments(reference: ReferenceCoordinates) -> None:
    rows = draw(9, 30)
    raw = EmaState.from_raw_moments(rows.mean(dim=0), rows.T @ rows / 30, 1 / 30, reference)
    start = EmaState.bootstrap(rows, reference)
    for name in ("mean_F", "var_F", "cov_RR"):
        torch.testing.assert_close(getattr(raw, name), getattr(start, name), rtol=0, atol=1e-13)


def test_resumed_state_continues_to_the_bit(
    reference: ReferenceCoordinates, state: EmaState
) -> None:
    first = leave_one_out(state, draw(10, 6), reference, decay=0.9)
    buffer = io.BytesIO()
    torch.save(first.state.state_dict(), buffer)
    buffer.seek(0)
    restored = EmaState.from_state_dict(torch.load(buffer, weights_only=True), reference)
    expected = leave_one_out(first.state, draw(11, 6), reference, decay=0.9)
    resumed = leave_one_out(restored, draw(11, 6), reference, decay=0.9)
    assert torch.equal(resumed.rewards_B, expected.rewards_B)
    assert torch.equal(resumed.state.cov_RR, expected.state.cov_RR)
    assert resumed.state.num_updates == expected.state.num_updates == 2
    assert resumed.state.sum_sq_weights == expected.state.sum_sq_weights


def test_state_of_another_reference_is_refused(
    reference: ReferenceCoordinates, state: EmaState
) -> None:
    values = state.state_dict()
    with pytest.raises(CheckpointError, match="cov_RR"):
        EmaState.from_state_dict({**values, "cov_RR": torch.zeros(3, 3)}, reference)
    del values["var_F"]
    with pytest.raises(CheckpointError, match="var_F"):
        EmaState.from_state_dict(values, reference)


def test_wrong_arguments_are_refused(reference: ReferenceCoordinates, state: EmaState) -> None:
    with pytest.raises(ConfigError, match=r"decay = 1\.0"):
        leave_one_out(state, draw(12, 4), reference, decay=1.0)
    with pytest.raises(ConfigError, match="the reference has 8 dimensions"):
        leave_one_out(state, torch.zeros(4, WIDTH + 1), reference, decay=0.9)
    truncated = to_coordinates(brute.reference_of(draw(0, 100)), max_components=3)
    with pytest.raises(ConfigError, match="truncated to 3"):
        leave_one_out(
            EmaState.from_reference(truncated),
            draw(12, 4),
            truncated,
            decay=0.9,
            covariance="diagonal",
        )
    with pytest.raises(ConfigError, match="max_components = 0"):
        to_coordinates(brute.reference_of(draw(0, 100)), max_components=0)
    with pytest.raises(ConfigError, match="step = 0"):
        rho_eff(0.9, 0)


def test_overflow_is_loud(reference: ReferenceCoordinates, state: EmaState) -> None:
    batch_BF = draw(13, 4)
    batch_BF[0, 0] = 1e200
    with pytest.raises(NumericsError, match="1e\\+200"):
        leave_one_out(state, batch_BF, reference, decay=0.9)


def test_inputs_are_not_modified(reference: ReferenceCoordinates, state: EmaState) -> None:
    batch_BF = draw(14, 6)
    copies = [t.clone() for t in (batch_BF, state.mean_F, state.var_F, state.cov_RR)]
    leave_one_out(state, batch_BF, reference, decay=0.9)
    ema_step(state, batch_BF, reference, decay=0.0)
    originals = (batch_BF, state.mean_F, state.var_F, state.cov_RR)
    for copy, original in zip(copies, originals, strict=True):
        assert torch.equal(copy, original)
