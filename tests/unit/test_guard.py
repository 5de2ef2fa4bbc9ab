"""The guard's rules: each is broken by its own fault and by no other."""

import pytest

from rlgen.config import load_config
from rlgen.config.guard import GuardConfig
from rlgen.errors import ConfigError
from rlgen.evaluation.guard import Guard, Judgement
from rlgen.evaluation.judge import Quality
from rlgen.learner.checkpoint import commit_checkpoint, prune_checkpoints, write_parts


def guarded(*rows: tuple[float, float, float], **rules: object) -> Guard:
    """A guard after judgements of (judge FID, recall, reward) at steps 0, 10, 20, ..."""
    guard = Guard(GuardConfig(**rules))
    for index, (fid, recall, reward) in enumerate(rows):
        guard = guard.observed(Judgement(10 * index, fid, recall, reward))
    return guard


def test_progress_breaks_no_rule() -> None:
    guard = guarded((6, 0.94, 0.1), (3, 0.93, 0.2), (1.5, 0.94, 0.3), (2.0, 0.95, 0.3))
    assert guard.broken_rules() == []
    assert guard.best is not None and guard.best.step == 20


def test_what_breaks_a_rule_is_never_the_best() -> None:
    guard = guarded((6, 0.94, 0.0), (4, 0.94, 0.0), (1, 0.5, 0.0))
    assert guard.broken_rules() and guard.best is not None and guard.best.step == 10


def test_nothing_is_broken_before_the_first_judgement() -> None:
    assert guarded().broken_rules() == [] and guarded().best is None


def test_a_judge_fid_far_above_the_best_is_told_with_its_step() -> None:
    rows = ((6, 0.9, 0.0), (2, 0.9, 0.0), (4.1, 0.9, 0.0))
    [rule] = guarded(*rows).broken_rules()
    assert "judge FID 4.1" in rule and "guard.max_fid_ratio = 2" in rule and "2 at step 10" in rule
    assert guarded(*rows, max_fid_ratio=2.1).broken_rules() == []
    assert guarded(*rows, max_fid_ratio=None).broken_rules() == []


def test_recall_is_compared_with_the_bases() -> None:
    rows = ((6, 0.94, 0.0), (3, 0.99, 0.0), (2, 0.86, 0.0))
    [rule] = guarded(*rows).broken_rules()
    assert "recall 0.860" in rule and "0.940" in rule
    assert guarded(*rows, min_recall_ratio=0.9).broken_rules() == []


def test_reward_and_judge_fid_rising_together_is_hollow_only_in_a_row() -> None:
    rising = ((2.0, 0.9, 0.1), (2.2, 0.9, 0.2), (2.4, 0.9, 0.3))
    [rule] = guarded(*rising).broken_rules()
    assert "rose together 2 times in a row" in rule
    assert guarded(*rising, max_hollow_gains=3).broken_rules() == []
    interrupted = ((2.0, 0.9, 0.1), (2.2, 0.9, 0.2), (2.1, 0.9, 0.3), (2.4, 0.9, 0.4))
    assert guarded(*interrupted).broken_rules() == []
    falling_reward = ((2.0, 0.9, 0.3), (2.2, 0.9, 0.2), (2.4, 0.9, 0.1))
    assert guarded(*falling_reward).broken_rules() == []


def test_several_rules_are_told_together() -> None:
    assert len(guarded((2, 0.9, 0.0), (2.5, 0.9, 0.1), (9, 0.5, 0.2)).broken_rules()) == 3


def test_the_memory_survives_a_checkpoint() -> None:
    guard = guarded((2.0, 0.9, 0.1), (2.2, 0.9, 0.2))
    restored = Guard(guard.config).restored(guard.state_dict())
    now = Judgement(20, 2.4, 0.9, 0.3)
    assert restored.observed(now).broken_rules() == guard.observed(now).broken_rules() != []
    assert Guard(guard.config).restored(Guard(guard.config).state_dict()) == Guard(guard.config)


def test_the_reward_is_the_weighted_sum() -> None:
    quality = Quality(1.0, 0.5, 0.6, None, {"clip": 0.5, "preference": 0.25})
    assert Judgement.of(3, quality, {"clip": 2.0, "preference": 4.0}).reward == 2.0
    assert Judgement.of(3, quality, {}).reward == 0.0


@pytest.mark.parametrize("word", ["guard.max_fid_ratio=0.9", "guard.action=panic"])
def test_impossible_rules_are_refused(word) -> None:
    with pytest.raises(ConfigError, match=r"guard\."):
        load_config(None, [word])


def test_the_best_checkpoint_is_not_pruned(tmp_path) -> None:
    for step in (0, 20, 40, 60):
        uri = str(tmp_path / f"step-{step:05d}")
        commit_checkpoint(uri, write_parts(uri, {"part": lambda: b"x"}), meta={})
    prune_checkpoints(str(tmp_path), keep=1, protected=(str(tmp_path / "step-00020"),))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00020", "step-00060"]
    prune_checkpoints(str(tmp_path), keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00060"]
