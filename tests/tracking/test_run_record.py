"""What a real run leaves in MLflow beside its numbers: checkpoints, their origin, a champion."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlgen.jobs import grpo, promote
from rlgen.learner.state_io import POLICY
from tests.conftest import TINY_RUN

pytestmark = pytest.mark.slow


def run(output: Path, uri: str, *settings: str) -> None:
    words = [*TINY_RUN, "runtime=local", f"tracking.uri={uri}", "tracking.model=digits"]
    job = [*words, "evaluation.every_steps=2", "steps=4", *settings]
    assert grpo.main(["--output", str(output), *job]) == 0


def listed(client: Any, run_id: str, folder: Path) -> list[dict[str, Any]]:
    path = client.download_artifacts(run_id, "checkpoints.json", str(folder))
    return json.loads(Path(path).read_text())["checkpoints"]


def test_checkpoints_with_their_origin_and_the_champion_of_a_resumed_run(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first, second = tmp_path / "first", tmp_path / "second"
    run(first, uri)
    assert "version 1 of digits (judge FID" in capsys.readouterr().out
    client = MlflowClient(uri)
    champion = client.get_model_version_by_alias("digits", "champion")
    summary = json.loads((first / "summary.json").read_text())
    assert float(champion.tags["rlgen.judge_fid"]) == summary["after"]["judge_fid"]
    assert float(champion.tags["rlgen.recall"]) == summary["after"]["recall"]

    root = first / "checkpoints"
    entries = listed(client, champion.run_id, tmp_path)
    assert [(e["step"], e["came_from"]) for e in entries] == [
        (0, None),
        (2, f"{root}/step-00000"),
        (4, f"{root}/step-00002"),
    ]
    assert [e["judge_fid"] for e in entries][::2] == [
        summary["before"]["judge_fid"],
        summary["after"]["judge_fid"],
    ]
    marker = json.loads((root / "step-00004/COMMIT.json").read_text())
    digests = {part["name"]: part["sha256"] for part in marker["parts"]}
    assert entries[-1]["policy_sha256"] == champion.tags["rlgen.policy_sha256"] == digests[POLICY]
    assert "system/cpu_utilization_percentage" in client.get_run(champion.run_id).data.metrics

    # The same run again from its second step, in another folder: the same weights.
    run(second, uri, f"checkpoint.resume_from={root}/step-00002")
    assert "version 1 of digits" in (printed := capsys.readouterr().out), printed
    assert len(client.search_model_versions("name = 'digits'")) == 1
    tags = client.get_run(champion.run_id).data.tags
    assert tags["checkpoint.resumed_from"] == f"{root}/step-00002"
    entries = listed(client, champion.run_id, tmp_path)
    assert entries[-1]["uri"] == f"{second}/checkpoints/step-00004"
    assert entries[-1]["came_from"] == f"{root}/step-00002"

    # By hand: the same says so, another step may join, and a model must be named.
    assert promote.main([str(second)]) == 0
    assert "is the champion." in capsys.readouterr().out
    assert promote.main([str(first), "--step", "2", "--model", "halfway"]) == 0
    assert "version 1 of halfway" in capsys.readouterr().out
    halfway = client.get_model_version_by_alias("halfway", "champion")
    assert halfway.tags["rlgen.step"] == "2"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give --model NAME"),
        (["--model", "a/b"], "can't name a registered model"),
        (["--model", "digits"], "can't be read"),
    ],
)
def test_a_promotion_that_can_not_be_is_refused_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    from rlgen.jobs.cli import run_job

    assert run_job(lambda: promote.main([str(tmp_path), *words])) == 2
    printed = capsys.readouterr()
    assert told in " ".join((printed.err + printed.out).split())
