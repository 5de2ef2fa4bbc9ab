"""What organising the work costs: the real coordinator and supervisor with workers that sleep.

Three measurements. Throughput: the time that a perfect pipeline would need over the time that it
took, for several numbers of rollout workers. Pipelining: seconds of a step whose sampling,
scoring and learning take the same time. Memory: what coordinator and driver gain over many steps.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from rlgen.actors.heartbeat import Pulse
from rlgen.actors.placement import role_options
from rlgen.actors.ray_runtime import RayRuntime
from rlgen.config import RunConfig, load_config
from rlgen.config.learning import LearnerConfig
from rlgen.config.reward import RewardConfig
from rlgen.config.run import RolloutConfig
from rlgen.errors import ConfigError
from rlgen.jobs.bench_workers import (
    ForgetfulStore,
    SleepingLearner,
    SleepingSampler,
    SleepingScorer,
    StageTimes,
    process_id,
)
from rlgen.jobs.grpo import scored_steps
from rlgen.jobs.memory import pss_bytes
from rlgen.learner.batch import learner_batch, pooled

_WORKERS_PER_SCORER = 8
_GROUP_SIZE = 8
"""Images of a work unit; with 256 tokens of 8 bytes each, 16 KB of rollouts."""
_START_TIMEOUT_S = 600.0
_MIB = 2**20
_STATE_EVERY = 40
"""Steps between reads of the moment store's state, as a job with checkpoints has them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--workers", default="8,64,128", help="numbers of rollout workers, or 0 for none"
    )
    parser.add_argument(
        "--unit-seconds", type=float, default=1.0, help="what a sampler sleeps for each unit"
    )
    parser.add_argument("--units-per-worker", type=int, default=2, help="in a step")
    parser.add_argument("--steps", type=int, default=10, help="of each measurement but memory's")
    parser.add_argument("--lag", type=int, default=2, help="max_policy_lag of the throughput")
    parser.add_argument(
        "--lags", default="0,2", help="max_policy_lag of the pipelines, or `none` for none"
    )
    parser.add_argument("--memory-steps", type=int, default=500, help="0 leaves it out")


