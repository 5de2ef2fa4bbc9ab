"""Evaluations: fixed images at each guidance scale, the best scale, and the summary's keys."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.config import RunConfig
from rlgen.evaluation.evaluator import Evaluator, Sweep
from rlgen.evaluation.judge import Quality, save_real_features
from rlgen.types import Rollout, ScoredRollout, WorkUnit
from tests.tiny import scored, tiny_config

BEST_SCALE = 2.0


class FakeRunner:
    """Makes images whose features lie nearer to the real ones as guidance nears BEST_SCALE."""

    def __init__(self) -> None:
        self.submitted: list[list[WorkUnit]] = []

    def submit(self, units: Sequence[WorkUnit]) -> None:
        self.submitted.append(list(units))

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        assert list(units) == self.submitted[-1], "only what was submitted can be collected"
        return [self._scored(unit) for unit in units]

    def _scored(self, unit: WorkUnit) -> ScoredRollout:
        scale, count = unit.settings.cfg_scale, unit.num_images
        generator = np.random.default_rng(unit.condition_indices_P)
        features = generator.normal(size=(count, 3)) + 0.5 * abs(scale - BEST_SCALE)
        # An image shows its own noise key, so that the grid's order can be read off.
        kept = unit.condition_indices_P[list(unit.kept_images)]
        rollout = Rollout(
            unit=unit,
            policy_version=unit.policy_version,
            tokens_BL=np.zeros((count, 2), np.int32),
            rollout_logprobs_BL=np.zeros((count, 2), np.float32),
            sampling_s=count / (100.0 if scale == 1.0 else 50.0),
        )
        return scored(
            rollout,
            rewards={
                "clip": np.full(count, 0.1 * scale, np.float32),
                "preference": np.full(count, 0.2, np.float32),
            },
            judge_features_BF=features.astype(np.float32),
            judge_hits_B=np.arange(count) % 2 == 0,
            images_u8=np.broadcast_to(kept[:, None, None, None], (len(kept), 3, 2, 2)).astype(
                np.uint8
            )
            if len(kept)
            else None,
        )


@pytest.fixture
def config(tmp_path) -> RunConfig:
    real = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    path = str(tmp_path / "real.npz")
    save_real_features(path, feature_space="toy:3", features_RF=real, neighbors_NF=real[:50])
    return tiny_config(
        evaluation__judge_reference=path,
        evaluation__num_images=100,
        evaluation__images_per_unit=30,
        evaluation__cfg_scales=(1.5, 2.0, 3.0),
        evaluation__grid_images_per_class=10,
        evaluation__seed=77,
        rollout__temperature=0.9,
        rollout__top_k=7,
    )


SPEEDS = {1.0: 10.0, 1.5: 6.0, 2.0: 5.0}


def quality(fid: float, **changes: Any) -> Quality:
    values: dict[str, Any] = {
        "judge_fid": fid,
        "precision": 0.6,
        "recall": 0.5,
        "accuracy": 0.7,
        "rewards": {"clip": 0.2, "other": 0.3},
    }
    return Quality(**(values | changes))


def test_every_evaluation_asks_for_the_same_images(config) -> None:
    runner = FakeRunner()
    evaluator = Evaluator(config, runner)
    evaluator.evaluate(0)
    evaluator.evaluate(40)
    evaluator.evaluate(40, cfg_scale=1.5)
    keys = [
        [(u.seed, tuple(u.condition_indices_P), tuple(u.class_ids_P)) for u in units]
        for units in runner.submitted
    ]
    assert keys[0] == keys[1] == keys[2]
    assert {seed for seed, _, _ in keys[0]} == {77}
    assert [unit.num_images for unit in runner.submitted[0]] == [30, 30, 30, 10]
    assert [units[0].policy_version for units in runner.submitted] == [0, 40, 40]
    assert [units[0].settings.cfg_scale for units in runner.submitted] == [1.0, 1.0, 1.5]
    first = runner.submitted[0][0]
    assert (first.purpose, first.settings.temperature, first.settings.top_k) == ("evaluate", 0.9, 7)


def test_the_grids_images_are_the_first_ones_in_order(config) -> None:
    _, images_u8 = Evaluator(config, FakeRunner()).evaluate(0)
    assert images_u8.shape == (4 * 10, 3, 2, 2)  # classes x images per class
    assert images_u8[:, 0, 0, 0].tolist() == list(range(40))


def test_a_sweep_finds_the_best_guidance(config) -> None:
    runner = FakeRunner()
    sweep, images_u8 = Evaluator(config, runner).sweep(3)
    scales = [units[0].settings.cfg_scale for units in runner.submitted]
    assert scales[:4] == [1.0, 1.5, 2.0, 3.0]
    assert sweep.best_scale == BEST_SCALE
    assert len(images_u8) == 40
    fids = sweep.fids()
    assert fids.keys() == {"1", "1.5", "2", "3"}
    # Means apart by 0.5 |scale - 2| in three dimensions; the rest is the noise of 100 images.
    for scale, expected in (("1", 0.75), ("1.5", 0.1875), ("2", 0.0), ("3", 0.75)):
        assert fids[scale] == pytest.approx(expected, abs=0.3)


def test_speeds_are_medians_of_single_units_with_the_scales_in_turn(config) -> None:
    runner = FakeRunner()
    Evaluator(config, runner).sweep(3)
    timed = runner.submitted[4:]
    assert [len(units) for units in timed] == [1] * len(timed)
    assert {units[0].num_images for units in timed} == {30}
    assert [units[0].settings.cfg_scale for units in timed] == [1.0, BEST_SCALE] * (len(timed) // 2)
    assert len(timed) >= 6


def test_the_summary_has_the_promised_keys(config) -> None:
    sweep, _ = Evaluator(config, FakeRunner()).sweep(0)
    summary = sweep.as_summary()
    promised = {
        "judge_fid", "judge_fid_best_cfg", "best_cfg_scale", "precision", "recall", "clip",
        "preference", "images_per_s", "images_per_s_cfg",
    }  # fmt: skip
    assert promised <= summary.keys()
    plain, best = sweep.by_scale[1.0], sweep.by_scale[BEST_SCALE]
    assert summary["judge_fid"] == plain.judge_fid > best.judge_fid == summary["judge_fid_best_cfg"]
    assert (summary["precision"], summary["recall"]) == (plain.precision, plain.recall)
    assert summary["best_cfg_scale"] == BEST_SCALE
    assert summary["clip"] == pytest.approx(0.1) and summary["preference"] == pytest.approx(0.2)
    assert summary["images_per_s"] == pytest.approx(100.0)
    assert summary["images_per_s_cfg"] == pytest.approx(50.0)
    assert summary["accuracy"] == pytest.approx(0.5)


def test_the_best_guidance_is_a_guided_one_even_if_none_helps() -> None:
    sweep = Sweep({1.0: quality(1.0), 1.5: quality(3.0), 2.0: quality(2.0)}, SPEEDS)
    assert sweep.best_scale == 2.0
    assert sweep.as_summary()["judge_fid_best_cfg"] == 2.0


def test_without_guidance_scales_the_summary_repeats_the_plain_numbers() -> None:
    summary = Sweep({1.0: quality(1.0)}, SPEEDS).as_summary()
    assert summary["best_cfg_scale"] == 1.0
    assert summary["judge_fid"] == summary["judge_fid_best_cfg"] == 1.0


def test_rewards_that_a_run_lacks_are_none_and_others_are_kept() -> None:
    summary = Sweep({1.0: quality(1.0)}, SPEEDS).as_summary()
    assert summary["clip"] == 0.2 and summary["preference"] is None
    assert summary["rewards"] == {"clip": 0.2, "other": 0.3}
