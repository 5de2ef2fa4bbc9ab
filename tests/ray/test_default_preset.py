"""The default run as a user starts it: the claim for one seed, its memory, its record."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is empty at first."""
    return tmp_path_factory.mktemp("empty-cache")


@pytest.fixture(scope="module")
def summary(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the main job with no setting, from an empty cache, in a process of its own."""
    output = tmp_path_factory.mktemp("default") / "run"
    command = [sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(output)]
    environment = os.environ | {"RLGEN_CACHE": str(cache)}
    subprocess.run(command, check=True, env=environment, timeout=900)
    return json.loads(Path(output / "summary.json").read_text())


def test_the_base_is_no_straw_man(summary: dict[str, Any]) -> None:
    before = summary["before"]
    assert before["accuracy"] >= 0.55
    assert before["judge_fid_best_cfg"] <= before["judge_fid"] * 2 / 3


def test_unguided_images_beat_the_base_with_its_best_guidance(summary: dict[str, Any]) -> None:
    before, after = summary["before"], summary["after"]
    # The bars of the claim are for the mean of three seeds; one seed scatters by about 0.05.
    assert after["judge_fid"] <= 0.4 * before["judge_fid"]
    assert after["judge_fid"] <= 0.75 * before["judge_fid_best_cfg"]


def test_diversity_is_kept(summary: dict[str, Any]) -> None:
    # Recall of one seed scatters by 0.015 on either side of the comparison.
    assert summary["after"]["recall"] >= summary["before"]["recall"] - 0.04


def test_instance_rewards_rise(summary: dict[str, Any]) -> None:
    for reward in ("clip", "preference", "accuracy"):
        assert summary["after"][reward] > summary["before"][reward]


def test_all_processes_together_stay_under_six_gib(summary: dict[str, Any]) -> None:
    assert 0.5 < summary["peak_pss_gib"] < 6.0


def test_every_group_is_accounted_for(summary: dict[str, Any]) -> None:
    assert summary["groups"] == {"generated": 7200, "trained": 7200, "dropped": {}}


def test_the_guard_finds_nothing(summary: dict[str, Any]) -> None:
    assert summary["guard"] == {"alarms": [], "rollbacks": 0}


def test_the_guard_ends_a_run_with_the_instance_rewards_alone(
    summary: dict[str, Any], cache: Path, tmp_path: Path
) -> None:
    settings = ["reward.loo_fid.weight=0", "guard.action=stop", "evaluation.cfg_scales=[]"]
    command = [sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *settings, "runtime=local", "tracking.uri=none"],
        env=os.environ | {"RLGEN_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert "the guard ended the run at step" in " ".join(done.stderr.split())
    assert not (tmp_path / "run" / "summary.json").exists()
