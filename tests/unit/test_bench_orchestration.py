"""The benchmark of orchestration without a cluster: misuse, and how light its workers are."""

import subprocess
import sys

import pytest

from rlgen.config import load_config
from rlgen.errors import ConfigError
from rlgen.jobs import bench
from rlgen.jobs.bench_workers import SleepingScorer, StageTimes, tokens_of
from rlgen.sampling.units import training_units
from rlgen.types import Rollout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "8,many"], "--workers 8,many is no list of numbers"),
        (["--lags=-1"], "--lags -1 is no list of numbers"),
        (["--steps", "0"], "--steps 0 and --units-per-worker 2 must be at least 1"),
    ],
)
def test_misuse_is_told(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.main(["orchestration", *words])


@pytest.mark.parametrize("module", ["rlgen.jobs.bench_workers", "rlgen.actors.coordinator"])
def test_processes_that_come_by_the_hundred_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_what_a_sleeper_sends_depends_on_the_unit_alone() -> None:
    config = load_config(None, ["seed=3"])
    first, second = training_units(config, 1, policy_version=1)[:2]
    tokens_BL = tokens_of(first)
    assert tokens_BL.shape == (first.num_images, 256)
    assert (tokens_BL == tokens_of(first)).all() and (tokens_BL != tokens_of(second)).any()
    rollout = Rollout(first, 1, tokens_BL, tokens_BL.astype("float32"), 0.0)
    scored = SleepingScorer("reward-0", StageTimes(0.0, 0.0, 0.0), None)._score(rollout)
    assert scored.rollout is rollout and len(scored.features_BF) == first.num_images
