"""Which checkpoints a run made, what each came from, and how it was judged.

Owns `checkpoints.json` of the run folder, which also goes to MLflow, and the candidate for the
model registry that is made of it. Must not know when checkpoints are written.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError
from rlgen.evaluation.finished import digest_of
from rlgen.evaluation.judge import Quality
from rlgen.learner.state_io import POLICY
from rlgen.mlflow_registry import Candidate
from rlgen.storage import join, without_credentials, write_bytes

LINEAGE_NAME = "checkpoints.json"
_UNGUIDED = 1.0


@dataclass(frozen=True)
class Judge:
    """What judge FIDs depend on beside the policy."""

    judge_sha256: str
    judge_reference_sha256: str
    num_images: int

    @classmethod
    def of(cls, config: RunConfig) -> "Judge":
        """Digests of local files; what lies at a URL is known by its address."""
        evaluation = config.evaluation
        return cls(
            digest_of(evaluation.judge),
            digest_of(evaluation.judge_reference),
            evaluation.num_images,
        )


class Lineage:
    """The list of a run's checkpoints; any thread may add to it."""

    def __init__(self, folder: Path) -> None:
        """Begin; nothing is written yet."""
        self.path = folder / LINEAGE_NAME
        self._lock = threading.Lock()
        self._entries: list[dict[str, Any]] = []
        self._judged: dict[int, dict[str, float]] = {}
        self._judge: dict[str, Any] = {}

    def judged_by(self, config: RunConfig) -> None:
        """Note who judges this run."""
        self._judge = vars(Judge.of(config))

    def judged(self, step: int, quality: Quality) -> None:
        """Note an evaluation without guidance, before or after the step's checkpoint."""
        with self._lock:
            self._judged[step] = {"judge_fid": quality.judge_fid, "recall": quality.recall}
            if any(entry["step"] == step for entry in self._entries):
                self._write()

    def committed(self, step: int, uri: str, policy_sha256: str) -> None:
        """Add a checkpoint."""
        with self._lock:
            self._add(step, uri, policy_sha256)
            self._write()

    def went_on_from(
        self, uri: str, step: int, policy_sha256: str, state: Mapping[str, Any]
    ) -> None:
        """Go back to a checkpoint; what came after it there is no part of this run any more.

        Args:
            uri: the checkpoint.
            step: its step.
            policy_sha256: of its policy's file.
            state: what `state_dict` gave when it was made, where it is not in the list itself.
        """
        with self._lock:
            self._entries = [dict(entry) for entry in state["checkpoints"]]
            self._judged = {int(at): found for at, found in state["judged"].items()}
            self._add(step, uri, policy_sha256)
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold so that the list goes on elsewhere."""
        with self._lock:
            return {
                "checkpoints": [dict(entry) for entry in self._entries],
                "judged": {str(step): found for step, found in self._judged.items()},
            }

    def _add(self, step: int, uri: str, policy_sha256: str) -> None:
        shown = without_credentials(uri)
        # A step may be saved twice, such as by the guard and because it is due.
        self._entries = [entry for entry in self._entries if entry["uri"] != shown]
        self._entries.append(
            {
                "step": step,
                "uri": shown,
                "policy_sha256": policy_sha256,
                "came_from": self._entries[-1]["uri"] if self._entries else None,
            }
        )

    def _write(self) -> None:
        for entry in self._entries:
            entry |= self._judged.get(entry["step"], {})
        content = {"judge": self._judge, "checkpoints": self._entries}
        write_bytes(str(self.path), (json.dumps(content, indent=1) + "\n").encode())


def read_lineage(folder: Path) -> dict[str, Any]:
    """Read a run folder's list.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / LINEAGE_NAME
    try:
        found = json.loads(path.read_text())
        if not {"judge", "checkpoints"} <= found.keys():
            raise ValueError("it lists no checkpoints")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} can't be read ({error}); name the folder of a run that wrote checkpoints."
        ) from None
    return found


def candidate_of(folder: Path, *, model: str, step: int | None = None) -> Candidate:
    """The policy of a run's checkpoint, as the registry wants it.

    Args:
        folder: the run folder.
        model: name of the registered model.
        step: of the checkpoint; None takes the last.
    Raises:
        ConfigError: there is no such checkpoint, or it was not judged; names those that were.
    """
    lineage = read_lineage(folder)
    judged = {e["step"]: e for e in lineage["checkpoints"] if "judge_fid" in e}
    steps = [entry["step"] for entry in lineage["checkpoints"]]
    wanted = step if step is not None else max(steps, default=0)
    if wanted not in judged:
        raise ConfigError(
            f"{folder} has no judged checkpoint of step {wanted} (judged are "
            f"{', '.join(map(str, judged)) or 'none'}); finish the run, or name one by --step."
        )
    return _candidate(judged[wanted], lineage["judge"], model)


def _candidate(entry: Mapping[str, Any], judge: Mapping[str, Any], model: str) -> Candidate:
    return Candidate(
        model=model,
        policy=join(entry["uri"], POLICY),
        step=entry["step"],
        policy_sha256=entry["policy_sha256"],
        judge_fid=entry["judge_fid"],
        recall=entry["recall"],
        cfg_scale=_UNGUIDED,
        **judge,
    )
