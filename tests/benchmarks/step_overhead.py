"""A step of the distributed job against the same step in one process.

    python tests/benchmarks/step_overhead.py [--steps 3] [--rounds 13] [--require 1.25]

Both runtimes do the same arithmetic on the embedded default, with one worker per role and one
thread each. Steps of the two alternate in blocks, so that a busy moment of the machine hits
both. Prints medians and their ratio.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from statistics import median
from tempfile import TemporaryDirectory

from rlgen.actors.ray_runtime import RayRuntime
from rlgen.config import RunConfig, load_config
from rlgen.digits.assets import ensure_assets, resolve_embedded
from rlgen.jobs.grpo import bootstrap_moments
from rlgen.learner.batch import learner_batch, pooled
from rlgen.learner.runtime import LocalRuntime, Runtime
from rlgen.sampling.units import training_units


def one_step(config: RunConfig, runtime: Runtime, step: int) -> float:
    """Run a training step; seconds."""
    started = time.perf_counter()
    units = training_units(config, step, policy_version=step)
    runtime.submit(units)
    scored = runtime.collect(units)
    rewards = runtime.commit_moments(step, *pooled(scored))
    runtime.learn(learner_batch(step, scored, rewards))
    return time.perf_counter() - started


def measure(*, block_steps: int, rounds: int, settings: Sequence[str] = ()) -> dict[str, float]:
    """Median step seconds of both runtimes, and the median of the ratios of paired blocks."""
    config = load_config(None, ["rollout.num_workers=1", "reward.num_workers=1", *settings])
    config = resolve_embedded(config, ensure_assets(config.digits, lambda *_: None))
    with TemporaryDirectory() as folder:
        runtimes: dict[str, Runtime] = {
            "local": LocalRuntime(config),
            "ray": RayRuntime(config, storage=folder),
        }
        times: dict[str, list[float]] = {name: [] for name in runtimes}
        try:
            for runtime in runtimes.values():
                runtime.start(config)
                bootstrap_moments(config, runtime)
                one_step(config, runtime, 0)  # first touch of everything
            for block in range(rounds):
                first = 1 + block * block_steps
                for name, runtime in runtimes.items():
                    steps = range(first, first + block_steps)
                    times[name].append(median(one_step(config, runtime, step) for step in steps))
        finally:
            for runtime in runtimes.values():
                runtime.close()
    ratios = [ray / local for ray, local in zip(times["ray"], times["local"], strict=True)]
    medians = {f"{name}_step_s": median(values) for name, values in times.items()}
    return medians | {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def main() -> int:
    """Measure, print, compare with the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=13, help="blocks per runtime")
    parser.add_argument("--require", type=float, default=1.25, help="largest ratio allowed")
    known = parser.parse_args()
    result = measure(block_steps=known.steps, rounds=known.rounds)
    print(json.dumps(result, indent=2))
    return 0 if result["ratio"] <= known.require else 1


if __name__ == "__main__":
    sys.exit(main())
