"""`ray job submit` to a cluster without tokens: run, watch (also in a browser), stop."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.browser.chromium import needs_chromium, opened, picture
from tests.chaos.victims import CHAOS_RUN, await_that, steps_done, summary_of
from tests.heads import RAY, Head, ray_head

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MANY_STEPS = 5000
"""The job is stopped long before."""
LEFT_OUT = ("steps=", "cluster.address")
"""The job finds its own cluster."""


@dataclass(frozen=True)
class Job:
    """A job that runs."""

    head: Head
    name: str
    output: Path


def ray_job(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    """One command of the job CLI, by someone who has no token."""
    verb, *rest = words
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    return subprocess.run(
        [RAY, "job", verb, "--address", head.dashboard, *rest],
        env=environment | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def job(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    folder = tmp_path_factory.mktemp("submission")
    checkout, output = folder / "checkout", folder / "run"
    # What `--working-dir .` brings of a clean checkout: the package.
    shutil.copytree("rlgen", checkout / "rlgen", ignore=shutil.ignore_patterns("__pycache__"))
    settings = [word for word in CHAOS_RUN if not word.startswith(LEFT_OUT)]
    command = ["python", "-m", "rlgen.jobs.grpo", f"steps={MANY_STEPS}", "--output", str(output)]
    python = str(Path(sys.executable).parent)
    with ray_head(
        num_cpus=4,
        RAY_AUTH_MODE="disabled",
        RAY_AUTH_TOKEN="",
        RAY_JOB_STOP_WAIT_TIME_S="30",
        PATH=f"{python}:{os.environ['PATH']}",
    ) as head:
        words = ["--working-dir", str(checkout), "--submission-id", "digits", "--no-wait", "--"]
        submitted = ray_job(head, "submit", *words, *command, *settings)
        assert submitted.returncode == 0, submitted.stderr
        await_that(lambda: steps_done(output) >= 10, "step 10, which the log tells of")
        yield Job(head, "digits", output)


def test_status_and_logs_need_no_token(job: Job) -> None:
    assert "RUNNING" in ray_job(job.head, "status", job.name).stdout
    logs = ray_job(job.head, "logs", job.name).stdout
    assert f"step 10/{MANY_STEPS}" in logs and "Ray dashboard" in logs


@pytest.mark.browser
@needs_chromium
def test_the_job_page_shows_state_and_log_of_the_run(job: Job, tmp_path: Path) -> None:
    with urllib.request.urlopen(f"{job.head.dashboard}/api/jobs/{job.name}") as answer:
        job_id = json.load(answer)["job_id"]
    with opened(f"{job.head.dashboard}/#/jobs/{job.name}", height=1100) as page:
        for shown in ("RUNNING", job.name, job_id):
            page.get_by_text(shown, exact=True).first.wait_for()
        page.get_by_text(f"step 10/{MANY_STEPS}").first.wait_for()
        page.screenshot(path=picture("ray_job", tmp_path))


def test_the_job_is_stopped_with_its_state_saved(job: Job) -> None:
    assert ray_job(job.head, "stop", job.name).returncode == 0
    assert "was stopped" in ray_job(job.head, "status", job.name).stdout
    assert "The same command goes on from there" in ray_job(job.head, "logs", job.name).stdout
    last = steps_done(job.output)
    assert 10 <= last < MANY_STEPS
    assert (job.output / "checkpoints" / f"step-{last:05d}" / "COMMIT.json").exists()
    with pytest.raises(FileNotFoundError):
        summary_of(job.output)
