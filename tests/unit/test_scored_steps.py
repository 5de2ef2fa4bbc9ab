"""What is sampled ahead of which step, and with which policy version."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlgen.config import load_config
from rlgen.jobs.grpo import scored_steps
from rlgen.types import Rollout, ScoredRollout, WorkUnit
from tests.tiny import scored


class Diary:
    """A runner that answers at once and notes what it was asked, in order."""

    def __init__(self) -> None:
        self.entries: list[str] = []

    def submit(self, units: Sequence[WorkUnit]) -> None:
        self.entries.append(f"submit {units[0].step} at version {units[0].policy_version}")

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        self.entries.append(f"collect {units[0].step}")
        zeros = np.zeros((units[0].num_images, 4), np.int32)
        return [
            scored(Rollout(unit, unit.policy_version, zeros, zeros.astype(np.float32), 0.0))
            for unit in units
        ]


def diary_of(lag: int, *, steps: int = 3, first_step: int = 0) -> list[str]:
    config = load_config(None, [f"max_policy_lag={lag}", f"steps={steps}"])
    runner = Diary()
    for step, results in scored_steps(config, runner, first_step):
        assert [item.rollout.unit.index for item in results] == list(range(config.num_units))
        runner.entries.append(f"learn {step}")
    return runner.entries


def test_without_lag_a_step_is_sampled_by_the_policy_that_the_last_one_made() -> None:
    assert diary_of(0, steps=2) == [
        *("submit 0 at version 0", "collect 0", "learn 0"),
        *("submit 1 at version 1", "collect 1", "learn 1"),
    ]


def test_with_lag_the_samplers_have_the_next_steps_while_the_learner_works() -> None:
    assert diary_of(2, steps=4) == [
        *("submit 0 at version 0", "submit 1 at version 0"),
        *("submit 2 at version 0", "collect 0", "learn 0"),
        *("submit 3 at version 1", "collect 1", "learn 1"),
        *("collect 2", "learn 2", "collect 3", "learn 3"),
    ]


def test_a_resumed_run_asks_for_no_version_older_than_its_own() -> None:
    assert diary_of(1, steps=6, first_step=4) == [
        *("submit 4 at version 4", "submit 5 at version 4", "collect 4", "learn 4"),
        *("collect 5", "learn 5"),
    ]


@pytest.mark.parametrize("lag", [0, 1, 5])
def test_every_step_is_submitted_once_even_when_the_run_is_shorter_than_the_lag(lag) -> None:
    submitted = [entry.split()[1] for entry in diary_of(lag) if entry.startswith("submit")]
    assert submitted == ["0", "1", "2"]
