"""The results of an evaluation: measured from finished units, as JSON, as a table, in MLflow.

Owns what evaluate.json holds. Must not sample.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rlgen.config.base import EMBEDDED
from rlgen.config.evaluate import EvaluationPlan, model_evaluations, published_architecture
from rlgen.config.load import dump_yaml
from rlgen.config.run import RunConfig
from rlgen.evaluation.finished import FinishedUnits
from rlgen.evaluation.judge import RealFeatures, load_real_features
from rlgen.evaluation.measured import Measured, measure
from rlgen.evaluation.metrics import vendi_score
from rlgen.jobs.console import RunProgress
from rlgen.moments.reference import load_reference
from rlgen.nn.weights import peek_metadata
from rlgen.storage import cached_file, local_copy, write_bytes
from rlgen.tracking import Tracker, ui_command
from rlgen.types import WorkUnit

RESULT_NAME = "evaluate.json"
_FLUSH_S = 60.0
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("FID (judge)", "fid", ".4g"),
    ("sFID (judge)", "sfid", ".4g"),
    ("FD (reward features)", "fd_second", ".4g"),
    ("KID", "kid", ".4g"),
    ("Precision", "precision", ".3f"),
    ("Recall", "recall", ".3f"),
    ("Vendi score", "vendi", ".4g"),
    ("Inception score (judge)", "inception_score", ".4g"),
    ("Accuracy (judge)", "accuracy", ".3f"),
    ("Images/s, one worker", "images_per_s", ",.4g"),
    ("Model evaluations an image", "model_evaluations_per_image", ",d"),
)


@dataclass(frozen=True)
class Results:
    """What an evaluation found."""

    plan: EvaluationPlan
    real: RealFeatures
    by_scale: dict[float, Measured]
    policy_sha256: str

    @property
    def best_scale(self) -> float:
        """The guidance scale with the lowest FID."""
        return min(self.by_scale, key=lambda scale: self.by_scale[scale].fid)

    def as_json(self) -> dict[str, Any]:
        """The content of evaluate.json."""
        config = self.plan.config
        rollout = config.rollout
        return {
            "policy": config.policy.checkpoint,
            "policy_sha256": self.policy_sha256,
            "num_images": self.plan.num_images,
            "seed": config.evaluation.seed,
            "settings": {
                "temperature": rollout.temperature,
                "top_k": rollout.top_k,
                "top_p": rollout.top_p,
                "cfg_interval": rollout.cfg_interval,
                "dtype": rollout.dtype,
            },
            "judge": self.real.feature_space,
            "real_images": len(self.real.features_RF),
            "real_vendi": vendi_score(self.real.features_RF),
            "best_scale": self.best_scale,
            "scales": {f"{scale:g}": found.as_json() for scale, found in self.by_scale.items()},
        }


def measure_scales(
    plan: EvaluationPlan,
    units: Mapping[float, Sequence[WorkUnit]],
    finished: FinishedUnits,
    *,
    policy_sha256: str,
) -> Results:
    """Measure every scale from the units on disk.

    Raises:
        StorageError: a unit's file is damaged, or the real side can't be read.
        ConfigError: the real side is of another kind.
    """
    config = plan.config
    real = load_real_features(config.evaluation.judge_reference)
    second = None
    if config.reward.loo_fid is not None:
        with local_copy(config.reward.loo_fid.reference) as path:
            second = load_reference(path).moments
    architecture = policy_architecture(config)
    assert architecture is not None, "the policy was sampled from"
    by_scale = {
        scale: measure(
            [finished.load(unit) for unit in of_scale],
            real,
            second,
            num_neighbors=config.evaluation.num_neighbors,
            model_evaluations_per_image=model_evaluations(*architecture, scale),
        )
        for scale, of_scale in units.items()
    }
    return Results(plan, real, by_scale, policy_sha256)


def policy_architecture(config: RunConfig) -> tuple[str, dict[str, Any]] | None:
    """Family and fields of the policy; None while the embedded default is not trained.

    Raises:
        CheckpointError: its file is missing, damaged, or of another kind.
    """
    published = published_architecture(config)
    if published is not None:
        return published
    location = config.policy.checkpoint
    if location == EMBEDDED:
        from rlgen.digits.assets import locate_assets

        assets = locate_assets(config.digits)
        if not assets.exist:
            return None
        location = str(assets.policy)
    metadata = peek_metadata(str(cached_file(location)))
    return metadata["kind"], {**metadata["config"], **config.policy.architecture}


def write_results(results: Results, folder: Path, progress: RunProgress) -> None:
    """Write evaluate.json and config.yaml, log to MLflow, and show the table.

    Raises:
        StorageError: the folder can't be written.
    """
    config = results.plan.config
    content = results.as_json()
    write_bytes(str(folder / RESULT_NAME), (json.dumps(content, indent=1) + "\n").encode())
    write_bytes(str(folder / "config.yaml"), dump_yaml(config).encode())
    uri = config.tracking.uri or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"
    tracker = Tracker(
        uri, experiment=config.tracking.experiment, run_name=folder.name, spool_dir=folder
    )
    tracker.log_params(config.model_dump(mode="json"))
    tracker.set_tags({"rlgen.job": "evaluate", "rlgen.policy_sha256": results.policy_sha256})
    for scale, found in results.by_scale.items():
        # MLflow's steps are whole numbers and guidance is not: each scale has its own names.
        named = {f"scale-{scale:g}/{name}": value for name, value in found.as_metrics().items()}
        tracker.log_metrics(found.num_images, named)
    tracker.log_artifact(folder / RESULT_NAME)
    tracker.close("FINISHED", timeout_s=_FLUSH_S)
    for warning in tracker.warnings:
        progress.say(warning)
    progress.show(results_table(results))
    for line in notes(results):
        progress.say(line)
    progress.say(f"results: {folder / RESULT_NAME} (finished units and config.yaml beside it)")
    if command := ui_command(uri):
        progress.say(f"MLflow:  {command}")


def results_table(results: Results) -> Table:
    """Lay out the metrics, a column for each guidance scale."""
    table = Table(
        title=f"{results.plan.num_images:,} images against {len(results.real.features_RF):,} real",
        title_justify="left",
    )
    table.add_column("")
    columns = {scale: found.as_json() for scale, found in results.by_scale.items()}
    for scale in columns:
        table.add_column("no guidance" if scale == 1.0 else f"scale {scale:g}", justify="right")
    for title, name, form in _ROWS:
        values = [found[name] for found in columns.values()]
        if any(value is not None for value in values):
            table.add_row(title, *("–" if v is None else f"{v:{form}}" for v in values))
    names = _first(results).rewards
    for name in names:
        table.add_row(name, *(f"{found['rewards'][name]:.4g}" for found in columns.values()))
    return table


def notes(results: Results) -> list[str]:
    """Why rows are missing in the table, a line each."""
    titles = {name: title for title, name, _ in _ROWS}
    return [f"no {titles[name]}: {reason}" for name, reason in _first(results).missing.items()]


def _first(results: Results) -> Measured:
    return next(iter(results.by_scale.values()))
