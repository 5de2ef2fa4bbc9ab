"""SIGKILL and SIGSTOP at random moments: the run ends as if nothing had happened."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.chaos.victims import (
    await_that,
    check_as_undisturbed,
    finish,
    hurt,
    rows,
    running,
    steps_done,
    summary_of,
)
from tests.conftest import TRACKED

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = {"rollout": 15, "reward": 15, "moment_store": 15, "learner": 60}
"""Bars for the time from a noticed loss to a replacement at work."""
VICTIMS = ["rollout", "reward", "moments", "learner", "coordinator", "weights"]


def test_every_process_may_be_killed_or_hang_at_any_moment(
    cache_folder: Path, tmp_path: Path, rounds: int
) -> None:
    expected, output = tmp_path / "undisturbed" / "run", tmp_path / "run"
    last = 40 * rounds
    with running(expected, "runtime=local", f"steps={last}") as job:
        finish(job)
    with running(output, f"steps={last}", "cluster.heartbeat_timeout_s=5") as job:
        for _ in range(rounds):
            blows = [(role, signal.SIGKILL) for role in VICTIMS]
            blows += [(role, signal.SIGSTOP) for role in ("rollout", "learner")]
            for role, kind in random.sample(blows, len(blows)):
                # Two steps: no role's loss stays unnoticed through the second.
                goal = min(steps_done(output) + 2, last - 2)
                await_that(lambda goal=goal: steps_done(output) >= goal, f"step {goal}")
                time.sleep(random.random() * 0.3)
                hurt(role, psutil.Process(job.pid), kind)
        finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, summary_of(expected))
    worst = dict.fromkeys(SECONDS, 0.0)
    for row in rows(output):
        assert row.get("groups/unaccounted", 0.0) == 0.0
        for title in SECONDS:
            worst[title] = max(worst[title], row.get(f"recovery/{title}_s", 0.0))
    for title, limit in SECONDS.items():
        killed_and_hung = 2 if title in ("rollout", "learner") else 1
        assert found["restarts"][title] >= rounds * killed_and_hung, title
        assert worst[title] > 0.0, "each recovery is reported with its time"
        # On a machine whose cores are shared, what starts a process takes a multiple of the time.
        slack = max(1.0, psutil.getloadavg()[0] / psutil.cpu_count())
        assert worst[title] < limit * slack, title
    print(f"longest recoveries: {worst}")


def test_a_stopped_or_killed_driver_goes_on_by_the_same_command_in_the_same_mlflow_run(
    undisturbed: dict[str, Any], tmp_path: Path, rounds: int
) -> None:
    output = tmp_path / "run"
    with running(output, TRACKED) as job:
        await_that(lambda: steps_done(output) >= 2, "step 2")
        began = time.monotonic()
        job.send_signal(signal.SIGTERM)
        printed, _ = job.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert job.returncode != 0
        assert "The same command goes on from there" in printed
        assert "Traceback" not in printed
    last = steps_done(output)
    assert (output / "checkpoints" / f"step-{last:05d}" / "COMMIT.json").exists()
    for number in range(rounds):
        with running(output, TRACKED, PYTHONUNBUFFERED="1") as job:
            goal = min(last + 2 + 2 * number, 11)
            await_that(lambda goal=goal: steps_done(output) >= goal, f"step {goal}")
            time.sleep(random.random() * 0.5)
            job.kill()
            printed, _ = job.communicate()
            assert f"going on from {output}/checkpoints/step-" in printed
            assert number or f"checkpoints/step-{last:05d};" in printed
    with running(output, TRACKED) as job:
        assert "going on from" in finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, undisturbed)
    assert found["restarts"]["driver"] >= 1
    assert [row["step"] for row in rows(output) if "groups/trained" in row] == list(range(1, 13))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rlgen")
    [recorded] = client.search_runs([experiment.experiment_id])
    assert recorded.info.status == "FINISHED"
