"""Saving and restoring a whole run: the learner's parts, the moments, and the driver's record.

Owns when a checkpoint is written, by which thread, and what follows when it can't be. The training
waits for a copy of the state only; parts are written beside it, each by the role that owns them,
and the driver commits when all are there.
"""

import json
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlgen.config.identity import resume_key
from rlgen.config.load import dump_yaml
from rlgen.config.run import RunConfig
from rlgen.errors import CheckpointError, RoleLost, StorageError
from rlgen.learner.checkpoint import (
    MARKER,
    Part,
    checkpoint_uri,
    commit_checkpoint,
    committed_checkpoints,
    discard_checkpoint,
    discard_uncommitted,
    prune_checkpoints,
    read_meta,
    read_part,
    refuse_other_runs,
    write_parts,
)
from rlgen.learner.ownership import RootClaim
from rlgen.learner.runtime import Runtime
from rlgen.learner.state_io import MOMENTS, dump_state, parse_state
from rlgen.storage import in_background, join, remove, without_credentials

if TYPE_CHECKING:
    from rlgen.jobs.recorder import Recorder

CONFIG = "config.yaml"
_POLL_S = 0.05
_RUN_ID_S = 2.0
_PATIENCE_S = 3.0
"""How long a periodic checkpoint waits for the one before; short runs write many small ones."""


@dataclass
class _Save:
    """A checkpoint that is being written."""

    step: int
    uri: str
    meta: dict[str, Any]
    protected: tuple[str | None, ...]
    deadline: float
    began: float = field(default_factory=time.monotonic)
    pause_s: float = 0.0
    outcome: "Future[Exception | None]" = field(default_factory=Future)
    """Why it failed, if it did."""
    is_given_up: bool = False
    """Must not be committed any more."""


