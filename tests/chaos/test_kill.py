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

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SECONDS = {"rollout": 15, "reward": 15, "moment_store": 15, "learner": 60}
"""Bars for the time from a noticed loss to a replacement at work."""
ROLES = {"rollout": "rollout", "reward": "reward", "moments": "moment_store", "learner": "learner"}


def test_every_role_may_be_killed_at_any_moment(
    undisturbed: dict[str, Any], tmp_path: Path, rounds: int
) -> None:
    output = tmp_path / "run"
    with running(output) as job:
        root = psutil.Process(job.pid)
        for _ in range(rounds):
            for role in random.sample(list(ROLES), len(ROLES)):
                done = steps_done(output)
                await_that(lambda done=done: steps_done(output) > min(done, 10), "step")
                time.sleep(random.random() * 0.5)
                hurt(role, root)
        finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, undisturbed)
    for title in ROLES.values():
        assert found["restarts"][title] >= 1
    worst = dict.fromkeys(SECONDS, 0.0)
    for row in rows(output):
        assert row.get("groups/unaccounted", 0.0) == 0.0
        for title in SECONDS:
            worst[title] = max(worst[title], row.get(f"recovery/{title}_s", 0.0))
    assert all(worst.values()), "each recovery is reported with its time"
    print(f"longest recoveries: {worst}")
    # On a machine whose cores are shared, what starts a process takes a multiple of the time.
    slack = max(1.0, psutil.getloadavg()[0] / psutil.cpu_count())
    for title, limit in SECONDS.items():
        assert worst[title] < limit * slack, title


def test_a_stopped_or_killed_driver_goes_on_by_the_same_command_in_the_same_mlflow_run(
    undisturbed: dict[str, Any], tmp_path: Path, rounds: int
) -> None:
    output = tmp_path / "run"
    with running(output) as job:
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
        with running(output, PYTHONUNBUFFERED="1") as job:
            goal = min(last + 2 + 2 * number, 11)
            await_that(lambda goal=goal: steps_done(output) >= goal, f"step {goal}")
            time.sleep(random.random() * 0.5)
            job.kill()
            printed, _ = job.communicate()
            assert f"going on from {output}/checkpoints/step-" in printed
            assert number or f"checkpoints/step-{last:05d};" in printed
    with running(output) as job:
        assert "going on from" in finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, undisturbed)
    assert found["restarts"]["driver"] >= 1
    assert [row["step"] for row in rows(output) if "groups/trained" in row] == list(range(1, 13))
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("rlgen")
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"


def test_the_actors_beside_the_driver_may_be_killed(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with running(output) as job:
        for step, role in ((2, "coordinator"), (7, "weights")):
            await_that(lambda step=step: steps_done(output) >= step, f"step {step}")
            hurt(role, psutil.Process(job.pid))
        finish(job)
    check_as_undisturbed(summary_of(output), undisturbed)


def test_a_process_that_hangs_is_found_and_replaced(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    with running(output, "cluster.heartbeat_timeout_s=4") as job:
        for step, role in ((2, "rollout"), (7, "learner")):
            await_that(lambda step=step: steps_done(output) >= step, f"step {step}")
            hurt(role, psutil.Process(job.pid), signal.SIGSTOP)
        finish(job)
    found = summary_of(output)
    check_as_undisturbed(found, undisturbed)
    assert found["restarts"]["rollout"] >= 1
    assert found["restarts"]["learner"] >= 1
