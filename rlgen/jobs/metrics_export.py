"""The run's numbers for Prometheus, by way of Ray's metrics.

Owns the names under which the recorder's numbers are exported; it measures nothing. Ray's agent on
the driver's node serves them with the prefix `ray_`, next to Ray's own. A thread of its own hands
them over, so that nothing that goes wrong here touches a step, and repeats them: Ray drops a gauge
that is not set for a while. Tags have few values: the run's name, and a role, a scorer or a part of
the step.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from rlgen.config.run import RunConfig
from rlgen.errors import Stopped

if TYPE_CHECKING:
    from rlgen.jobs.recorder import Recorder

_GOODBYE_S = 2.0
_REPEAT_S = 1.0
"""Ray forgets a gauge after two of its report intervals, which are 1 s at least."""
_log = logging.getLogger(__name__)
ROLES = ("rollout", "reward", "moment_store", "learner")
RUN_TAG = "run"


@dataclass(frozen=True)
class Export:
    """One metric of Prometheus."""

    name: str
    """A counter's ends in _total."""
    source: str
    """Key in the recorder's rows; its * stands for the value of the tag."""
    help: str
    tag: str = ""
    factor: float = 1.0

    @property
    def is_total(self) -> bool:
        """Whether it is a counter; the row has its running total."""
        return self.name.endswith("_total")


EXPORTS = (
    Export("rlgen_run_active", "run/active", "1 during the run, 0 once it has ended as it should."),
    Export("rlgen_step", "run/step", "Steps that the policy has learnt from."),
    Export(
        "rlgen_last_step_timestamp_seconds",
        "run/last_step",
        "When the last step was finished, or the run was started.",
    ),
    Export("rlgen_step_seconds", "time/step_s", "Duration of the last step."),
    Export("rlgen_part_seconds", "time/*_s", "Duration of the parts of the last step.", "part"),
    Export("rlgen_images_total", "run/images", "Images sampled for training."),
    Export("rlgen_reward_mean", "reward/*", "Mean reward of the last step.", "scorer"),
    Export("rlgen_judge_fid", "judge/fid", "Judge FID of the last evaluation."),
    Export("rlgen_judge_precision_ratio", "judge/precision", "Judge's precision."),
    Export("rlgen_judge_recall_ratio", "judge/recall", "Judge's recall."),
    Export("rlgen_guard_broken_rules", "guard/broken_rules", "Rules of the guard broken now."),
    Export("rlgen_entropy_ratio", "policy/entropy_normalized", "Entropy over ln(codebook size)."),
    Export("rlgen_entropy_coefficient", "policy/entropy_coef", "Weight of the entropy bonus."),
    Export("rlgen_kl_nats", "loss/kl", "KL to the reference policy."),
    Export("rlgen_gradient_norm", "policy/grad_norm", "Norm of the gradient before clipping."),
    Export("rlgen_clipped_ratio", "policy/ratio_clipped_frac", "Share of clipped tokens."),
    Export("rlgen_ratio_deviation", "policy/ratio_max_deviation", "Largest |ratio - 1|."),
    Export("rlgen_policy_lag_steps", "policy/lag_steps", "Age of the sampling policy."),
    Export("rlgen_groups_generated_total", "groups/generated", "Groups sampled for training."),
    Export("rlgen_groups_dropped_total", "groups/dropped", "Groups that were not learnt from."),
    Export("rlgen_groups_in_flight", "groups/in_flight", "Groups being sampled or scored."),
    Export(
        "rlgen_groups_unaccounted",
        "groups/unaccounted",
        "Generated less trained, dropped and in flight.",
    ),
    Export("rlgen_workers", "workers/*", "Workers that are up.", "role"),
    Export("rlgen_workers_wanted", "wanted/*", "Workers that are configured.", "role"),
    Export("rlgen_restarts_total", "restarts/*", "Processes replaced.", "role"),
    Export("rlgen_recovery_seconds", "recovery/*_s", "Duration of the last recovery.", "role"),
    Export("rlgen_lost_roles_total", "run/losses", "Losses that sent the run to a checkpoint."),
    Export(
        "rlgen_last_checkpoint_timestamp_seconds",
        "checkpoint/last",
        "When the last checkpoint was committed, or the run was started.",
    ),
    Export("rlgen_checkpoint_seconds", "checkpoint/seconds", "Duration of the last checkpoint."),
    Export(
        "rlgen_checkpoint_bytes", "checkpoint/gib", "Size of the last checkpoint.", factor=2.0**30
    ),
    Export("rlgen_checkpoint_failures_total", "checkpoint/failed", "Checkpoints not written."),
    Export("rlgen_checkpoint_skips_total", "checkpoint/skipped", "Checkpoints left out."),
    Export("rlgen_unsent_records", "tracking/unsent", "Records that wait for MLflow."),
)


