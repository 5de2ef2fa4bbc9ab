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
def summary(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the main job with no setting, from an empty cache, in a process of its own."""
    output = tmp_path_factory.mktemp("default") / "run"
    cache = {"RLGEN_CACHE": str(tmp_path_factory.mktemp("empty-cache"))}
    command = [sys.executable, "-m", "rlgen.jobs.grpo", "--output", str(output)]
    subprocess.run(command, check=True, env=os.environ | cache, timeout=900)
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
