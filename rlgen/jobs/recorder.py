"""Everything a run leaves behind: folder, progress, MLflow, report, summary.

Owns the run folder and the record of the run (what was measured before, the group ledger), which
goes into every checkpoint. Must not decide anything about training.
"""

import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlgen.config.load import config_sha256, dump_yaml
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError
from rlgen.evaluation.evaluator import Sweep
from rlgen.evaluation.grid import arrange_by_class, write_grid
from rlgen.evaluation.guard import Guard, Judgement
from rlgen.evaluation.judge import Quality
from rlgen.jobs.console import RunProgress, summary_table
from rlgen.jobs.memory import PeakMemory
from rlgen.jobs.report import build_report
from rlgen.learner.checkpoint import checkpoint_uri, read_meta
from rlgen.learner.replay import BOOTSTRAP, step_name, store_step
from rlgen.storage import atomic_path, write_bytes
from rlgen.tracking import Tracker, ui_command
from rlgen.types import ScoredRollout, StepRewards

_FLUSH_S = 60.0


class Recorder:
    """The run's folder and its observers, as a context."""

    def __init__(self, config: RunConfig, *, output: Path | None) -> None:
        """Choose the folder; no file stays in it before the inputs were checked.

        Raises:
            ConfigError: the folder holds another run.
        """
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        self.folder = output if output is not None else Path("runs") / f"{stamp}-seed{config.seed}"
        if (self.folder / "config.yaml").exists() and config.checkpoint.resume_from is None:
            raise ConfigError(
                f"--output {self.folder} holds a run already; name another folder, or go on with "
                "it by checkpoint.resume_from."
            )
        self.config = config
        root = config.checkpoint.uri or str(self.folder / "checkpoints")
        self.checkpoint_root = root if "://" in root else str(Path(root).resolve())
        self._tracker: Tracker | None = None
        self._memory = PeakMemory()
        self._progress = RunProgress(config.steps)
        self._started = time.monotonic()
        self._before: dict[str, Any] = {}
        self._sweeps: dict[str, dict[str, float]] = {}
        self._groups: dict[str, Any] = {"generated": 0, "trained": 0, "dropped": {}}
        self._guard = Guard(config.guard)
        self._alarms: list[dict[str, Any]] = []
        self.num_rollbacks = 0

    def __enter__(self) -> Self:
        self._memory.__enter__()
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._memory.__exit__(kind, error, trace)
        if self._tracker is not None:
            self._tracker.close("FINISHED" if error is None else "FAILED", timeout_s=_FLUSH_S)
            for warning in self._tracker.warnings:
                self._progress.say(warning)

    def open(self, config: RunConfig) -> None:
        """Make the folder and start MLflow, now that the inputs are good."""
        self.config = config
        write_bytes(str(self.folder / "config.yaml"), dump_yaml(config).encode())
        resumed = config.checkpoint.resume_from
        self._tracker = Tracker(
            self._tracking_uri(),
            experiment=config.tracking.experiment,
            run_name=self.folder.name,
            spool_dir=self.folder,
            run_id=None if resumed is None else read_meta(resumed)["mlflow_run_id"],
        )
        self._tracker.log_params(config.model_dump(mode="json"))
        self._tracker.log_artifact(self.folder / "config.yaml")

    def stage(self, text: str, *, done: int | None = None, total: int | None = None) -> None:
        """Say what is happening before and after the steps."""
        self._progress.stage(text, done=done, total=total)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._progress.say(text)

    def begin(self, base: tuple[Sweep, np.ndarray]) -> None:
        """Take in the evaluation of the base policy."""
        sweep, images = base
        self._before = sweep.as_summary()
        self._sweeps["before"] = sweep.fids()
        self.log_evaluation(0, sweep.by_scale[1.0], images)

    def log_step(
        self,
        step: int,
        scored: Sequence[ScoredRollout],
        rewards: StepRewards,
        metrics: dict[str, float],
    ) -> None:
        """Take in one training step."""
        group_size = self.config.rollout.group_size
        num_groups = len(rewards.advantages_B) // group_size
        self._groups["generated"] += sum(len(s.rollout.unit.class_ids_P) for s in scored)
        self._groups["trained"] += num_groups
        means = {f"reward/{name}": float(v.mean()) for name, v in rewards.rewards.items()}
        work = {
            "time/sampling_s": sum(item.rollout.sampling_s for item in scored),
            "time/scoring_s": sum(item.scoring_s for item in scored),
            "perf/images_per_s": len(rewards.advantages_B) / metrics["time/step_s"],
        }
        every = self.config.replay.every
        if every and step % every == 0:
            store_step(str(self.folder), step_name(step), scored, rewards)
        row = means | rewards.metrics | metrics | work
        self._write(step + 1, row)
        self._progress.step(step + 1, row)

    def log_bootstrap(self, scored: Sequence[ScoredRollout]) -> None:
        """Take in the images that the moments start from, if there are any."""
        if self.config.replay.every and scored:
            store_step(str(self.folder), BOOTSTRAP, scored)

    def log_evaluation(self, step: int, quality: Quality, images_u8: np.ndarray) -> list[str]:
        """Take in one evaluation without guidance, and its grid.

        Returns:
            the rules of the guard that it breaks, in words.
        """
        self._write(step, quality.as_metrics())
        if step:
            self._progress.step(step, quality.as_metrics())
        evaluation = self.config.evaluation
        grid = self.folder / "grids" / f"step_{step:05d}.png"
        grid.parent.mkdir(exist_ok=True)
        num_rows = min(len(self.config.class_names), evaluation.grid_classes)
        cells = arrange_by_class(images_u8, num_rows, evaluation.grid_images_per_class)
        write_grid(grid, cells, columns=evaluation.grid_images_per_class)
        if self._tracker is not None:
            self._tracker.log_image(step, grid)
        return self._judge(step, quality)

    def _judge(self, step: int, quality: Quality) -> list[str]:
        """Ask the guard, and sound the alarm."""
        if self.config.guard.every == 0:
            return []
        scorers = self.config.reward.active_scorers
        weights = {name: scorer.weight for name, scorer in scorers.items()}
        self._guard = self._guard.observed(Judgement.of(step, quality, weights))
        broken = self._guard.broken_rules()
        self._write(step, {"guard/broken_rules": float(len(broken))})
        if broken:
            self._alarms.append({"step": step, "rules": broken})
            self.note(f"guard, step {step}: {'; '.join(broken)}")
            if self._tracker is not None:
                self._tracker.set_tags({"guard": f"step {step}: {'; '.join(broken)}"})
        return broken

    @property
    def best_step(self) -> int | None:
        """Step of the lowest judge FID so far; None without a guard."""
        return None if self._guard.best is None else self._guard.best.step

    @property
    def best_checkpoint(self) -> str | None:
        """Where the policy of that step is, if the run keeps it for a rollback."""
        if self.config.guard.action != "rollback" or self.best_step is None:
            return None
        return checkpoint_uri(self.checkpoint_root, self.best_step)

    def roll_back(self, config: RunConfig) -> None:
        """Go on with other settings in the same run, after a rollback."""
        self.config = config
        self.num_rollbacks += 1
        unresumed = config.with_values({"checkpoint.resume_from": None})
        write_bytes(str(self.folder / "config.yaml"), dump_yaml(unresumed).encode())
        if self._tracker is not None:
            self._tracker.log_artifact(self.folder / "config.yaml")

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run reports as one."""
        run_id = None if self._tracker is None else self._tracker.run_id
        return {
            "before": self._before,
            "sweeps": self._sweeps,
            "groups": self._groups,
            "mlflow_run_id": run_id,
            "guard": self._guard.state_dict(),
            "alarms": self._alarms,
            "num_rollbacks": self.num_rollbacks,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what state gave; rows of steps that will be done again go."""
        self._before = state["before"]
        self._sweeps = state["sweeps"]
        self._groups = state["groups"]
        self._guard = self._guard.restored(state["guard"])
        # A rollback rewinds the run, but not the memory that it happened.
        self._alarms = max(self._alarms, state["alarms"], key=len)
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():
            rows = metrics.read_text().splitlines(keepends=True)
            kept = [row for row in rows if json.loads(row)["step"] <= state["step"]]
            metrics.write_text("".join(kept))

    def finish(
        self,
        trained: tuple[Sweep, np.ndarray],
        *,
        policy_sha256: str,
        restarts: dict[str, int],
        dropped_groups: dict[str, int],
    ) -> None:
        """Take in the last evaluation; write the summary, the report and the table."""
        sweep, images = trained
        self._groups["generated"] += sum(dropped_groups.values())
        self._groups["dropped"] = dropped_groups
        self.log_evaluation(self.config.steps, sweep.by_scale[1.0], images)
        self._sweeps["after"] = sweep.fids()
        summary = {
            "config_sha256": config_sha256(self.config),
            "seed": self.config.seed,
            "steps": self.config.steps,
            "wall_s": time.monotonic() - self._started,
            "before": self._before,
            "after": sweep.as_summary(),
            "sweep": self._sweeps,
            "policy_sha256": policy_sha256,
            "groups": self._groups,
            "restarts": restarts,
            "guard": {"alarms": self._alarms, "rollbacks": self.num_rollbacks},
            "peak_pss_gib": self._memory.peak_gib,
        }
        with atomic_path(self.folder / "summary.json") as partial:
            partial.write_text(json.dumps(summary, indent=2))
        self.stage("writing the report")
        report = build_report(self.folder)
        assert self._tracker is not None, "open comes first"
        self._tracker.log_artifact(self.folder / "summary.json")
        self._tracker.log_artifact(report)
        self._progress.show(summary_table(summary))
        self.note(f"report:      {report}")
        self.note(f"run folder:  {self.folder} (summary.json, config.yaml, metrics.jsonl, grids)")
        self.note(f"checkpoints: {self.checkpoint_root}")
        if command := ui_command(self._tracking_uri()):
            self.note(f"MLflow:      {command}")

    def _write(self, step: int, row: dict[str, float]) -> None:
        elapsed = time.monotonic() - self._started
        with (self.folder / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": step, "time_s": elapsed, **row}) + "\n")
        if self._tracker is not None:
            self._tracker.log_metrics(step, row)

    def _tracking_uri(self) -> str:
        uri = self.config.tracking.uri
        if uri is not None:
            return uri
        return f"sqlite:///{self.folder.resolve().parent / 'mlflow.db'}"
