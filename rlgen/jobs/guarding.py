"""What follows when the guard finds a rule broken: an alarm, the end, or a rollback.

Owns the reaction; the rules are evaluation/guard.py's, and the recorder has sounded the alarm.
"""

from collections.abc import Sequence

from rlgen.config.run import RunConfig
from rlgen.errors import GuardError
from rlgen.jobs.checkpoints import RunCheckpoints
from rlgen.jobs.recorder import Recorder
from rlgen.learner.checkpoint import checkpoint_uri
from rlgen.learner.runtime import Runtime


class Rollback(Exception):
    """Ends the training loop, to go on from the best checkpoint with these settings."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config.checkpoint.resume_from)
        self.config = config


def act_on(
    broken: Sequence[str],
    config: RunConfig,
    runtime: Runtime,
    recorder: Recorder,
    checkpoints: RunCheckpoints,
    step: int,
) -> None:
    """Do what the configuration says about broken rules; nothing if there are none.

    Raises:
        GuardError: the run is over; its state is saved.
        Rollback: go on from the best checkpoint.
    """
    if not broken or config.guard.action == "alarm":
        return
    best = checkpoints.committed(recorder.best_checkpoint)
    is_spent = recorder.num_rollbacks >= config.guard.max_rollbacks
    if config.guard.action == "rollback" and best is not None and not is_spent:
        lr = config.learner.lr * config.guard.rollback_lr_factor
        recorder.note(f"rolling back to {best} with learner.lr = {lr:g}")
        checkpoints.forget_after(best)
        raise Rollback(config.with_values({"checkpoint.resume_from": best, "learner.lr": lr}))
    checkpoints.save(config, runtime, step, must_commit=True)
    rolled = f" after {recorder.num_rollbacks} rollbacks" if is_spent else ""
    raise GuardError(
        f"the guard ended the run at step {step}{rolled}: {'; '.join(broken)}. The best judge FID "
        f"was at step {recorder.best_step}; the last state is "
        f"{checkpoint_uri(recorder.checkpoint_root, step)}. Look at the grids and at the weights "
        "of the rewards; guard.action=alarm goes on regardless."
    )


def keep_best(
    config: RunConfig,
    runtime: Runtime,
    recorder: Recorder,
    checkpoints: RunCheckpoints,
    step: int,
) -> None:
    """Save the policy that was judged best, if a rollback may want it."""
    is_saved_anyway = step % config.checkpoint.every_steps == 0
    if config.guard.action == "rollback" and recorder.best_step == step and not is_saved_anyway:
        checkpoints.save(config, runtime, step)
