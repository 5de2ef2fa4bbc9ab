"""A run in a process of its own, and the means to hurt it.

Processes are found as an operator finds them: by their titles, below the driver's process or
below a raylet.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import TINY_RUN

CHAOS_RUN = [
    *TINY_RUN,
    "steps=12",
    "checkpoint.every_steps=3",
    "evaluation.every_steps=0",
    "evaluation.cfg_scales=[]",
]
"""Long enough to be hurt several times; a step takes a fraction of a second."""
TITLES = {
    "rollout": "ray::RolloutWorker",
    "reward": "ray::RewardWorker",
    "moments": "ray::MomentStoreActor",
    "learner": "ray::RayTrainWorker",
    "coordinator": "ray::Coordinator",
    "weights": "ray::WeightStore",
}
_DEADLINE_S = 300.0


def start_run(output: Path, *settings: str, **environment: str) -> subprocess.Popen[str]:
    """Start the main job."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(output), *CHAOS_RUN, *settings],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def running(output: Path, *settings: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A started job that is gone afterwards."""
    job = start_run(output, *settings, **environment)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
            job.communicate()


def finish(job: subprocess.Popen[str]) -> str:
    """Wait for the end of a job that must succeed; what it printed."""
    printed, _ = job.communicate(timeout=_DEADLINE_S)
    assert job.returncode == 0, printed[-3000:]
    return printed


def processes(role: str, root: psutil.Process) -> list[psutil.Process]:
    """Living processes of a role below another process."""
    found = []
    for process in root.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(TITLES[role]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def hurt(role: str, root: psutil.Process, kind: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to one process of a role, when there is one; its id."""

    def send() -> int | None:
        alive = processes(role, root)
        if not alive:
            return None
        victim = random.choice(alive)
        victim.send_signal(kind)
        return victim.pid

    return await_that(send, f"a {role} process")


def await_that(find: Callable[[], Any], what: str, *, deadline_s: float = _DEADLINE_S) -> Any:
    """Ask again and again until the answer is true; the answer."""
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        try:
            if found := find():
                return found
        except psutil.Error:
            pass
        time.sleep(0.02)
    raise AssertionError(f"no {what} within {deadline_s:g} s")


def steps_done(output: Path) -> int:
    """The last finished step that the run has reported."""
    return max((int(row["step"]) for row in rows(output) if "groups/trained" in row), default=0)


def rows(output: Path) -> list[dict[str, Any]]:
    """What the run has reported so far."""
    metrics = output / "metrics.jsonl"
    if not metrics.exists():
        return []
    lines = metrics.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def summary_of(output: Path) -> dict[str, Any]:
    """The finished run's summary."""
    return json.loads((output / "summary.json").read_text())


def check_as_undisturbed(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same policy after the same steps, and every group accounted for."""
    assert found["policy_sha256"] == expected["policy_sha256"]
    assert found["steps"] == expected["steps"]
    groups = found["groups"]
    assert groups["trained"] == expected["groups"]["trained"], "nothing lost, nothing twice"
    assert groups["generated"] == groups["trained"] + sum(groups["dropped"].values())