@contextmanager
def exported(config: RunConfig, recorder: "Recorder") -> Iterator[None]:
    """While this context is open, export what the recorder takes in; not without Ray.

    A run that ends with an error stays marked as active: nobody should think that it is finished.
    """
    if config.runtime == "local":
        yield
        return
    recorder.export = export = MetricsExport(config, run=recorder.folder.name)
    try:
        yield
        export.end()
    except Stopped:
        export.end()
        raise
    finally:
        recorder.export = None
        export.close()


class MetricsExport:
    """Takes rows at once and hands them to Ray from a daemon thread."""

    def __init__(self, config: RunConfig, *, run: str) -> None:
        """Start the thread; Ray must be connected.

        Args:
            config: the run.
            run: its name, a tag of every metric.
        """
        self._run = run
        self._group_size = config.rollout.group_size
        self._num_losses = 0
        self._rows: SimpleQueue[dict[str, float] | None] = SimpleQueue()
        self._totals: dict[tuple[str, str], float] = {}
        self._gauges: dict[tuple[Export, str], float] = {}
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._rows.put(_first_row(config))
        self._thread.start()

    def put(self, step: int, row: Mapping[str, float], *, num_unsent: int) -> None:
        """Take the numbers of a row; returns at once."""
        numbers = {**row, "tracking/unsent": float(num_unsent)}
        if "time/step_s" in row:
            numbers |= {"run/step": float(step), "run/last_step": time.time()}
        if "groups/generated" in row:
            numbers["run/images"] = row["groups/generated"] * self._group_size
        if "checkpoint/seconds" in row:
            numbers["checkpoint/last"] = time.time()
        self._rows.put(numbers)

    def add_loss(self) -> None:
        """Count a role whose loss sent the run back to a checkpoint."""
        self._num_losses += 1
        self._rows.put({"run/losses": float(self._num_losses)})

    def end(self) -> None:
        """Say that the run ends as it should."""
        self._rows.put({"run/active": 0.0})

    def close(self) -> None:
        """Hand over what is left."""
        self._rows.put(None)
        self._thread.join(_GOODBYE_S)

    def _work(self) -> None:
        while True:
            try:
                row = self._rows.get(timeout=_REPEAT_S)
            except Empty:
                row = {}
            if row is None:
                return
            try:
                self._take(row)
                self._repeat()
            except Exception as error:
                # The thread's boundary: whatever Ray raises must not reach the training.
                if not self._has_failed:
                    _log.warning("metrics are not exported: %s: %s", type(error).__name__, error)
                self._has_failed = True

    def _take(self, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            found = match(key)
            if found is None:
                continue
            export, tag = found
            value = float(value) * export.factor
            if not export.is_total:
                self._gauges[export, tag] = value
                continue
            before = self._totals.get((export.name, tag))
            self._totals[export.name, tag] = value
            if before is None or value > before:
                # Not inc, which refuses 0: a counter that begins at 1 shows no increase.
                _metric(export)._record(value - (before or 0.0), self._tags(export, tag))

    def _repeat(self) -> None:
        for (export, tag), value in self._gauges.items():
            _metric(export).set(value, self._tags(export, tag))

    def _tags(self, export: Export, tag: str) -> dict[str, str]:
        return {RUN_TAG: self._run} | ({export.tag: tag} if export.tag else {})


def match(key: str) -> tuple[Export, str] | None:
    """The metric that a key of the recorder's rows goes to, and the value of its tag, if any."""
    for export in EXPORTS:
        prefix, star, suffix = export.source.partition("*")
        if not star and key == prefix:
            return export, ""
        if star and key.startswith(prefix) and key.endswith(suffix):
            return export, key.removeprefix(prefix).removesuffix(suffix)
    return None


def _first_row(config: RunConfig) -> dict[str, float]:
    """What holds before the first step: totals are 0, and time runs from now."""
    zeros = {export.source: 0.0 for export in EXPORTS if export.is_total and not export.tag}
    zeros |= {f"restarts/{role}": 0.0 for role in ROLES}
    return zeros | {
        "run/active": 1.0,
        "run/step": 0.0,
        "run/last_step": time.time(),
        "checkpoint/last": time.time(),
        "guard/broken_rules": 0.0,
        "tracking/unsent": 0.0,
        "wanted/rollout": float(config.rollout.num_workers),
        "wanted/reward": float(config.reward.num_workers),
    }


_metrics: dict[str, Any] = {}


def _metric(export: Export) -> Any:
    """Ray's object for a metric, made once in a process, by the exporting thread."""
    if export.name not in _metrics:
        from ray.util.metrics import Counter, Gauge  # seconds, which a run without Ray must not pay

        kind = Counter if export.is_total else Gauge
        tag_keys = (RUN_TAG, export.tag) if export.tag else (RUN_TAG,)
        _metrics[export.name] = kind(export.name, export.help, tag_keys)
    return _metrics[export.name]
