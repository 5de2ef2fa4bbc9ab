"""The evaluation job: its plan, its resumption, and its agreement with a run's own evaluations."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.config import load_config
from rlgen.config.evaluate import plan_evaluation
from rlgen.digits.assets import ensure_assets, locate_assets
from rlgen.errors import CheckpointError, ConfigError, RewardError, StorageError
from rlgen.evaluation.finished import FinishedUnits, evaluation_key
from rlgen.features.outputs import ExtractorOutputs
from rlgen.jobs import evaluate, grpo
from rlgen.jobs.cli import run_job
from rlgen.learner.runtime import LocalRuntime
from rlgen.rewards.engine import RewardEngine
from rlgen.types import Rollout, SamplingSettings, WorkUnit
from tests.conftest import TINY_DIGITS, TINY_RUN

SETTINGS = [
    *TINY_DIGITS,
    "runtime=local",
    "evaluation.images_per_unit=50",
    "evaluation.cfg_scales=[1.5]",
    "tracking.uri=none",
]
NUM_IMAGES = 120
TIMED = "images_per_s"


def run(output: Path, *arguments: str) -> dict[str, Any]:
    """Run the job on the embedded digits; what it wrote."""
    status = evaluate.main(["--output", str(output), "--num-images", str(NUM_IMAGES), *arguments])
    assert status == 0
    return json.loads((output / "evaluate.json").read_text())


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    scales = result["scales"].items()
    return result | {
        "scales": {s: {k: v for k, v in row.items() if k != TIMED} for s, row in scales}
    }


@pytest.fixture(scope="module")
def whole(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "evaluation"
    run(output, *SETTINGS)
    return output


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the units that are sampled from here on."""
    unit_ids: list[str] = []
    submit = LocalRuntime.submit

    def counted(runtime: LocalRuntime, units: Sequence[WorkUnit]) -> None:
        unit_ids.extend(unit.unit_id for unit in units)
        submit(runtime, units)

    monkeypatch.setattr(LocalRuntime, "submit", counted)
    return unit_ids


def copy_of(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# --- the plan


def test_a_published_model_is_judged_over_fifty_thousand_images_and_all_its_scales() -> None:
    config = load_config("jobs/llamagen-l-256.yaml")
    plan = plan_evaluation(config, scales=None, num_images=None, policy={})
    assert plan.num_images == 50_000
    assert plan.scales == (1.0, 1.5, 1.75, 2.0, 2.25)
    assert plan_evaluation(config, scales=None, num_images=700, policy={}).num_images == 700
    digits = load_config(None, ["evaluation.num_images=900"])
    assert plan_evaluation(digits, scales=None, num_images=None, policy={}).num_images == 900


def test_a_trained_published_model_keeps_the_large_default_though_its_file_is_ours() -> None:
    config = load_config("jobs/var-d16-256.yaml")
    policy = {"policy.checkpoint": "policy.safetensors", "policy.model": None}
    assert plan_evaluation(config, scales=None, num_images=None, policy=policy).num_images == 50_000


@pytest.mark.parametrize(
    ("preset", "plain", "guided"), [("llamagen-l-256", 256, 512), ("var-d16-256", 10, 20)]
)
def test_the_dry_run_counts_model_evaluations_by_tokens_or_scales_and_twice_with_guidance(
    capsys: pytest.CaptureFixture[str], preset: str, plain: int, guided: int
) -> None:
    arguments = ["--config", f"jobs/{preset}.yaml", "--dry-run", "--scales", "2,1"]
    assert evaluate.main(arguments) == 0
    shown = capsys.readouterr().out
    assert f"scale 1: {plain} model evaluations an image, {plain * 50_000:,} in all" in shown
    assert f"scale 2: {guided} model evaluations an image" in shown
    assert "50,000 images at each of 2 guidance scale(s)" in shown
    assert shown.index("scale 1:") < shown.index("scale 2:")


def test_the_dry_run_of_the_digits_needs_no_trained_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path))
    assert evaluate.main(["--dry-run", "evaluation.num_images=500"]) == 0
    shown = capsys.readouterr().out
    assert "2 work units of up to 250 images a scale, 10 in all" in shown
    assert "known once the embedded default is trained" in shown
    assert list(tmp_path.iterdir()) == []