class RunCheckpoints:
    """Writes the checkpoints of one run, as a context that holds the claim on their root.

    One checkpoint is in flight at most. A periodic one that comes due meanwhile waits for seconds,
    and is then skipped and counted, so slow storage makes checkpoints rarer and hardly holds up
    the training; one that the run relies on waits. Failures are counted, and told once until a
    checkpoint succeeds.
    """

    def __init__(self, config: RunConfig, recorder: "Recorder") -> None:
        """Touch nothing yet.

        Args:
            config: what the user asked for, which tells this run from others on any machine: with
                the word `embedded`, and as it was before any rollback.
            recorder: has the root and the run's record, and takes metrics and notes.
        """
        self._asked = config
        self._root = recorder.checkpoint_root
        self._recorder = recorder
        self._settings = config.checkpoint
        self._claim = RootClaim(self._root)
        self._in_flight: _Save | None = None
        self._num_failed = self._num_skipped = 0
        self._is_out = False
        self._litter: set[str] = set()
        """Of checkpoints that failed: what could not be deleted, or was written afterwards."""

    def __enter__(self) -> Self:
        """Claim the root, and delete what was left there uncommitted.

        Raises:
            CheckpointError: a run that is alive holds it, or another run's checkpoints are there.
        """
        refuse_other_runs(self._root, resume_key=resume_key(self._asked))
        self._claim.__enter__()
        try:
            discard_uncommitted(self._root)
        except BaseException:
            self._claim.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._claim.__exit__(kind, error, trace)

    def save(
        self, config: RunConfig, runtime: Runtime, step: int, *, must_commit: bool = False
    ) -> None:
        """Take the state after `step` updates, and begin to write it.

        Args:
            config: the settings in force.
            runtime: the roles.
            step: updates so far.
            must_commit: wait until the checkpoint is committed.
        Raises:
            CheckpointError: another run has taken the root; or it must commit, and can't.
        """
        due = time.monotonic()
        is_relied_on = must_commit or config.guard.action == "rollback"
        self.settle(timeout_s=self._settings.timeout_s if is_relied_on else _PATIENCE_S)
        if self._in_flight is not None:
            self._num_skipped += 1
            self._recorder.log_metrics(step, {"checkpoint/skipped": float(self._num_skipped)})
            return
        self._begin(config, runtime, step, due)
        if not must_commit:
            return
        failure = self.settle(timeout_s=self._settings.timeout_s)
        if failure is not None:
            newest = self._recorder.last_checkpoint or config.checkpoint.resume_from or "the start"
            raise CheckpointError(
                f"the checkpoint of step {step} can't be committed: {failure} Once that is "
                f"repaired, the same command goes on from {without_credentials(newest)}."
            )

    def settle(self, *, timeout_s: float) -> Exception | None:
        """Wait for the checkpoint in flight.

        Returns:
            why it failed; None if there is none, it is committed, or not over within timeout_s.
        Raises:
            CheckpointError: another run has taken the root.
        """
        save = self._in_flight
        if save is None:
            return None
        left_s = save.deadline - time.monotonic()
        try:
            failure = save.outcome.result(max(0.0, min(timeout_s, left_s)))
        except TimeoutError:
            if time.monotonic() < save.deadline:
                return None
            save.is_given_up = True
            failure = StorageError(
                f"{without_credentials(save.uri)} was not written within checkpoint.timeout_s = "
                f"{self._settings.timeout_s:g} s."
            )
            self._count_failure(save.step, failure)
        finally:
            if save.is_given_up or save.outcome.done():
                self._in_flight = None
        return failure

    def let_go(self, *, timeout_s: float) -> None:
        """Wait for the checkpoint in flight, and if it takes too long give up on it.

        For the loss of a role and the end of a run; nothing is written or committed afterwards.
        """
        with suppress(CheckpointError):  # whoever has taken the root is told of at the next save
            self.settle(timeout_s=timeout_s)
        if self._in_flight is not None:
            self._in_flight.is_given_up = True
            self._in_flight = None

    def committed(self, uri: str | None) -> str | None:
        """The same URI if there is a checkpoint to go back to, when the one in flight is over."""
        self.settle(timeout_s=self._settings.timeout_s)
        return uri if uri in committed_checkpoints(self._root) else None

    def forget_after(self, uri: str) -> None:
        """Delete checkpoints newer than this one: the run goes on from it another way."""
        committed = committed_checkpoints(self._root)
        for newer in committed[committed.index(uri) + 1 :]:
            discard_checkpoint(newer)
        self._recorder.last_checkpoint = uri

    def _begin(self, config: RunConfig, runtime: Runtime, step: int, due: float) -> None:
        """Copy the state and start the thread."""
        uri = checkpoint_uri(self._root, step)
        save = _Save(
            step,
            uri,
            meta=self._meta(config, step),
            protected=(uri, self._recorder.best_checkpoint),
            deadline=time.monotonic() + self._settings.timeout_s,
        )
        runtime.save_learner(uri)
        own = {MOMENTS: dump_state(runtime.moment_state()), CONFIG: dump_yaml(config).encode()}
        save.pause_s = time.monotonic() - due
        save.outcome = in_background(lambda: self._write(save, runtime, own), name="checkpoint")
        self._in_flight = save

    def _meta(self, config: RunConfig, step: int) -> dict[str, Any]:
        changed = {}
        if config.learner.lr != self._asked.learner.lr:  # by a rollback
            changed["learner.lr"] = config.learner.lr
        meta = {
            "step": step,
            "resume_key": resume_key(config),
            "run_key": resume_key(self._asked),
            "changed": changed,
            "owner": self._claim.token,
            **self._recorder.state(),
        }
        return json.loads(json.dumps(meta))  # the recorder's own dictionaries change meanwhile

    def _write(self, save: _Save, runtime: Runtime, own: dict[str, bytes]) -> Exception | None:
        """Write, commit, prune: the thread's work. Returns why it failed.

        Raises:
            CheckpointError: another run has taken the root.
        """
        try:
            makers = {name: (lambda payload=payload: payload) for name, payload in own.items()}
            parts = write_parts(save.uri, makers, self._settings)
            parts += _learner_parts(runtime, save)
            self._commit(save, parts)
        except (StorageError, RoleLost) as error:
            self._litter.add(save.uri)
            if save.is_given_up:
                return error
            with suppress(StorageError):
                discard_checkpoint(save.uri)
            return self._count_failure(save.step, error)
        self._note_success(save, parts)
        try:
            prune_checkpoints(self._root, keep=self._settings.keep, protected=save.protected)
            self._clear_litter()
        except StorageError as error:
            self._recorder.note(f"old checkpoints stay: {error}")
        return None

    def _clear_litter(self) -> None:
        """Delete what failed; the learner writes one checkpoint at a time, so it is through."""
        if self._litter:
            committed = committed_checkpoints(self._root)
            for uri in sorted(self._litter.difference(committed)):
                discard_checkpoint(uri)
            self._litter.clear()

    def _commit(self, save: _Save, parts: list[Part]) -> None:
        if save.meta["mlflow_run_id"] is None:
            save.meta["mlflow_run_id"] = self._recorder.wait_for_run_id(_RUN_ID_S)
        self._claim.check()
        if save.is_given_up:
            raise StorageError(f"{without_credentials(save.uri)} was given up.")
        commit_checkpoint(save.uri, parts, meta=save.meta, settings=self._settings)
        try:
            self._claim.check()
        except CheckpointError:
            # Taken in the moment between: only one of the two may have committed.
            if read_meta(save.uri).get("owner") == self._claim.token:
                remove(join(save.uri, MARKER))
            raise

    def _note_success(self, save: _Save, parts: list[Part]) -> None:
        self._recorder.log_checkpoint(save.step, save.uri, parts)
        if self._is_out:
            self._recorder.note(f"checkpoints are written again: step {save.step}")
        self._is_out = False
        self._recorder.log_metrics(
            save.step,
            {
                "checkpoint/pause_s": save.pause_s,
                "checkpoint/seconds": time.monotonic() - save.began,
                "checkpoint/gib": sum(part.num_bytes for part in parts) / 2**30,
                "checkpoint/retries": float(sum(part.num_retries for part in parts)),
                "checkpoint/failed": float(self._num_failed),
            },
        )

    def _count_failure(self, step: int, error: Exception) -> Exception:
        self._num_failed += 1
        self._recorder.log_metrics(step, {"checkpoint/failed": float(self._num_failed)})
        if not self._is_out:
            self._recorder.note(
                f"the checkpoint of step {step} could not be written, training goes on: {error}"
            )
        self._is_out = True
        return error


def _learner_parts(runtime: Runtime, save: _Save) -> list[Part]:
    while (parts := runtime.learner_saved(save.uri)) is None:
        if save.is_given_up or time.monotonic() > save.deadline:
            raise StorageError(
                f"the learner did not write its parts of {without_credentials(save.uri)} within "
                "checkpoint.timeout_s."
            )
        time.sleep(_POLL_S)
    return parts


def restore_run(config: RunConfig, runtime: Runtime, recorder: "Recorder") -> int:
    """Rewind store and record to the checkpoint that the learner started from.

    Returns:
        the step to go on with.
    """
    uri = config.checkpoint.resume_from
    assert uri is not None, "only called to resume"
    meta = read_meta(uri)
    runtime.restore_moments(parse_state(read_part(uri, MOMENTS), uri))
    recorder.restore(meta, uri)
    return int(meta["step"])


def resumed_config(config: RunConfig, uri: str) -> RunConfig:
    """The settings to go on with from a checkpoint: what a rollback changed stays changed."""
    changed = read_meta(uri).get("changed", {})
    return config.with_values({"checkpoint.resume_from": uri, **changed})
