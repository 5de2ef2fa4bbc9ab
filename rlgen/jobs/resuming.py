"""Where a run goes on: after an interruption, and after the loss of a role.

Owns the choice of the checkpoint and the patience with losses; what a checkpoint holds is in
checkpoints.py.
"""

from rlgen.config.identity import resume_key
from rlgen.config.run import RunConfig
from rlgen.errors import RoleLost
from rlgen.jobs.checkpoints import resumed_config
from rlgen.jobs.recorder import Recorder
from rlgen.learner.checkpoint import newest_checkpoint


def resumed(config: RunConfig, asked: RunConfig, recorder: Recorder) -> RunConfig:
    """The configuration with the run's newest checkpoint, if it has one and may use it.

    Args:
        config: with real paths in place of `embedded`.
        asked: as the user gave it, by which the run is known on any machine.
        recorder: knows where checkpoints are.
    """
    if config.checkpoint.resume_from is not None or config.checkpoint.resume == "never":
        return config
    newest = newest_checkpoint(recorder.checkpoint_root, resume_key=resume_key(asked))
    if newest is None:
        return config
    recorder.note(f"going on from {newest}; checkpoint.resume=never starts anew")
    return resumed_config(config, newest)


def after_loss(loss: RoleLost, config: RunConfig, recorder: Recorder) -> RunConfig:
    """The configuration to go on with after a role was lost.

    Raises:
        RoleLost: it has happened too often without a finished step in between.
    """
    recorder.note_loss()
    if recorder.num_losses > config.cluster.max_restarts:
        raise RoleLost(
            f"{loss} This was loss {recorder.num_losses} without a finished step in between, and "
            f"cluster.max_restarts = {config.cluster.max_restarts}. The last checkpoint is "
            f"{recorder.last_checkpoint or 'none'}; the same command goes on from it."
        ) from loss
    newest = recorder.last_checkpoint or config.checkpoint.resume_from
    recorder.note(f"{loss} Going on from {newest or 'the start'}.")
    return config.with_values({"checkpoint.resume_from": newest})
