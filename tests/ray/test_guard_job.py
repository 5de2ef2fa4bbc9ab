"""What a broken rule of the guard does to a run: alarm, end, or rollback."""

import json
from pathlib import Path

import pytest
import yaml

from rlgen.errors import GuardError
from rlgen.jobs import grpo
from tests.conftest import TINY_RUN

# Every judgement after the base's breaks this rule, since no recall reaches 1.
TRIPPED = ["guard.every=1", "guard.min_recall_ratio=1.0", "guard.max_fid_ratio=1.000001"]
QUIET = ["evaluation.every_steps=0", "learner.lr=0.02"]


def run(output: Path, *settings: str) -> int:
    return grpo.main(["--output", str(output), *TINY_RUN, *QUIET, *TRIPPED, *settings])


def steps_with(output: Path, name: str) -> list[int]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row.get(name)]


def test_an_alarm_is_told_and_the_run_goes_on(cache_folder: Path, tmp_path: Path, capsys) -> None:
    assert run(tmp_path / "run", "runtime=local", "steps=3") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["guard"]["alarms"] and summary["guard"]["rollbacks"] == 0
    steps = [alarm["step"] for alarm in summary["guard"]["alarms"]]
    assert steps == steps_with(tmp_path / "run", "guard/broken_rules")
    assert f"guard, step {steps[0]}: " in capsys.readouterr().out


def test_a_stop_saves_the_state_and_says_where(cache_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"ended the run at step \d+: .*best judge FID") as caught:
        run(tmp_path / "run", "runtime=local", "guard.action=stop", "steps=6")
    step = int(str(caught.value).split("at step ")[1].split(":")[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:05d}" / "COMMIT.json").exists()


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_rollback_goes_on_from_the_best_with_a_smaller_step(
    cache_folder: Path, tmp_path: Path, runtime: str
) -> None:
    output = tmp_path / "run"
    words = [f"runtime={runtime}", "guard.action=rollback", "guard.max_rollbacks=2", "steps=4"]
    try:
        run(output, *words)
        rollbacks = json.loads((output / "summary.json").read_text())["guard"]["rollbacks"]
    except GuardError as error:
        assert "after 2 rollbacks" in str(error)
        rollbacks = 2
    assert rollbacks >= 1, "or this test proves nothing"
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["learner"]["lr"] == pytest.approx(0.02 * 0.5**rollbacks)
    assert config["checkpoint"]["resume_from"] is None
    steps = steps_with(output, "loss/kl")
    assert steps == sorted(set(steps)), "rows of steps that were done again are gone"