def test_every_scale_is_judged_once_in_ascending_order() -> None:
    plan = plan_evaluation(load_config(None), scales="2,1,2.0,1.25", num_images=None, policy={})
    assert plan.scales == (1.0, 1.25, 2.0)
    assert plan.config.rollout.cfg_scale == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "1,two"], "'1,two' must be numbers with commas"),
        (["--scales", "0.5,2"], "--scales has 0.5; guidance is 1"),
        (["--scales", "nan"], "--scales has nan"),
        (["--num-images", "5"], "5 images a scale are too few .* 10 or more"),
        (
            ["--num-images", "30", "evaluation.num_neighbors=40"],
            "num_neighbors = 40; make --num-images 41",
        ),
        (["--checkpoint", "p.safetensors", "policy.checkpoint=q"], "name two policies"),
        (["--checkpoint", "p.safetensors"], "policy.checkpoint = p.safetensors does not exist"),
        (["--config", "jobs/llamagen-l-256.yaml"], "leaves .* paths to you"),
    ],
)
def test_what_can_not_be_judged_is_refused_before_anything_starts(
    arguments: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate.main(arguments)


def test_a_folder_that_is_no_checkpoint_is_told_in_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(lambda: evaluate.main(["--checkpoint", str(tmp_path)])) == 2
    shown = capsys.readouterr().err
    assert "is no committed checkpoint" in shown and shown.count("\n") == 1


# --- the results


def test_everything_is_measured_at_every_scale(whole: Path) -> None:
    result = json.loads((whole / "evaluate.json").read_text())
    assert list(result["scales"]) == ["1", "1.5"]
    for row in result["scales"].values():
        assert row["num_images"] == NUM_IMAGES
        assert row["fid"] > 0 and row["fd_second"] > 0 and row["kid"] > 0
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        assert 1 <= row["vendi"] <= NUM_IMAGES and row["inception_score"] >= 1
        assert 0 <= row["accuracy"] <= 1 and row["images_per_s"] > 0
        assert row["rewards"].keys() == {"clip", "preference"}
        assert row["sfid"] is None
        assert list(row["missing"]) == ["sfid"] and "convnet" in row["missing"]["sfid"]
    fids = {scale: row["fid"] for scale, row in result["scales"].items()}
    assert f"{result['best_scale']:g}" == min(fids, key=lambda scale: fids[scale])
    plain, guided = (row["model_evaluations_per_image"] for row in result["scales"].values())
    assert (plain, guided) == (16, 32)  # 4 x 4 tokens


def test_the_numbers_are_those_of_a_runs_own_evaluation(cache_folder: Path, tmp_path: Path) -> None:
    settings = [*TINY_RUN, "runtime=local", "steps=1"]
    assert grpo.main(["--output", str(tmp_path / "run"), *settings]) == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00001"
    folder = tmp_path / "evaluation"
    # No --config: the checkpoint knows its own.
    assert evaluate.main(["--checkpoint", str(checkpoint), "--output", str(folder)]) == 0
    result = json.loads((folder / "evaluate.json").read_text())
    row = result["scales"]["1"]
    for name in ("precision", "recall", "accuracy"):
        assert row[name] == after[name], name
    assert row["rewards"] == pytest.approx(after["rewards"], rel=1e-6)
    # The run divides covariances by N, published FIDs by N - 1.
    assert row["fid"] == pytest.approx(after["judge_fid"], rel=0.02)
    assert list(result["scales"]) == ["1", "1.5"]
    # The policy's file alone, with the configuration named, is the same evaluation.
    policy = checkpoint / "policy.safetensors"
    config = tmp_path / "run" / "config.yaml"
    arguments = ["--checkpoint", str(policy), "--config", str(config), "--output", str(folder)]
    assert evaluate.main(arguments) == 0
    again = json.loads((folder / "evaluate.json").read_text())
    assert again["policy_sha256"] == result["policy_sha256"]
    assert again["scales"] == result["scales"], "nothing was sampled anew"


def test_another_policy_gets_other_numbers(whole: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "other", *SETTINGS, "digits.policy_seed=1", "--scales", "1")
    first = json.loads((whole / "evaluate.json").read_text())
    assert other["policy_sha256"] != first["policy_sha256"]
    assert other["scales"]["1"]["fid"] != first["scales"]["1"]["fid"]


def test_mlflow_holds_the_metrics_of_every_scale(whole: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = copy_of(whole, tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    result = run(folder, *SETTINGS, f"tracking.uri={uri}")
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rlgen")
    [tracked] = client.search_runs([experiment.experiment_id])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["scale-1.5/fid"] == result["scales"]["1.5"]["fid"]
    assert tracked.data.metrics["scale-1/reward/clip"] == result["scales"]["1"]["rewards"]["clip"]
    assert tracked.data.tags["rlgen.policy_sha256"] == result["policy_sha256"]
    names = {item.path for item in client.list_artifacts(tracked.info.run_id)}
    assert "evaluate.json" in names


def test_the_judge_runs_once_and_gives_all_that_it_has() -> None:
    class Tokenizer:
        def decode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
            return tokens_BL.float()[:, None, None, :].expand(-1, 3, 2, -1) / 10

    class Judge:
        feature_space, num_features, passes = "toy:2", 2, 0

        def __call__(self, images_01: torch.Tensor) -> torch.Tensor:
            self.passes += 1
            return images_01[:, 0, 0]

        def outputs(self, images_01: torch.Tensor) -> ExtractorOutputs:
            features_BF = self(images_01)
            return ExtractorOutputs(features_BF, features_BF.repeat(1, 3), features_BF + 5)

    judge = Judge()
    engine = RewardEngine(Tokenizer(), (), ("ant", "bee"), extractor=Judge(), judge=judge)
    unit = WorkUnit(
        unit_id="e",
        purpose="evaluate",
        step=0,
        index=0,
        policy_version=0,
        seed=0,
        condition_indices_P=np.arange(2),
        class_ids_P=np.array([0, 1]),
        group_size=1,
        settings=SamplingSettings(),
    )
    tokens_BL = np.array([[1, 2], [3, 4]], dtype=np.int32)
    rollout = Rollout(unit, 0, tokens_BL, np.zeros((2, 2), np.float32), sampling_s=1.0)
    plain = engine.score(rollout)
    assert judge.passes == 1
    assert plain.judge_features_BF is not None and plain.features_BF is None
    assert plain.judge_logits_BC is None and plain.judge_spatial_BS is None
    found = engine.score(replace(rollout, unit=replace(unit, is_detailed=True)))
    assert judge.passes == 2
    assert found.judge_logits_BC is not None and found.features_BF is not None
    assert found.judge_spatial_BS is not None
    np.testing.assert_allclose(found.judge_spatial_BS, tokens_BL / 10 + 5, rtol=1e-6)
    np.testing.assert_allclose(found.judge_logits_BC, np.tile(tokens_BL / 10, 3), rtol=1e-6)
    np.testing.assert_allclose(found.features_BF, tokens_BL / 10, rtol=1e-6)
    assert found.judge_hits_B is None, "six classes are not the policy's two"


# --- going on


def test_a_restart_samples_only_what_is_missing_and_ends_as_if_uninterrupted(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: list[str]
) -> None:
    save = FinishedUnits.save
    saved: list[str] = []

    def dies_after_two(units: FinishedUnits, scored: Any) -> None:
        if len(saved) == 2:
            raise RewardError("the machine is gone")
        saved.append(scored.rollout.unit.unit_id)
        save(units, scored)

    output = tmp_path / "evaluation"
    with monkeypatch.context() as patch:
        patch.setattr(FinishedUnits, "save", dies_after_two)
        with pytest.raises(RewardError, match="the machine is gone"):
            run(output, *SETTINGS)
    assert not (output / "evaluate.json").exists()
    sampled.clear()
    resumed = run(output, *SETTINGS)
    assert len(sampled) == 4 and not set(sampled) & set(saved)  # of 2 scales x 3 units
    expected = json.loads((whole / "evaluate.json").read_text())
    assert without_times(resumed) == without_times(expected)


def test_the_same_command_again_samples_nothing(
    whole: Path, tmp_path: Path, sampled: list[str]
) -> None:
    folder = copy_of(whole, tmp_path)
    (folder / "evaluate.json").unlink()
    again = run(folder, *SETTINGS)
    assert sampled == []
    assert again == json.loads((whole / "evaluate.json").read_text()), "speeds are kept as well"


def test_more_images_and_scales_go_on_from_those_that_are_there(
    whole: Path, tmp_path: Path, sampled: list[str]
) -> None:
    folder = copy_of(whole, tmp_path)
    grown = run(folder, *SETTINGS, "--num-images", "150", "--scales", "1,2")
    # The third unit of 20 images is now one of 50; the second scale is new.
    assert len(sampled) == 1 + 3
    assert grown["scales"]["1"]["num_images"] == 150


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("evaluation.seed=5", "evaluation.seed"),
        ("rollout.top_k=5", "rollout.top_k"),
        ("digits.policy_seed=1", "policy.checkpoint"),
        ("reward.scorers.clip.prompt=a {class}", "reward.scorers.clip.prompt"),
    ],
)
def test_a_folder_of_other_images_is_refused_with_the_field(
    whole: Path, tmp_path: Path, setting: str, field: str
) -> None:
    folder = copy_of(whole, tmp_path)
    with pytest.raises(ConfigError, match=f"made with other settings: {field}"):
        run(folder, *SETTINGS, setting)


@pytest.mark.parametrize(
    "setting",
    ["rollout.num_workers=5", "reward.scorers.clip.weight=0.7", "evaluation.num_neighbors=4"],
)
def test_what_does_not_touch_the_images_needs_no_new_ones(
    whole: Path, tmp_path: Path, sampled: list[str], setting: str
) -> None:
    run(copy_of(whole, tmp_path), *SETTINGS, setting)
    assert sampled == []


def test_the_key_follows_contents_wherever_files_lie(cache_folder: Path, tmp_path: Path) -> None:
    config = load_config(None, SETTINGS)
    assets = ensure_assets(config.digits, lambda *_: None)
    assert assets == locate_assets(config.digits)
    moved = Path(shutil.copy(assets.policy, tmp_path / "moved.safetensors"))
    clip = Path(shutil.copytree(assets.folder / "clip", tmp_path / "clip"))

    def key_of(policy: Path, clip: Path) -> dict[str, Any]:
        paths = {"policy.checkpoint": policy, "reward.scorers.clip.checkpoint": clip}
        return evaluation_key(config.with_values({k: str(v) for k, v in paths.items()}))

    first = key_of(assets.policy, assets.folder / "clip")
    assert key_of(moved, clip) == first
    with next(path for path in clip.iterdir() if path.suffix == ".json").open("a") as stream:
        stream.write(" ")
    changed = key_of(moved, clip)
    assert {name for name in first if first[name] != changed[name]} == {
        "reward.scorers.clip.checkpoint"
    }


def test_a_damaged_unit_is_named(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path)
    unit = folder / "units" / "scale-1.5" / "images-0000050-0000099.npz"
    unit.write_bytes(unit.read_bytes()[:500])
    with pytest.raises(StorageError, match=r"images-0000050-0000099\.npz can't be read .* delete"):
        run(folder, *SETTINGS)
    unit.unlink()
    assert without_times(run(folder, *SETTINGS)) == without_times(
        json.loads((whole / "evaluate.json").read_text())
    )


def test_a_damaged_checkpoint_is_never_judged(
    tmp_path: Path, make_checkpoint: Callable[[Path], Path]
) -> None:
    checkpoint = make_checkpoint(tmp_path)
    policy = checkpoint / "policy.safetensors"
    policy.write_bytes(policy.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate.main(["--checkpoint", str(checkpoint)])


@pytest.fixture
def make_checkpoint() -> Callable[[Path], Path]:
    """A committed checkpoint that holds a policy and nothing else."""
    from rlgen.learner.checkpoint import commit_checkpoint, write_parts
    from rlgen.policies.load import policy_bytes
    from tests.tiny import tiny_policy

    def make(root: Path) -> Path:
        uri = root / "step-00001"
        parts = write_parts(str(uri), {"policy.safetensors": lambda: policy_bytes(tiny_policy())})
        commit_checkpoint(str(uri), parts, meta={})
        return uri

    return make
