"""Sample moments: accuracy, and merging in any order."""

from __future__ import annotations

import itertools
from functools import reduce

import pytest
import torch

from rlgen.errors import NumericsError
from rlgen.moments.moments import Moments, batch_moments, merge


def draw(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) * 2 + 1


def assert_same(a: Moments, b: Moments, atol: float) -> None:
    assert a.count == b.count
    torch.testing.assert_close(a.mean_F, b.mean_F, rtol=0, atol=atol)
    torch.testing.assert_close(a.cov_FF, b.cov_FF, rtol=0, atol=atol)


def test_moments_of_a_batch() -> None:
    rows = draw(50)
    moments = batch_moments(rows.float())
    expected = torch.cov(rows.float().double().T, correction=0)
    assert moments.count == 50
    assert moments.mean_F.dtype == moments.cov_FF.dtype == torch.float64
    torch.testing.assert_close(moments.mean_F, rows.float().double().mean(dim=0))
    torch.testing.assert_close(moments.cov_FF, expected, rtol=0, atol=1e-14)


def test_large_offset_costs_no_digits_of_the_covariance() -> None:
    rows = draw(40)
    # The offset is a power of two and rows are rounded to 2^-20, so adding it is exact.
    rows = (rows * 2**20).round() / 2**20
    moved = batch_moments(rows + 2.0**24)
    torch.testing.assert_close(moved.cov_FF, batch_moments(rows).cov_FF, rtol=0, atol=1e-12)


def test_any_order_and_split_gives_the_same_moments() -> None:
    rows = draw(41)
    whole = batch_moments(rows)
    parts = [batch_moments(part) for part in rows.split([1, 7, 13, 20])]
    for order in itertools.permutations(parts):
        # Numbers of order 1 to 10, a dozen operations: some 1e-15.
        assert_same(reduce(merge, order), whole, 1e-14)
    assert_same(merge(merge(*parts[:2]), merge(*parts[2:])), whole, 1e-14)


def test_empty_moments_are_neutral() -> None:
    moments = batch_moments(draw(6))
    nothing = Moments(0.0, torch.zeros(5).double(), torch.zeros(5, 5).double())
    assert_same(merge(nothing, moments), moments, 0)
    assert_same(merge(moments, nothing), moments, 0)
    with pytest.raises(NumericsError, match="0 and 0 samples"):
        merge(nothing, nothing)


def test_bad_input_is_refused() -> None:
    rows = draw(6)
    rows[4, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"1 of 6 .* sample 4"):
        batch_moments(rows)
    with pytest.raises(NumericsError, match=r"\[0, 5\]"):
        batch_moments(rows[:0])
    with pytest.raises(NumericsError, match="5 and 4 dimensions"):
        merge(batch_moments(draw(6)), batch_moments(draw(6)[:, :4]))
