"""Leave-one-out rewards against stored vectors, evaluated in 40-digit arithmetic.

Each file brings its own tolerances: about 1e-9 of the distance, and looser where singular
moments limit every float64 method through square roots of rounded eigenvalues.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rlgen.moments.coordinates import ReferenceCoordinates, to_coordinates
from rlgen.moments.ema import EmaState, rho_eff
from rlgen.moments.leave_one_out import leave_one_out
from rlgen.moments.reference import ReferenceMoments

FILES = sorted((Path(__file__).parent / "data" / "loo_fid").glob("*.npz"))
# Sums of squares in another order: a few units in the last place of numbers of order 1 to 10.
ROUNDING = 1e-13


def load(path: Path) -> tuple[dict[str, np.ndarray], ReferenceCoordinates, EmaState]:
    with np.load(path) as archive:
        vectors = {key: archive[key] for key in archive.files}
    moments = ReferenceMoments(
        "vectors", 1000, torch.from_numpy(vectors["mu_ref"]), torch.from_numpy(vectors["cov_ref"])
    )
    reference = to_coordinates(moments)
    state = EmaState.from_raw_moments(
        torch.from_numpy(vectors["m1_prev"]),
        torch.from_numpy(vectors["m2_prev"]),
        float(vectors["s2_prev"]),
        reference,
    )
    return vectors, reference, state


def test_all_vectors_are_present() -> None:
    assert len(FILES) == 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["eigh", "tridiagonal"])
def test_rewards_match_vectors(path: Path, method: str) -> None:
    vectors, reference, state = load(path)
    result = leave_one_out(
        state,
        torch.from_numpy(vectors["f"]),
        reference,
        decay=float(vectors["rho_eff"]),
        unbiased=bool(vectors["unbiased"]),
        method=method,
    )
    atol = float(vectors["atol_reward"])
    np.testing.assert_allclose(result.rewards_B.numpy(), vectors["reward"], rtol=0, atol=atol)
    np.testing.assert_allclose(
        result.centred_B.numpy(),
        vectors["reward_centred"],
        rtol=0,
        atol=float(vectors["atol_centred"]),
    )
    assert result.fid == pytest.approx(float(vectors["fid_full"]), rel=0, abs=atol)
    np.testing.assert_allclose(
        result.fid + result.rewards_B.numpy(), vectors["fid_loo"], rtol=0, atol=2 * atol
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_new_moments_match_vectors(path: Path) -> None:
    vectors, reference, state = load(path)
    result = leave_one_out(
        state, torch.from_numpy(vectors["f"]), reference, decay=float(vectors["rho_eff"])
    )
    new = result.state
    mean_F = vectors["m1_new"]
    cov_FF = vectors["m2_new"] - np.outer(mean_F, mean_F)
    factor_FR = reference.map(torch.eye(len(mean_F), dtype=torch.float64)).numpy()
    np.testing.assert_allclose(new.mean_F.numpy(), mean_F, rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(new.var_F.numpy(), np.diag(cov_FF), rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(
        new.cov_RR.numpy(), factor_FR.T @ cov_FF @ factor_FR, rtol=0, atol=ROUNDING
    )
    assert new.sum_sq_weights == pytest.approx(float(vectors["s2_new"]), rel=1e-12)
    assert result.n_eff == pytest.approx(1 / float(vectors["s2_new"]), rel=1e-12)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_diagonal_rewards_match_vectors(path: Path) -> None:
    vectors, reference, state = load(path)
    result = leave_one_out(
        state,
        torch.from_numpy(vectors["f"]),
        reference,
        decay=float(vectors["rho_eff"]),
        covariance="diagonal",
    )
    np.testing.assert_allclose(
        result.rewards_B.numpy(), vectors["diag_reward"], rtol=0, atol=ROUNDING
    )
    assert result.fid == pytest.approx(float(vectors["diag_fid_full"]), rel=0, abs=ROUNDING)


@pytest.mark.parametrize("name", ["biascorr_step1_d10", "biascorr_step4_d10"])
def test_rho_eff_reproduces_bias_correction(name: str) -> None:
    path = next(path for path in FILES if path.stem == name)
    vectors, _, _ = load(path)
    decay = rho_eff(float(vectors["rho_raw"]), int(vectors["step"]))
    assert decay == pytest.approx(float(vectors["rho_eff"]), rel=1e-14, abs=0)
