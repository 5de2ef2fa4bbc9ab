"""Evaluations during and around a run: which images, at which guidance, judged how.

Owns the sweep over guidance scales. Must not know where units are sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlgen.config.run import RunConfig
from rlgen.evaluation.judge import Quality, load_real_features, measure_quality
from rlgen.sampling.units import independent_units
from rlgen.types import SamplingSettings, ScoredRollout, WorkUnit

NO_GUIDANCE = 1.0


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

    @property
    def best_scale(self) -> float:
        """The guidance scale above 1 with the lowest judge FID; 1 if none was tried."""
        guided = [scale for scale in self.by_scale if scale != NO_GUIDANCE]
        return min(guided, key=lambda s: self.by_scale[s].judge_fid, default=NO_GUIDANCE)

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
            "images_per_s": plain.images_per_s,
            "images_per_s_cfg": best.images_per_s,
        }

    def fids(self) -> dict[str, float]:
        """Judge FID by guidance scale, for the report."""
        return {f"{scale:g}": quality.judge_fid for scale, quality in self.by_scale.items()}


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
        per_grid = len(self.config.class_names) * evaluation.grid_images_per_class
        units = independent_units(
            self.config,
            "evaluate",
            num_images=evaluation.num_images,
            seed=evaluation.seed,
            policy_version=policy_version,
            settings=SamplingSettings(
                cfg_scale=cfg_scale,
                temperature=self.config.rollout.temperature,
                top_k=self.config.rollout.top_k,
                top_p=self.config.rollout.top_p,
            ),
            num_kept_images=per_grid,
        )
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
        return Sweep({NO_GUIDANCE: plain} | guided), images
