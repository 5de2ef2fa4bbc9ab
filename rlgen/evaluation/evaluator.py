"""Evaluations during and around a run: which images, at which guidance, judged how.

Owns the sweep over guidance scales. Must not know where units are sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Protocol

import numpy as np

from rlgen.config.run import RunConfig
from rlgen.evaluation.judge import Quality, load_real_features, measure_quality
from rlgen.sampling.units import independent_units, training_settings
from rlgen.types import ScoredRollout, WorkUnit

NO_GUIDANCE = 1.0
_SPEED_ROUNDS = 5


class UnitRunner(Protocol):
    """Whoever samples and scores units."""

    def submit(self, units: Sequence[WorkUnit]) -> None:
        """Queue units."""

    def collect(self, units: Sequence[WorkUnit]) -> list[ScoredRollout]:
        """Wait for them."""


@dataclass(frozen=True)
class Sweep:
    """Quality by guidance scale; 1 is no guidance."""

    by_scale: dict[float, Quality]
    images_per_s: dict[float, float]
    """Sampling speed of one rollout worker without guidance and at the best scale."""

    @property
    def best_scale(self) -> float:
        """The guidance scale above 1 with the lowest judge FID; 1 if none was tried."""
        return best_guidance(self.by_scale)

    def as_summary(self) -> dict[str, Any]:
        """The `before` or `after` part of summary.json."""
        plain, best = self.by_scale[NO_GUIDANCE], self.by_scale[self.best_scale]
        return {
            "judge_fid": plain.judge_fid,
            "judge_fid_best_cfg": best.judge_fid,
            "best_cfg_scale": self.best_scale,
            "precision": plain.precision,
            "recall": plain.recall,
            "accuracy": plain.accuracy,
            "clip": plain.rewards.get("clip"),
            "preference": plain.rewards.get("preference"),
            "rewards": plain.rewards,
            "images_per_s": self.images_per_s[NO_GUIDANCE],
            "images_per_s_cfg": self.images_per_s[self.best_scale],
        }

    def fids(self) -> dict[str, float]:
        """Judge FID by guidance scale, for the report."""
        return {f"{scale:g}": quality.judge_fid for scale, quality in self.by_scale.items()}


def best_guidance(by_scale: Mapping[float, Quality]) -> float:
    """The scale above 1 with the lowest judge FID; 1 if there is none."""
    guided = [scale for scale in by_scale if scale != NO_GUIDANCE]
    return min(guided, key=lambda scale: by_scale[scale].judge_fid, default=NO_GUIDANCE)


class Evaluator:
    """Samples fixed-seed images through a runner and judges them."""

    def __init__(self, config: RunConfig, runner: UnitRunner) -> None:
        """Read the real features."""
        self.config = config
        self._runner = runner
        self._real = load_real_features(config.evaluation.judge_reference)

    def evaluate(
        self, policy_version: int, *, cfg_scale: float = NO_GUIDANCE
    ) -> tuple[Quality, np.ndarray]:
        """Judge one policy version at one guidance scale.

        Returns:
            the quality, and the first images for the grid, uint8 [N, 3, H, W].
        """
        evaluation = self.config.evaluation
        units = self._units(policy_version, cfg_scale, num_images=evaluation.num_images)
        self._runner.submit(units)
        scored = self._runner.collect(units)
        quality = measure_quality(scored, self._real, num_neighbors=evaluation.num_neighbors)
        return quality, np.concatenate([s.images_u8 for s in scored if s.images_u8 is not None])

    def sweep(self, policy_version: int) -> tuple[Sweep, np.ndarray]:
        """Judge one version without guidance and at every configured scale."""
        plain, images = self.evaluate(policy_version)
        guided = {
            scale: self.evaluate(policy_version, cfg_scale=scale)[0]
            for scale in self.config.evaluation.cfg_scales
        }
        by_scale = {NO_GUIDANCE: plain} | guided
        return Sweep(by_scale, self._speeds(policy_version, best_guidance(by_scale))), images

    def _speeds(self, policy_version: int, guided_scale: float) -> dict[float, float]:
        """Images/s with nothing else running; the scales take turns, as machines are noisy."""
        num_images = min(self.config.evaluation.images_per_unit, self.config.evaluation.num_images)
        speeds: dict[float, list[float]] = {NO_GUIDANCE: [], guided_scale: []}
        for _ in range(_SPEED_ROUNDS):
            for scale, measured in speeds.items():
                units = self._units(policy_version, scale, num_images=num_images)
                self._runner.submit(units)
                [scored] = self._runner.collect(units)
                measured.append(num_images / scored.rollout.sampling_s)
        return {scale: median(measured) for scale, measured in speeds.items()}

    def _units(self, policy_version: int, cfg_scale: float, *, num_images: int) -> list[WorkUnit]:
        evaluation = self.config.evaluation
        return independent_units(
            self.config,
            "evaluate",
            num_images=num_images,
            seed=self.config.evaluation.seed,
            policy_version=policy_version,
            settings=replace(training_settings(self.config), cfg_scale=cfg_scale),
            kept_classes=evaluation.grid_classes,
            kept_per_class=evaluation.grid_images_per_class,
        )
