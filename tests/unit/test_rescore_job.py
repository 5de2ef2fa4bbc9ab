"""Stored rollouts, scored again without sampling."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlgen.errors import CheckpointError, ConfigError
from rlgen.jobs import grpo, rescore
from rlgen.learner.replay import load_step
from tests.conftest import TINY_RUN


@pytest.fixture(scope="module")
def run(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that stored every step."""
    output = tmp_path_factory.mktemp("replay") / "run"
    settings = ["replay.every=1", "runtime=local"]
    assert grpo.main(["--output", str(output), *TINY_RUN, *settings]) == 0
    return output


def test_the_same_rewards_give_the_same_advantages(run: Path, tmp_path: Path) -> None:
    report = tmp_path / "rescore.json"
    assert rescore.main(["--run", str(run), "--json", str(report)]) == 0
    results = json.loads(report.read_text())
    assert [result["step"] for result in results] == ["step-00000", "step-00001", "step-00002"]
    for result in results:
        # Reward workers score units, this job whole steps: another batch rounds differently.
        assert result["advantages"]["correlation"] > 0.9999
        assert result["advantages"]["max_difference"] < 1e-2
        assert {"clip", "preference", "loo_fid"} == result["rewards"].keys()
        assert all(values["max_difference"] < 1e-4 for values in result["rewards"].values())


def test_other_rewards_give_other_advantages(run: Path, tmp_path: Path, capsys) -> None:
    report = tmp_path / "rescore.json"
    words = ["--run", str(run), "--steps", "1", "--json", str(report)]
    assert rescore.main([*words, "reward.loo_fid=null", "reward.scorers.preference=null"]) == 0
    [result] = json.loads(report.read_text())
    assert result["rewards"].keys() == {"clip"}
    assert result["rewards"]["clip"]["correlation"] > 0.9999
    assert result["advantages"]["correlation"] < 0.99
    assert "step-00001" in capsys.readouterr().out


def test_an_image_takes_a_few_hundred_bytes(run: Path) -> None:
    stored = load_step(str(run), "step-00001")
    assert stored.tokens_BL.shape == (80, 16) and stored.advantages_B is not None
    assert np.isfinite(stored.advantages_B).all() and stored.policy_version == 1
    size = (run / "replay" / "step-00001.npz").stat().st_size
    assert size / 80 < 200  # 16 tokens and four float32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "7"], r"steps \[7\] are not stored.*there are 0, 1, 2"),
        (["--steps", "one"], "no list like"),
    ],
)
def test_what_cannot_be_rescored_is_told(run: Path, words, message) -> None:
    with pytest.raises(ConfigError, match=message):
        rescore.main(["--run", str(run), *words])


def test_a_folder_without_stored_rollouts_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stored rollouts"):
        rescore.main(["--run", str(tmp_path)])
    with pytest.raises(CheckpointError, match="no stored rollouts"):
        load_step(str(tmp_path), "step-00000")
