"""`ray job submit` to a cluster of `ray start --head` that asks for a token: run, refuse, stop."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.victims import CHAOS_RUN, await_that, rows, steps_done, summary_of
from tests.heads import RAY, Head, ray_head

NUM_STEPS = 60
"""Still going when the slow command line of Ray asks."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(num_cpus=4, RAY_JOB_STOP_WAIT_TIME_S="30") as head:
        yield head


def ray_job(head: Head, *words: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
    """One command of the job CLI, from the root of the checkout."""
    verb, *rest = words
    return subprocess.run(
        [RAY, "job", verb, "--address", head.dashboard, *rest],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or head.token},
        capture_output=True,
        text=True,
        timeout=300,
    )


def entrypoint(output: Path) -> list[str]:
    """As the README gives it; the job finds its own cluster, so no address is named."""
    settings = [word for word in CHAOS_RUN if not word.startswith("cluster.address")]
    job = [sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(output)]
    return [*job, *settings, f"steps={NUM_STEPS}"]


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `--working-dir .` brings of a clean checkout: the package."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree("rlgen", folder / "rlgen", ignore=shutil.ignore_patterns("__pycache__"))
    return str(folder)


def test_a_wrong_token_is_refused(head: Head, working_dir: str, tmp_path: Path) -> None:
    words = ["--working-dir", working_dir, "--", *entrypoint(tmp_path / "run")]
    refused = ray_job(head, "submit", *words, token="0" * 64)
    assert refused.returncode != 0
    assert not (tmp_path / "run").exists()


def test_a_job_is_stopped_and_the_same_submission_goes_on(
    cache_folder: Path, head: Head, working_dir: str, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    words = ["--working-dir", working_dir, "--", *entrypoint(output)]
    first = ray_job(head, "submit", "--submission-id", "first", "--no-wait", *words)
    assert first.returncode == 0, first.stderr
    await_that(lambda: steps_done(output) >= 3, "step 3")
    assert "RUNNING" in ray_job(head, "status", "first").stdout
    assert ray_job(head, "stop", "first").returncode == 0
    assert "was stopped" in ray_job(head, "status", "first").stdout
    last = steps_done(output)
    assert (output / "checkpoints" / f"step-{last:05d}" / "COMMIT.json").exists()
    assert "The same command goes on from there" in ray_job(head, "logs", "first").stdout

    second = ray_job(head, "submit", *words)
    assert second.returncode == 0, second.stdout[-3000:]
    assert "going on from" in second.stdout
    assert "Before and after" in second.stdout
    assert [row["step"] for row in rows(output) if "groups/trained" in row] == [
        *range(1, NUM_STEPS + 1)
    ]
    groups = summary_of(output)["groups"]
    assert groups["trained"] == NUM_STEPS * 20 == groups["generated"]
