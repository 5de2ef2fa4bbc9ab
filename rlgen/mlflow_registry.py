"""A registered model of policies in MLflow, whose alias `champion` is the best judged one.

Owns what a version says of its policy, and when it becomes champion: only by a lower judge FID of
the same judge. Must not know how a policy was trained or judged.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgen.errors import CheckpointError, ConfigError
from rlgen.spool import without_password
from rlgen.storage import is_url

CHAMPION = "champion"
_ATTEMPTS = 5
_RACE_MS = 600_000
"""Who moved the alias so shortly ago may have compared with the same champion as we did."""


@dataclass(frozen=True)
class Candidate:
    """A judged policy that may become a version of a registered model."""

    model: str
    policy: str
    """Path or URL of its file."""
    step: int
    policy_sha256: str
    """Of that file."""
    judge_fid: float
    recall: float
    cfg_scale: float
    """Guidance while it was judged; 1 is none."""
    judge_sha256: str
    judge_reference_sha256: str
    num_images: int

    @property
    def judge(self) -> dict[str, str]:
        """What must be equal for two judge FIDs to be comparable."""
        return {
            "rlgen.judge_sha256": self.judge_sha256,
            "rlgen.judge_reference_sha256": self.judge_reference_sha256,
            "rlgen.num_images": str(self.num_images),
            "rlgen.cfg_scale": f"{self.cfg_scale:g}",
        }

    @property
    def tags(self) -> dict[str, str]:
        """What a version says of its policy."""
        return self.judge | {
            "rlgen.step": str(self.step),
            "rlgen.policy": without_password(self.policy),
            "rlgen.policy_sha256": self.policy_sha256,
            "rlgen.judge_fid": repr(self.judge_fid),
            "rlgen.recall": repr(self.recall),
            "rlgen.status": "candidate",
        }


def promote(client: Any, run_id: str, candidate: Candidate) -> str:
    """Register a policy, and move the alias to it if it is better than the champion.

    May be repeated: a policy that is registered already, by its digest and its judge, is compared
    again and nothing else. Of policies that are promoted at the same time the best one stays
    champion.

    Args:
        client: an MlflowClient.
        run_id: the MLflow run that trained the policy.
        candidate: the policy.
    Returns:
        one line for the user: which version it is, whether it is champion, and why.
    Raises:
        ConfigError: the champion was judged otherwise; nothing was registered.
        CheckpointError: the policy's file is gone.
        MlflowException: MLflow does not answer, or refuses.
    """
    _make_model(client, candidate.model)
    _refuse_other_judge(_champion(client, candidate.model), candidate)
    version = _registered(client, run_id, candidate)
    for _ in range(_ATTEMPTS):
        champion = _champion(client, candidate.model)
        _refuse_other_judge(champion, candidate)
        ours = f"version {version} of {candidate.model} (judge FID {candidate.judge_fid:.4g})"
        if champion is not None and str(champion.version) == version:
            return f"{ours} is the champion."
        if champion is not None and not candidate.judge_fid < _fid_of(champion):
            return (
                f"{ours} stays a candidate: the champion, version {champion.version}, has "
                f"{_fid_of(champion):.4g}."
            )
        if not math.isfinite(candidate.judge_fid):
            return f"{ours} stays a candidate: its judge FID is no number."
        _crown(client, candidate.model, version, champion)
        rival = _better_rival(client, candidate, version)
        if rival is None:
            beaten = "" if champion is None else f", before version {champion.version} with "
            return f"{ours} is the champion{beaten}{_shown_fid(champion)}."
        _crown(client, candidate.model, str(rival.version), None)
        _set_tags(client, candidate.model, version, {"rlgen.status": "candidate"})
    return (
        f"version {version} of {candidate.model} stays a candidate: others keep moving the alias."
    )


def _make_model(client: Any, model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException:
        client.get_registered_model(model)  # raises if it was not there before, either


def _champion(client: Any, model: str) -> Any | None:
    version = client.get_registered_model(model).aliases.get(CHAMPION)
    return None if version is None else client.get_model_version(model, version)


def _refuse_other_judge(champion: Any | None, candidate: Candidate) -> None:
    if champion is None:
        return
    theirs = {name: champion.tags.get(name, "unknown") for name in candidate.judge}
    if "rlgen.judge_fid" not in champion.tags or theirs != candidate.judge:
        raise ConfigError(
            f"the policy of step {candidate.step} can't be compared with the champion of "
            f"{candidate.model}: it was judged by {_told(candidate.judge)}, and version "
            f"{champion.version} by {_told(theirs)}. Promote it under another name, or remove the "
            f"alias {CHAMPION} in MLflow to begin again with this judge."
        )


def _told(judge: Mapping[str, str]) -> str:
    network, reference, num_images, cfg_scale = judge.values()
    return (
        f"judge {network[:12]} with reference {reference[:12]} on {num_images} images at guidance "
        f"{cfg_scale}"
    )


def _registered(client: Any, run_id: str, candidate: Candidate) -> str:
    """The version of this policy and judge, made if there is none."""
    twins = _twins(client, candidate)
    if not twins:
        source = _source(client, run_id, candidate)
        made = client.create_model_version(
            candidate.model, source, run_id, tags=candidate.tags, await_creation_for=None
        )
        # Another process may have registered the same policy meanwhile; the first one stays.
        twins = _twins(client, candidate) or [made]
        if str(twins[0].version) != str(made.version):
            client.delete_model_version(candidate.model, str(made.version))
    return str(twins[0].version)


def _twins(client: Any, candidate: Candidate) -> list[Any]:
    wanted = candidate.judge | {"rlgen.policy_sha256": candidate.policy_sha256}
    return [v for v in _versions(client, candidate.model) if wanted.items() <= v.tags.items()]


def _versions(client: Any, model: str) -> list[Any]:
    """All versions of a model, the oldest first."""
    found = client.search_model_versions(f"name = '{model}'")
    return sorted(found, key=lambda version: int(version.version))


def _source(client: Any, run_id: str, candidate: Candidate) -> str:
    """Where the version's file is: a URL as it is; a local file goes to the run's artifacts.

    A server takes no local path as a source, because any client could read its files by it.
    """
    if is_url(candidate.policy):
        return without_password(candidate.policy.rpartition("/")[0])
    path = Path(candidate.policy.removeprefix("file://"))
    if not path.is_file():
        raise CheckpointError(
            f"{path} is gone; promote a step whose checkpoint is still there, or keep more by "
            "checkpoint.keep."
        )
    folder = f"policy/step-{candidate.step:05d}"
    client.log_artifact(run_id, str(path), artifact_path=folder)
    return f"{client.get_run(run_id).info.artifact_uri}/{folder}"


def _crown(client: Any, model: str, version: str, before: Any | None) -> None:
    """Move the alias; the tags go first, so that whoever sees the alias sees them too."""
    now_ms = int(time.time() * 1000)
    _set_tags(client, model, version, {"rlgen.promoted_ms": str(now_ms), "rlgen.status": CHAMPION})
    _twice(client.set_registered_model_alias, model, CHAMPION, version)
    if before is not None:
        _set_tags(client, model, str(before.version), {"rlgen.status": "former champion"})


def _better_rival(client: Any, candidate: Candidate, version: str) -> Any | None:
    """The best policy of the same judge that was promoted while ours was, if it beats ours.

    MLflow can't move an alias on a condition. So everyone says first that it is promoted, moves
    the alias, and then looks for others: whoever moved it last sees all.
    """
    since_ms = int(time.time() * 1000) - _RACE_MS
    rivals = [
        other
        for other in _versions(client, candidate.model)
        if str(other.version) != version
        and candidate.judge.items() <= other.tags.items()
        and int(other.tags.get("rlgen.promoted_ms", 0)) >= since_ms
        and _fid_of(other) < candidate.judge_fid
    ]
    return min(rivals, key=_fid_of, default=None)


def _fid_of(version: Any) -> float:
    return float(version.tags["rlgen.judge_fid"])


def _shown_fid(version: Any | None) -> str:
    return "" if version is None else f"{_fid_of(version):.4g}"


def _set_tags(client: Any, model: str, version: str, tags: Mapping[str, str]) -> None:
    for name, value in tags.items():
        _twice(client.set_model_version_tag, model, version, name, value)


def _twice(write: Callable[..., Any], *words: str) -> None:
    """Write once more if it fails: MLflow lets the database refuse one of two at the same time."""
    from mlflow.exceptions import MlflowException

    try:
        write(*words)
    except MlflowException:
        time.sleep(random.uniform(0.1, 0.5))
        write(*words)
