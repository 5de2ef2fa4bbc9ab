"""Saving and restoring a whole run: the learner's parts, the moments, and the driver's record.

The driver commits: each role writes its own parts, the marker comes last.
"""

from typing import TYPE_CHECKING

from rlgen.config.load import dump_yaml
from rlgen.config.run import RunConfig
from rlgen.learner.checkpoint import (
    checkpoint_uri,
    commit_checkpoint,
    prune_checkpoints,
    read_meta,
    read_part,
    write_parts,
)
from rlgen.learner.preflight import resume_key
from rlgen.learner.runtime import Runtime
from rlgen.learner.state_io import MOMENTS, dump_state, parse_state

if TYPE_CHECKING:
    from rlgen.jobs.recorder import Recorder


def save_run(config: RunConfig, runtime: Runtime, recorder: "Recorder", step: int) -> None:
    """Write and commit the checkpoint after `step` updates, then delete old ones."""
    root = recorder.checkpoint_root
    uri = checkpoint_uri(root, step)
    parts = runtime.save_learner(uri)
    moments = dump_state(runtime.moment_state())
    settings = dump_yaml(config).encode()
    own = {MOMENTS: lambda: moments, "config.yaml": lambda: settings}
    parts += write_parts(uri, own, config.checkpoint)
    meta = {"step": step, "resume_key": resume_key(config), **recorder.state()}
    commit_checkpoint(uri, parts, meta=meta)
    prune_checkpoints(root, keep=config.checkpoint.keep, protected=(uri, recorder.best_checkpoint))


def restore_run(config: RunConfig, runtime: Runtime, recorder: "Recorder") -> int:
    """Rewind store and record to the checkpoint that the learner started from.

    Returns:
        the step to go on with.
    """
    uri = config.checkpoint.resume_from
    assert uri is not None, "only called to resume"
    meta = read_meta(uri)
    runtime.restore_moments(parse_state(read_part(uri, MOMENTS), uri))
    recorder.restore(meta)
    return int(meta["step"])
