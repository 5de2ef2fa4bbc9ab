"""The evaluation job on a real local Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.state import list_actors

from rlgen.evaluation.finished import FinishedUnits
from rlgen.jobs import evaluate
from rlgen.types import ScoredRollout
from tests.conftest import TINY_DIGITS

pytestmark = pytest.mark.ray


def run(output: Path, *settings: str) -> dict[str, Any]:
    """Scores by guidance scale, without the speeds."""
    arguments = ["--output", str(output), "--num-images", "150", "--scales", "1,1.5"]
    given = [*TINY_DIGITS, "evaluation.images_per_unit=25", "tracking.uri=none", *settings]
    assert evaluate.main([*arguments, *given]) == 0
    result = json.loads((output / "evaluate.json").read_text())
    for row in result["scales"].values():
        assert row.pop("images_per_s") > 0
    return result


def test_the_number_of_workers_does_not_change_the_numbers(
    cache_folder: Path, tmp_path: Path
) -> None:
    one = run(tmp_path / "one", "rollout.num_workers=1")
    two = run(tmp_path / "two", "rollout.num_workers=2", "reward.num_workers=2")
    local = run(tmp_path / "local", "runtime=local")
    assert one == two == local


def test_only_what_samples_and_scores_is_placed(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: set[str] = set()
    save = FinishedUnits.save

    def look_around(units: FinishedUnits, scored: ScoredRollout) -> None:
        address = ray.get_runtime_context().gcs_address
        placed.update(actor.class_name for actor in list_actors(address=address))
        save(units, scored)

    monkeypatch.setattr(FinishedUnits, "save", look_around)
    # No machine has room for this learner, and none is needed.
    run(tmp_path / "evaluation", "learner.num_cpus=100000")
    assert {"RolloutWorker", "RewardWorker"} <= placed
    assert placed <= {"RolloutWorker", "RewardWorker", "Coordinator", "WeightStore"}


def test_what_one_worker_began_two_finish(cache_folder: Path, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", "runtime=local")
    for unit in list((tmp_path / "whole" / "units").glob("scale-*/*.npz"))[::2]:
        unit.unlink()
    assert run(tmp_path / "whole", "rollout.num_workers=2") == whole
