"""Everything a run leaves behind: folder, progress, MLflow, report, summary.

Owns the run folder and the record of the run (what was measured before, the group ledger), which
goes into every checkpoint. Must not decide anything about training.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlgen.config.load import config_sha256, dump_yaml
from rlgen.config.run import RunConfig
from rlgen.errors import Stopped
from rlgen.evaluation.evaluator import Sweep
from rlgen.evaluation.grid import arrange_by_class, write_grid
from rlgen.evaluation.guard import Guard, Judgement
from rlgen.evaluation.judge import Quality
from rlgen.jobs.console import RunProgress, summary_table
from rlgen.jobs.ledger import GroupLedger
from rlgen.jobs.lineage import Lineage, candidate_of
from rlgen.jobs.memory import PeakMemory
from rlgen.jobs.metrics_export import MetricsExport
from rlgen.jobs.metrics_file import MetricsFile
from rlgen.jobs.report import build_report
from rlgen.jobs.run_folder import choose_folder, claim_folder
from rlgen.learner.checkpoint import Part, checkpoint_uri, part_digests, read_meta
from rlgen.learner.replay import BOOTSTRAP, step_name, store_step
from rlgen.learner.state_io import POLICY
from rlgen.storage import atomic_path, without_credentials, write_bytes
from rlgen.tracking import Status, Tracker, ui_command
from rlgen.types import Health, ScoredRollout, StepRewards

_FLUSH_S = 60.0


class Recorder:
    """The run's folder and its observers, as a context."""

    def __init__(self, config: RunConfig, *, output: Path | None) -> None:
        """Choose the folder; no file stays in it before the inputs were checked.

        Raises:
            ConfigError: the folder holds another run.
        """
        self.folder = choose_folder(config, output)
        self._request = config
        self.config = config
        root = config.checkpoint.uri or str(self.folder / "checkpoints")
        self.checkpoint_root = root if "://" in root else str(Path(root).resolve())
        self._tracker: Tracker | None = None
        self._lineage = Lineage(self.folder)
        self._metrics = MetricsFile(self.folder / "metrics.jsonl")
        self._memory = PeakMemory()
        self._progress = RunProgress(config.steps)
        self._started = time.monotonic()
        self._before: dict[str, Any] = {}
        self._sweeps: dict[str, dict[str, float]] = {}
        self._ledger = GroupLedger()
        self._guard = Guard(config.guard)
        self._alarms: list[dict[str, Any]] = []
        self._num_resumes = 0
        self.num_rollbacks = 0
        self._furthest_step = 0
        self.num_losses = 0
        """Roles lost since the last finished step."""
        self.last_checkpoint: str | None = None
        """The one committed last, by this process."""
        self.is_stopping = False
        """Whether the run was asked to end."""
        self.export: MetricsExport | None = None
        """Takes the numbers to Prometheus."""

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
            status: Status = "KILLED" if isinstance(error, Stopped) else "FAILED"
            self._tracker.close("FINISHED" if error is None else status, timeout_s=_FLUSH_S)
            for warning in self._tracker.warnings:
                self._progress.say(warning)

    def open(self, config: RunConfig) -> None:
        """Make the folder and start MLflow, now that the inputs are good."""
        self.config = config
        claim_folder(self.folder, self._request)
        write_bytes(str(self.folder / "config.yaml"), dump_yaml(config).encode())
        resumed = config.checkpoint.resume_from
        self._tracker = Tracker(
            self._tracking_uri(),
            experiment=config.tracking.experiment,
            run_name=self.folder.name,
            spool_dir=self.folder,
            run_id=None if resumed is None else read_meta(resumed)["mlflow_run_id"],
            system_metrics_s=config.tracking.system_metrics_s,
            tell=self.note,
        )
        self._lineage.judged_by(config)
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
        self._metrics.forget_after(-1)  # of an earlier start that did not get far
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
        health: Health,
    ) -> None:
        """Take in one training step."""
        if step >= self._furthest_step:  # a step that is done again is no progress
            self._furthest_step, self.num_losses = step + 1, 0
        self._ledger.trained += len(rewards.advantages_B) // self.config.rollout.group_size
        self._ledger.see(health.groups)
        restarts = {f"restarts/{role}": float(n) for role, n in health.restarts.items()}
        restarts |= {f"recovery/{role}_s": seconds for role, seconds in health.recovery_s.items()}
        restarts |= {f"workers/{role}": float(n) for role, n in health.workers.items()}
        means = {f"reward/{name}": float(v.mean()) for name, v in rewards.rewards.items()}
        work = {
            "time/sampling_s": sum(item.rollout.sampling_s for item in scored),
            "time/scoring_s": sum(item.scoring_s for item in scored),
            "perf/images_per_s": len(rewards.advantages_B) / metrics["time/step_s"],
        }
        every = self.config.replay.every
        if every and step % every == 0:
            store_step(str(self.folder), step_name(step), scored, rewards)
        row = means | rewards.metrics | metrics | work | restarts | self._ledger.metrics()
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
        self._lineage.judged(step, quality)
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

    def note_loss(self) -> None:
        """Count a role that was lost in the middle of a step."""
        self.num_losses += 1
        if self.export is not None:
            self.export.add_loss()

    def log_metrics(self, step: int, row: dict[str, float]) -> None:
        """Take in numbers from beside the steps; any thread may call it."""
        self._write(step, row)

    def log_checkpoint(self, step: int, uri: str, parts: Sequence[Part]) -> None:
        """Take in a committed checkpoint; any thread may call it."""
        self.last_checkpoint = uri
        digests = {part.name: part.sha256 for part in parts}
        self._lineage.committed(step, uri, digests[POLICY])
        if self._tracker is not None:
            self._tracker.log_artifact(self._lineage.path)

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """MLflow's id of the run, for which MLflow must have answered."""
        return None if self._tracker is None else self._tracker.wait_for_run_id(timeout_s)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run reports as one."""
        run_id = None if self._tracker is None else self._tracker.run_id
        return {
            "before": self._before,
            "sweeps": self._sweeps,
            "groups": self._ledger.totals(),
            "num_resumes": self._num_resumes,
            "mlflow_run_id": run_id,
            "guard": self._guard.state_dict(),
            "alarms": self._alarms,
            "num_rollbacks": self.num_rollbacks,
            "lineage": self._lineage.state_dict(),
        }

    def restore(self, state: dict[str, Any], uri: str) -> None:
        """Go on from what state gave, of the checkpoint at uri; rows of later steps go."""
        sha256 = part_digests(uri)[POLICY]
        self._lineage.went_on_from(uri, state["step"], sha256, state["lineage"])
        if self._tracker is not None:
            self._tracker.set_tags({"checkpoint.resumed_from": without_credentials(uri)})
            self._tracker.log_artifact(self._lineage.path)
        is_new_process = not self._before
        self._before = state["before"]
        self._sweeps = state["sweeps"]
        self._guard = self._guard.restored(state["guard"])
        # A rollback rewinds the run, but not the memory that it happened.
        self._alarms = max(self._alarms, state["alarms"], key=len)
        self.num_rollbacks = max(self.num_rollbacks, state["num_rollbacks"])
        rewound = self._metrics.forget_after(state["step"])
        if is_new_process:
            num_steps = sum("groups/trained" in row for row in rewound)
            lost = num_steps * self.config.rollout.conditions_per_step
            self._ledger.adopt(state["groups"], lost=lost)
            self._num_resumes = state.get("num_resumes", 0) + 1
        else:
            self._ledger.trained = state["groups"]["trained"]

    def stop_if_asked(self) -> None:
        """End the run here, after a step that was saved, if a signal asked for it.

        Raises:
            Stopped: says how to go on.
        """
        if self.is_stopping:
            raise Stopped(
                f"stopped as asked; the state is saved in {self.last_checkpoint}. The same command "
                "goes on from there."
            )

    def finish(
        self,
        trained: tuple[Sweep, np.ndarray],
        *,
        policy_sha256: str,
        health: Health,
    ) -> None:
        """Take in the last evaluation; write the summary, the report and the table."""
        sweep, images = trained
        self._ledger.see(health.groups)
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
            "groups": self._ledger.totals(),
            "restarts": health.restarts | {"driver": self._num_resumes},
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
        self._tracker.log_artifact(self._lineage.path)
        if self.config.tracking.model is not None:
            self._tracker.register(candidate_of(self.folder, model=self.config.tracking.model))
        self._progress.show(summary_table(summary))
        self.note(f"report:      {report}")
        self.note(f"run folder:  {self.folder} (summary.json, config.yaml, metrics.jsonl, grids)")
        self.note(f"checkpoints: {self.checkpoint_root}")
        if command := ui_command(self._tracking_uri()):
            self.note(f"MLflow:      {command}")

    def _write(self, step: int, row: dict[str, float]) -> None:
        self._metrics.append(step, row)
        if self._tracker is not None:
            self._tracker.log_metrics(step, row)
        if self.export is not None and self._tracker is not None:
            self.export.put(step, row, num_unsent=self._tracker.num_unsent)

    def _tracking_uri(self) -> str:
        uri = self.config.tracking.uri
        if uri is not None:
            return uri
        return f"sqlite:///{self.folder.resolve().parent / 'mlflow.db'}"
