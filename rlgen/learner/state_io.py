"""Learner and store state as checkpoint parts.

Owns which files these roles write and how they come back. Tensors travel as torch files that
are only ever loaded with weights_only=True.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from rlgen.config.run import CheckpointConfig
from rlgen.errors import CheckpointError, StorageError
from rlgen.learner.checkpoint import Part, read_part, write_parts
from rlgen.learner.learner import Learner
from rlgen.policies.load import policy_bytes
from rlgen.storage import in_background, without_credentials

POLICY = "policy.safetensors"
LEARNER = "learner.pt"
MOMENTS = "moments.pt"

SaveOutcome = list[Part] | StorageError
"""The learner's parts of a checkpoint, or why they could not be written."""


class LearnerSaver:
    """Writes the learner's parts of a checkpoint from a thread, while the learner goes on.

    At most one write is in flight, so that at most one copy of the weights is held.
    """

    def __init__(self, tell: Callable[[str, SaveOutcome], None]) -> None:
        """Write nothing yet.

        Args:
            tell: called with the URI and what became of it, by the thread.
        """
        self._tell = tell
        self._uri = ""
        self._writing: Future[None] | None = None

    def start(self, learner: Learner, uri: str, *, is_writer: bool = True) -> None:
        """Copy the state to host memory, and begin to write it.

        Args:
            learner: every rank's, because shards are gathered.
            uri: the checkpoint's folder.
            is_writer: True on rank 0 alone.
        """
        is_busy = self._writing is not None and not self._writing.done()
        # Even if nothing will be written: the other ranks wait for this one's shards.
        parts = snapshot_learner(learner, is_kept=is_writer and not is_busy)
        if is_busy:
            reason = f"{without_credentials(self._uri)} is still being written."
            self._tell(uri, StorageError(reason))
        elif is_writer:
            settings = learner.config.checkpoint
            self._uri = uri
            self._writing = in_background(
                lambda: self._write(uri, parts, settings), name="checkpoint-learner"
            )

    def _write(
        self, uri: str, parts: Mapping[str, Callable[[], bytes]], settings: CheckpointConfig
    ) -> None:
        try:
            outcome: SaveOutcome = write_parts(uri, parts, settings)
        except StorageError as error:
            outcome = error
        except Exception as error:  # the thread's boundary: the driver waits for an outcome
            outcome = StorageError(f"the learner's state can't be serialised ({error!r}).")
        self._tell(uri, outcome)


def snapshot_learner(learner: Learner, *, is_kept: bool = True) -> dict[str, Callable[[], bytes]]:
    """Copy the learner to host memory: by file name, what serialises that file.

    The policy file is a base for another run.

    Args:
        learner: every rank's, because shards are gathered.
        is_kept: False gathers only.
    """
    policy, weights, state = learner.policy, learner.policy_state(), learner.state_dict()
    if not is_kept:
        return {}
    weights, state = copy_to_host(weights), copy_to_host(state)
    return {
        POLICY: lambda: policy_bytes(policy, weights),
        LEARNER: lambda: dump_state(state),
    }


def copy_to_host(state: Any) -> Any:
    """Copy nested dicts, lists and tuples; tensors come to the CPU and share nothing."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: copy_to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(copy_to_host(value) for value in state)
    return state


def restore_learner(learner: Learner, uri: str) -> None:
    """Load what a snapshot of the learner holds.

    Raises:
        CheckpointError: not committed, damaged, or of another model or configuration.
    """
    if learner.config.learner.lora is None:  # else the base's file and the adapters make it up
        learner.load_policy_state(load(read_part(uri, POLICY)), uri)
    learner.load_state_dict(parse_state(read_part(uri, LEARNER), uri))


def dump_state(state: Mapping[str, Any]) -> bytes:
    """Tensors and plain values as the bytes of a torch file."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def parse_state(payload: bytes, source: str) -> dict[str, Any]:
    """Read what dump_state wrote.

    Raises:
        CheckpointError: it holds something else; nothing in it is ever executed.
    """
    try:
        return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{source} holds no readable state ({error}).") from None