def measure(request: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements, one after the other.

    Raises:
        ConfigError: numbers that make no measurement.
    """
    workers = [number for number in _numbers(request.workers, "--workers") if number]
    lags = [] if request.lags == "none" else _numbers(request.lags, "--lags")
    if min(request.steps, request.units_per_worker, request.lag + 1) < 1:
        raise ConfigError(
            f"--steps {request.steps} and --units-per-worker {request.units_per_worker} must be at "
            f"least 1, and --lag {request.lag} at least 0."
        )
    result: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "memory_gib": psutil.virtual_memory().total / 2**30},
        "load_average": os.getloadavg()[0],
    }
    result["throughput"] = [
        throughput(
            number,
            unit_s=request.unit_seconds,
            units_per_worker=request.units_per_worker,
            steps=request.steps,
            lag=request.lag,
        )
        for number in workers
    ]
    result["pipelining"] = [
        pipelining(lag, stage_s=request.unit_seconds, steps=request.steps) for lag in lags
    ]
    if request.memory_steps:
        result["memory"] = memory(request.memory_steps)
    return result


def throughput(
    num_workers: int, *, unit_s: float, units_per_worker: int, steps: int, lag: int
) -> dict[str, Any]:
    """Sampling is the bottleneck: scorers and the learner are busy half of the time.

    Returns:
        `efficiency`: ideal over measured seconds, from the first unit's submission to the last
        answer of the learner. The ideal pipeline keeps every sampler busy; their last units end
        together, so scorers take these in turns, and the learner follows.
    """
    num_scorers = -(-num_workers // _WORKERS_PER_SCORER)
    times = StageTimes(
        sample_s=unit_s,
        score_s=0.5 * unit_s * num_scorers / num_workers,
        learn_s=0.5 * unit_s * units_per_worker,
    )
    config = _config(
        num_workers, num_scorers, units=num_workers * units_per_worker, steps=steps, lag=lag
    )
    last_wave_s = -(-num_workers // num_scorers) * times.score_s
    ideal_s = steps * units_per_worker * unit_s + last_wave_s + times.learn_s
    started = time.perf_counter()
    with running(config, times) as runtime:
        start_s = time.perf_counter() - started
        before = time.perf_counter()
        ends_s = [now - before for now in _steps(config, runtime)]
        workers_pss = [pss_bytes(process) / _MIB for process in runtime.processes("rollout-")]
        coordinator_pss = pss_bytes(runtime.coordinator_process()) / _MIB
    return {
        "workers": num_workers,
        "scorers": num_scorers,
        "lag": lag,
        "unit_s": unit_s,
        "units": steps * config.num_units,
        "ideal_s": ideal_s,
        "measured_s": ends_s[-1],
        "efficiency": ideal_s / ends_s[-1],
        "start_s": start_s,
        "worker_pss_mib": median(workers_pss) if workers_pss else None,
        "coordinator_pss_mib": coordinator_pss,
    }


def pipelining(lag: int, *, stage_s: float, steps: int) -> dict[str, Any]:
    """Seconds of a step, once the pipeline is full, when each stage takes `stage_s`."""
    config = _config(1, 1, units=1, steps=steps + lag + 1, lag=lag)
    with running(config, StageTimes(stage_s, stage_s, stage_s)) as runtime:
        ends_s = list(_steps(config, runtime))
    steps_s = [end - start for start, end in pairwise(ends_s)][lag:]
    return {
        "lag": lag,
        "stage_s": stage_s,
        "step_s": mean(steps_s),
        "longest_step_s": max(steps_s),
    }


def memory(steps: int) -> dict[str, Any]:
    """Memory of coordinator and driver while nobody sleeps, half of the steps against the other.

    Returns:
        `*_growth_mib`: mean over the second half minus mean over the first, whose first fifth of
        all steps is left out, because buffers fill.
    """
    config = _config(8, 1, units=8, steps=steps, lag=1)
    samples: list[tuple[float, float]] = []
    with running(config, StageTimes(0.0, 0.0, 0.0)) as runtime:
        coordinator, driver = runtime.coordinator_process(), psutil.Process()
        started = time.perf_counter()
        for _ in _steps(config, runtime):
            samples.append((pss_bytes(coordinator) / _MIB, pss_bytes(driver) / _MIB))
        step_s = (time.perf_counter() - started) / steps
    first, second = samples[steps // 5 : steps // 2], samples[steps // 2 :]
    result: dict[str, Any] = {"steps": steps, "step_s": step_s}
    for index, name in enumerate(("coordinator", "driver")):
        early, late = (mean(sample[index] for sample in part) for part in (first, second))
        result |= {f"{name}_pss_mib": late, f"{name}_growth_mib": late - early}
    return result


class SleepingRuntime(RayRuntime):
    """The runtime of a job with workers that sleep."""

    def __init__(self, config: RunConfig, times: StageTimes, *, storage: str) -> None:
        """Connect to Ray; no actor yet."""
        super().__init__(config, storage=storage)
        self._times = times

    def pulses(self, prefix: str) -> list[Pulse]:
        """Where the workers are whose names begin like this."""
        return ray.get(self._coordinator.pulses.remote(prefix))

    def whereabouts(self) -> str:
        """Who works on what, in words."""
        return ray.get(self._coordinator.describe.remote())

    def processes(self, prefix: str) -> list[psutil.Process]:
        """Workers on the driver's node whose names begin like this."""
        here = ray.get_runtime_context().get_node_id()
        return [psutil.Process(p.pid) for p in self.pulses(prefix) if p.node_id == here]

    def coordinator_process(self) -> psutil.Process:
        """The coordinator, which is on the driver's machine."""
        return psutil.Process(ray.get(self._coordinator.__ray_call__.remote(process_id)))

    def _make_rollout_worker(self, name: str) -> Any:
        shell = _actor(SleepingSampler, self._config.rollout)
        return shell.remote(name, self._times, self._coordinator)

    def _make_reward_worker(self, name: str) -> Any:
        shell = _actor(SleepingScorer, self._config.reward)
        return shell.remote(name, self._times, self._coordinator)

    def _make_moment_store(self, number: int) -> Any:
        return ray.remote(ForgetfulStore).options(num_cpus=0).remote()

    def _start_learners(self) -> None:
        group = SleepingGroup(self._config, self._times, self._coordinator, attempt=self._attempt)
        self._learners = group  # type: ignore[assignment]  # it has what is used of a LearnerGroup


class SleepingGroup:
    """In place of LearnerGroup: ranks that sleep."""

    def __init__(
        self, config: RunConfig, times: StageTimes, coordinator: Any, *, attempt: int
    ) -> None:
        """Set the ranks to work."""
        learner = config.learner
        shell = _actor(SleepingLearner, learner)
        self._ranks = [shell.remote(times, coordinator) for _ in range(learner.num_workers)]
        self._runs = [a.run.remote(attempt, rank) for rank, a in enumerate(self._ranks)]

    def join(self, timeout_s: float) -> bool:
        """Wait for the ranks to go home; whether they did."""
        with suppress(RayError):
            return not ray.wait(self._runs, num_returns=len(self._runs), timeout=timeout_s)[1]
        return True


@contextmanager
def running(config: RunConfig, times: StageTimes) -> Iterator[SleepingRuntime]:
    """A runtime whose workers are up, on the cluster that is configured or found, or one here."""
    with TemporaryDirectory() as storage:
        runtime = SleepingRuntime(config, times, storage=storage)
        try:
            runtime.start(config)
            yield runtime
        finally:
            runtime.close()


def _steps(config: RunConfig, runtime: RayRuntime) -> Iterator[float]:
    """Run the job's pipeline; the clock after each step, in seconds."""
    for step, scored in scored_steps(config, runtime):
        rewards = runtime.commit_moments(step, *pooled(scored))
        runtime.learn(learner_batch(step, scored, rewards))
        if (step + 1) % _STATE_EVERY == 0:
            runtime.moment_state()
        yield time.perf_counter()


def _config(workers: int, scorers: int, *, units: int, steps: int, lag: int) -> RunConfig:
    return load_config(
        None,
        [
            f"steps={steps}",
            f"max_policy_lag={lag}",
            f"rollout.num_workers={workers}",
            f"reward.num_workers={scorers}",
            *(f"{role}.num_cpus=0.001" for role in ("rollout", "reward", "learner")),
            f"rollout.conditions_per_step={units}",
            "rollout.conditions_per_unit=1",
            f"rollout.group_size={_GROUP_SIZE}",
            f"cluster.start_timeout_s={_START_TIMEOUT_S}",
        ],
    )


def _numbers(text: str, option: str) -> Sequence[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise ConfigError(f"{option} {text} is no list of numbers such as 8,64,128.")
    return numbers


def _actor(shell: type, role: RolloutConfig | RewardConfig | LearnerConfig) -> Any:
    return ray.remote(shell).options(**role_options(role))
