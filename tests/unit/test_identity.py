"""Which settings make another run, and how two runs are told apart."""

from pathlib import Path

import pytest

from rlgen.config import dump_yaml, load_config
from rlgen.config.identity import differences, resume_key
from rlgen.errors import ConfigError
from rlgen.jobs.run_folder import choose_folder, claim_folder


@pytest.mark.parametrize(
    "word",
    [
        "runtime=local",
        "checkpoint.every_steps=7",
        "replay.every=2",
        "tracking.uri=none",
        "cluster.dashboard=false",
        "weights.transport=collective",
        "rollout.num_workers=5",
        "rollout.min_workers=1",
        "reward.num_gpus=0.5",
        "learner.num_cpus=3",
        "learner.label_selector={market: on-demand}",
    ],
)
def test_where_a_run_works_and_what_it_keeps_may_change(word: str) -> None:
    assert resume_key(load_config(None, [word])) == resume_key(load_config())


@pytest.mark.parametrize(
    "word",
    ["seed=1", "steps=7", "max_policy_lag=1", "rollout.group_size=4", "reward.loo_fid.weight=0.5"],
)
def test_what_decides_the_result_may_not(word: str) -> None:
    assert resume_key(load_config(None, [word])) != resume_key(load_config())


def test_differences_are_told_with_both_values_and_without_secrets() -> None:
    theirs = dump_yaml(load_config(None, ["steps=3", "learner.lr=1e-3", "tracking.uri=none"]))
    told = differences(theirs.encode(), load_config(None, ["steps=4", "learner.lr=2e-3"]))
    assert told == "steps (3, now 4), learner.lr (0.001, now 0.002)"
    url = "s3://key:hunter2hunter2@bucket/captions.pt"
    told = differences(theirs.encode(), load_config(None, ["seed=9", f"policy.captions={url}"]))
    assert "seed (0, now 9)" in told and "hunter2" not in told
    many = [f"guard.{name}" for name in ("every=3", "min_recall_ratio=0.5", "max_fid_ratio=3.0")]
    many += ["seed=1", "max_policy_lag=1", "steps=9", "learner.lr=0.5"]
    assert differences(theirs.encode(), load_config(None, many)).endswith(" and 2 more")


def test_a_folder_of_another_run_says_what_differs(tmp_path: Path) -> None:
    config = load_config(None, ["steps=3"])
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    claim_folder(tmp_path, config)
    assert choose_folder(config.with_values({"rollout.num_gpus": 1.0}), tmp_path) == tmp_path
    with pytest.raises(ConfigError, match=r"other settings: steps \(3, now 5\)\. Name another"):
        choose_folder(config.with_values({"steps": 5}), tmp_path)
