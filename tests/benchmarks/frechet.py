"""FID on features that are there already: rlgen's distance against SciPy's matrix square root.

`python tests/benchmarks/frechet.py --require 5` takes a minute or two and prints one line of JSON;
the exit status is 1 if ours is less than five times faster. Both sides go from the same float32
features, more of them than dimensions, to the distance, in one run, with as many threads as
OMP_NUM_THREADS allows. CPU times are compared as well: other work on the machine changes them less.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch

from rlgen.evaluation.metrics import frechet_of_features

NUM_FACTORS = 64
REPEATS = 2
"""Runs of ours before the square root, and after."""


class Timed(NamedTuple):
    """A result, and what it took."""

    value: float
    wall_s: float
    cpu_s: float


def make_features(seed: int, count: int, width: int) -> np.ndarray:
    """Rectified features of a few factors and noise, float32 [count, width], full rank."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(NUM_FACTORS, width)) * 0.15
    factors = generator.normal(size=(count, NUM_FACTORS)) @ mixing
    noise = generator.normal(size=(count, width)) * 0.05
    return np.maximum(0, 0.4 + 0.05 * seed + factors + noise).astype(np.float32)


def by_square_root(generated_NF: np.ndarray, real_RF: np.ndarray) -> float:
    """The usual route: covariances, the square root of their product, its trace."""
    cov_a, cov_b = np.cov(generated_NF, rowvar=False), np.cov(real_RF, rowvar=False)
    gap = generated_NF.mean(axis=0, dtype=np.float64) - real_RF.mean(axis=0, dtype=np.float64)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root).real)


def timed(compute: Callable[[], float]) -> Timed:
    """Run once."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = compute()
    return Timed(value, time.perf_counter() - wall, time.process_time() - cpu)


def compare(*, count: int, width: int) -> dict[str, float]:
    """Both routes on the same features, ours before and after, and how they differ."""
    generated_NF = make_features(1, count, width)
    real_RF = make_features(2, count, width)
    tensors = torch.from_numpy(generated_NF), torch.from_numpy(real_RF)

    def ours() -> list[Timed]:
        return [timed(lambda: frechet_of_features(*tensors)) for _ in range(REPEATS)]

    before = ours()
    theirs = timed(lambda: by_square_root(generated_NF, real_RF))
    runs = before + ours()
    wall_s = median(run.wall_s for run in runs)
    cpu_s = median(run.cpu_s for run in runs)
    return {
        "count": count,
        "width": width,
        "threads": torch.get_num_threads(),
        "distance": runs[0].value,
        "relative_difference": abs(runs[0].value - theirs.value) / theirs.value,
        "ours_s": wall_s,
        "sqrtm_s": theirs.wall_s,
        "speedup": theirs.wall_s / wall_s,
        "speedup_cpu_time": theirs.cpu_s / cpu_s,
    }


def main() -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=5000, help="images on each side")
    parser.add_argument("--width", type=int, default=2048, help="features")
    parser.add_argument("--require", type=float, default=0.0, help="least speedup")
    given = parser.parse_args()
    found = compare(count=given.count, width=given.width)
    print(json.dumps(found))
    if found["speedup"] < given.require:
        print(f"{found['speedup']:.2f} is below the required {given.require:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
