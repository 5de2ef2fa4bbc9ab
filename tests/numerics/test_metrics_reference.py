"""rlgen's metrics against torch-fidelity's own routes and against formulas written out.

Shapes: N generated images, R real images, F features.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from rlgen.evaluation.metrics import (
    frechet_of_features,
    kernel_distance,
    neighborhoods,
    vendi_score,
)

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "frechet.py"


def draw(seed: int, count: int, width: int, *, offset: float = 0.4) -> torch.Tensor:
    """Rectified features of factors and noise, float32, as networks make them."""
    generator = np.random.default_rng([seed, count])
    mixing = np.random.default_rng(width).normal(size=(8, width)) * 0.3
    rows = offset + generator.normal(size=(count, 8)) @ mixing
    rows += generator.normal(size=(count, width)) * 0.1
    return torch.from_numpy(np.maximum(0, rows).astype(np.float32))


def torch_fidelity_fid(generated: torch.Tensor, real: torch.Tensor) -> float:
    """In float64; torch-fidelity itself converts features before this step."""
    statistics = [fid_features_to_statistics(part.double()) for part in (generated, real)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize(
    ("num_generated", "num_real", "width"), [(400, 300, 24), (900, 1500, 128), (1100, 900, 530)]
)
def test_fid_equals_torch_fidelitys(num_generated: int, num_real: int, width: int) -> None:
    generated, real = draw(1, num_generated, width), draw(2, num_real, width, offset=0.5)
    expected = torch_fidelity_fid(generated, real)
    assert expected > 0.1
    assert frechet_of_features(generated, real) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_generated", "num_real"), [(30, 50), (50, 30), (30, 200), (200, 30)])
def test_fid_of_fewer_images_than_features_is_exact(num_generated: int, num_real: int) -> None:
    generated, real = draw(1, num_generated, 60), draw(2, num_real, 60, offset=0.5)
    x, y = (part.double().numpy() - part.double().numpy().mean(0) for part in (generated, real))
    x, y = x / math.sqrt(num_generated - 1), y / math.sqrt(num_real - 1)
    gap = generated.double().mean(0) - real.double().mean(0)
    # The nuclear norm of the centred features' product, which needs no matrix root.
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    expected = float(gap @ gap) + (x**2).sum() + (y**2).sum() - 2 * root
    assert frechet_of_features(generated, real) == pytest.approx(expected, rel=1e-9)


def test_fid_of_a_feature_that_never_changes_is_that_of_the_others() -> None:
    generated, real = draw(1, 500, 20), draw(2, 400, 20, offset=0.5)
    expected = frechet_of_features(generated, real)
    with_dead = [torch.cat([part, torch.zeros(len(part), 2)], dim=1) for part in (generated, real)]
    # Its eigenvalue is 0 up to rounding, 1e-16 of the largest, whose root is 1e-8.
    assert frechet_of_features(*with_dead) == pytest.approx(expected, rel=1e-6)


def test_kid_and_precision_recall_are_torch_fidelitys_with_its_defaults() -> None:
    generated, real = draw(1, 1200, 16), draw(2, 1100, 16, offset=0.5)
    kid = kid_features_to_metric(generated, real, verbose=False)  # all else by default
    found = kernel_distance(generated, real)
    assert found.mean == kid["kernel_inception_distance_mean"] > 0
    assert found.std == kid["kernel_inception_distance_std"]
    prc = prc_features_to_metric(generated, real, verbose=False)
    assert tuple(neighborhoods(generated, real, num_neighbors=3)) == pytest.approx(
        (prc["precision"], prc["recall"], prc["f_score"]), abs=1e-7
    )


@pytest.mark.parametrize(("count", "width"), [(40, 12), (12, 40), (30, 30)])
def test_vendi_score_equals_the_entropy_of_the_whole_similarity_matrix(
    count: int, width: int
) -> None:
    features = draw(3, count, width).double().numpy()
    lengths = np.sqrt((features**2).sum(1))
    similarity = features @ features.T / np.outer(lengths, lengths)
    eigenvalues = np.linalg.eigvalsh(similarity / count)
    eigenvalues = eigenvalues[eigenvalues > 0]
    expected = math.exp(-(eigenvalues * np.log(eigenvalues)).sum())
    # Eigenvalues of rounding size add up to 1e-16 * 37 * N.
    assert vendi_score(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.timing
def test_fid_at_2048_features_is_five_times_faster_than_the_square_root() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--require", "5"],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["relative_difference"] < 1e-6
    assert result["width"] == 2048


def test_the_benchmark_fails_when_the_speedup_is_missed() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--count", "50", "--width", "16", "--require", "1e9"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "below the required" in done.stderr
