"""A user's scorer in a whole run: found by every process, and a stop when it goes wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

import rlgen
from rlgen.errors import ConfigError
from rlgen.jobs import grpo
from tests.conftest import TINY_RUN

ROOT = Path(rlgen.__file__).resolve().parents[1]
MINE = "reward.scorers.mine={type: python, target: 'my_rewards:Mine', arguments: {folder: FOLDER}}"
SETTINGS = [*TINY_RUN, "steps=2", "checkpoint.every_steps=1", "evaluation.cfg_scales=[]"]
# It goes wrong once the run has a checkpoint, as long as the file `broken` tells how.
MY_REWARDS = """
from pathlib import Path
import torch

class Mine:
    def __init__(self, *, device, folder):
        self.broken = Path(folder) / "broken"
        self.checkpoint = Path(folder) / "run/checkpoints/step-00001/COMMIT.json"

    def __call__(self, images_01, prompts, class_ids_B):
        scores_B = images_01.mean(dim=(1, 2, 3))
        if self.broken.exists() and self.checkpoint.exists():
            if self.broken.read_text() == "raise":
                raise RuntimeError("the ink ran out")
            scores_B[class_ids_B == class_ids_B[-1]] = torch.nan
        return scores_B
"""


def start(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """The job in a process of its own, started where my_rewards.py is."""
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    mine = MINE.replace("FOLDER", str(folder))
    command = [sys.executable, "-m", "rlgen.jobs.grpo", "--output", "run", *SETTINGS, mine]
    return subprocess.run(
        [*command, *settings],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.ray
def test_a_scorer_that_only_fails_in_its_actor_is_told_without_a_traceback(
    cache_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "far_rewards.py").write_text(
        "class Far:\n"
        "    def __init__(self, *, device):\n"
        "        raise RuntimeError('no licence on this machine')\n"
        "    def __call__(self, images_01, prompts, class_ids_B): ...\n"
    )
    far = "reward.scorers.far={type: python, target: 'far_rewards:Far', try_first: false}"
    done = start(tmp_path, far)
    told = " ".join(done.stderr.split())
    assert done.returncode == 2, told
    assert "far_rewards:Far" in told and "no licence on this machine" in told
    assert "Traceback" not in told and "RayTaskError" not in told
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.fixture(scope="module")
def undisturbed(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run whose scorer never goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = start(folder, "runtime=local")
    assert done.returncode == 0, done.stderr
    return summary_of(folder)


CONDITION = r"condition \d+ \(class \d, '\w+'\)"
MESSAGES = {
    "raise": f"scorer 'mine' failed on 20 images of {CONDITION} to {CONDITION}: RuntimeError: the "
    r"ink ran out \(my_rewards\.py, line 14\)\.",
    "nan": f"scorer 'mine' returned nan for {CONDITION}, sample 0, asked for '\\w+'; ",
}


@pytest.mark.parametrize(
    ("runtime", "how"), [pytest.param("ray", "raise", marks=pytest.mark.ray), ("local", "nan")]
)
def test_a_scorer_that_goes_wrong_stops_the_run_at_a_checkpoint_it_goes_on_from(
    undisturbed: dict[str, Any], tmp_path: Path, runtime: str, how: str
) -> None:
    (tmp_path / "broken").write_text(how)
    stopped = start(tmp_path, f"runtime={runtime}")
    assert stopped.returncode == 2, stopped.stderr
    assert re.search(MESSAGES[how], stopped.stderr), stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 1, "no step was made of what it returned"
    checkpoint = tmp_path / "run/checkpoints/step-00001"
    committed = sorted(path.parent for path in tmp_path.glob("run/**/COMMIT.json"))
    assert committed == [checkpoint.with_name("step-00000"), checkpoint]

    (tmp_path / "broken").unlink()  # it is corrected
    resumed = start(tmp_path, f"runtime={runtime}", f"checkpoint.resume_from={checkpoint}")
    assert resumed.returncode == 0, resumed.stderr
    summary = summary_of(tmp_path)
    assert summary["policy_sha256"] == undisturbed["policy_sha256"]
    assert summary["after"]["rewards"].keys() == {"clip", "preference", "mine"}


def test_the_shipped_example_runs_and_is_trained_on(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # its target counts from there
    preset = ["--config", "jobs/digits_ink.yaml", "--output", str(tmp_path / "run")]
    assert grpo.main([*preset, *SETTINGS, "runtime=local"]) == 0
    rows = [json.loads(r) for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    ink = [row["reward/ink"] for row in rows if "reward/ink" in row]
    assert len(ink) >= 2 and all(-0.4 < value < 0.0 for value in ink)


TRIAL = "reward.scorers.mine={type: python, target: 'tests.ray.test_user_scorer:Wrong'}"


class Wrong:
    """Returns nothing that could be trained on."""

    def __init__(self, *, device: torch.device) -> None:
        assert device.type == "cpu", "the trial before a run is on the driver's CPU"

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        assert images_01.shape == (2, 3, 16, 16) and prompts == ["zero", "nine"]
        return images_01


def test_a_scorer_is_tried_before_any_actor_starts(cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"reward\.scorers\.mine = tests\.ray\.test_user_scorer:Wrong does not pass a trial "
        r"on two .* 'mine' returned torch\.float32 of shape \[2, 3, 16, 16\] for 2 images",
    ):
        grpo.main(["--output", str(tmp_path / "run"), *SETTINGS, TRIAL])
    assert not ray.is_initialized()
    assert not (tmp_path / "run").exists()


def test_a_module_that_is_not_there_is_told_before_the_default_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path / "cache"))
    missing = TRIAL.replace("tests.ray.test_user_scorer", "not_written_yet")
    with pytest.raises(ConfigError, match=r"not_written_yet:Wrong can't be imported: there is no"):
        grpo.main(["--output", str(tmp_path / "run"), *SETTINGS, missing])
    assert not ray.is_initialized()
    assert not (tmp_path / "cache").exists() and not (tmp_path / "run").exists()
