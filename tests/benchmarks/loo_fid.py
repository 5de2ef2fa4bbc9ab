"""Cost of leave-one-out rewards against one eigenvalue-based distance per sample.

    python tests/benchmarks/loo_fid.py --require 70

Times, interleaved in one run and with one thread count, (a) a whole EMA step with rewards from
raw features, with and without the constant common to all samples, and (b) eigenvalue-only
LAPACK calls on a downdated matrix, of which a direct evaluation needs one per sample: the
fastest of three routes, and nothing but the call itself. Prints medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def main() -> int:
    """Run the benchmark; exit status 1 if a ratio is below --require."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=2048, help="feature dimensions")
    parser.add_argument("--n", type=int, default=256, help="samples of the step")
    parser.add_argument("--decay", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--require", type=float, default=0.0, help="smallest accepted ratio")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    for variable in THREAD_VARIABLES:  # read once, when the libraries are loaded
        os.environ[variable] = str(options.threads)
    result = measure(options)
    for name, value in result.items():
        print(f"{name:32s} {value:.4g}" if isinstance(value, float) else f"{name:32s} {value}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    worst = min(result["ratio_absolute"], result["ratio_centred"])
    if worst < options.require:
        print(f"ratio {worst:.1f} is below the required {options.require:g}", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace) -> dict[str, float | int | str]:
    """Time both sides; all times in seconds, medians over the rounds."""
    import torch
    from scipy.linalg import eigh, lapack

    from rlgen.moments.coordinates import to_coordinates
    from rlgen.moments.ema import EmaState
    from rlgen.moments.leave_one_out import leave_one_out
    from rlgen.moments.moments import batch_moments
    from rlgen.moments.reference import ReferenceMoments

    torch.set_num_threads(options.threads)
    d, n = options.d, options.n
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    mixing *= torch.arange(1, d + 1, dtype=torch.float64)[:, None] ** -0.5

    def sample(count: int, scale: float) -> torch.Tensor:
        noise = torch.randn(count, d, generator=generator, dtype=torch.float64)
        return torch.relu(noise @ mixing * scale + 0.1)

    moments = batch_moments(sample(2 * d, 1.0))
    reference = to_coordinates(ReferenceMoments("synthetic", 2 * d, moments.mean_F, moments.cov_FF))
    state = EmaState.bootstrap(sample(2 * d, 1.1), reference)
    features_BF = sample(n, 1.1).float()

    after = leave_one_out(state, features_BF, reference, decay=options.decay, absolute=False)
    offset_R = reference.map((features_BF[0].double() - after.state.mean_F)[None])[0]
    weight = (1 - options.decay) / (n - 1)
    # Overwriting a column-major matrix spares the routines a copy; made outside the clock.
    matrix = torch.addr(after.state.cov_RR, offset_R, offset_R, alpha=-weight).numpy()
    rank = matrix.shape[0]
    work = int(lapack.dsytrd_lwork(rank, lower=1)[0])

    def reduction() -> None:
        _, diagonal, off_diagonal, _, _ = lapack.dsytrd(matrix.T, lower=1, lwork=work)
        lapack.dsterf(diagonal, off_diagonal)

    brute: dict[str, Callable[[], object]] = {
        "torch_eigvalsh": lambda: torch.linalg.eigvalsh(torch.from_numpy(matrix)),
        "scipy_eigh_ev": lambda: eigh(matrix.T, eigvals_only=True, driver="ev", check_finite=False),
        "scipy_eigh_evd": lambda: eigh(
            matrix.T, eigvals_only=True, driver="evd", check_finite=False
        ),
        "lapack_dsytrd_dsterf": reduction,
    }
    ours: dict[str, Callable[[], object]] = {
        "step_absolute": lambda: leave_one_out(
            state, features_BF, reference, decay=options.decay, absolute=True
        ),
        "step_centred": lambda: leave_one_out(
            state, features_BF, reference, decay=options.decay, absolute=False
        ),
    }
    routes = {**brute, **ours}
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(options.repeats):
        for name, run in routes.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median_s = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(brute, key=lambda name: median_s[name])
    brute_s = n * median_s[fastest]
    return {
        "d": d,
        "n": n,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
        **{f"{name}_s": value for name, value in median_s.items()},
        "fastest_eigenvalue_route": fastest,
        "brute_force_s": brute_s,
        "ratio_absolute": brute_s / median_s["step_absolute"],
        "ratio_centred": brute_s / median_s["step_centred"],
    }


if __name__ == "__main__":
    sys.exit(main())
