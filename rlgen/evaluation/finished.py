"""Finished units of an evaluation on disk, so that a restart samples only what is missing.

Owns the folder `units/scale-1.5/images-0000000-0000249.npz`, and the key that says what the units
depend on. Must not know how they are made or measured.

Shapes: B images of a unit, F features, C classes, S spatial features.
"""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlgen.config.plan import named_files
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError, StorageError
from rlgen.storage import atomic_path, cached_file, is_url, sha256_hex, without_credentials
from rlgen.types import ScoredRollout, WorkUnit

KEY_NAME = "key.json"
_FORMAT = 2
"""Of the units' files."""
_DECISIVE = (
    "policy.",
    "tokenizer.",
    "class_names",
    "reward.scorers.",
    "reward.loo_fid.extractor",
    "evaluation.judge",
    "evaluation.seed",
    "rollout.temperature",
    "rollout.top_",
    "rollout.cfg_interval",
    "rollout.dtype",
)
_INDIFFERENT = (".weight", ".sha256", ".judge_reference")
_LONG_VALUE = 200
_OPTIONAL = ("judge_logits", "judge_spatial", "judge_hits", "features")


@dataclass(frozen=True)
class JudgedUnit:
    """What is measured of one unit of images."""

    judge_features_BF: np.ndarray
    """float32, in the judge's space."""
    judge_logits_BC: np.ndarray | None
    """float32; None if the judge has no classes."""
    judge_spatial_BS: np.ndarray | None
    """float32; None if the judge has no spatial features."""
    judge_hits_B: np.ndarray | None
    """bool; None if the judge does not know the images' classes."""
    features_BF: np.ndarray | None
    """float32, in the reward extractor's space; None if there is no extractor."""
    rewards: dict[str, np.ndarray]
    """Per scorer float32 [B]."""
    sampling_s: float

    @classmethod
    def of(cls, scored: ScoredRollout) -> Self:
        """Take over what a reward worker found of a detailed evaluation unit."""
        assert scored.judge_features_BF is not None, "evaluation units are judged"
        return cls(
            judge_features_BF=scored.judge_features_BF,
            judge_logits_BC=scored.judge_logits_BC,
            judge_spatial_BS=scored.judge_spatial_BS,
            judge_hits_B=scored.judge_hits_B,
            features_BF=scored.features_BF,
            rewards=scored.rewards,
            sampling_s=scored.rollout.sampling_s,
        )


class FinishedUnits:
    """The units of one evaluation that are done."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """Make the folder, or go on in it.

        Raises:
            ConfigError: the folder holds units that depend on other settings; names them.
            StorageError: it can't be written, or its key can't be read.
        """
        self._folder = folder / "units"
        path = self._folder / KEY_NAME
        if path.exists():
            self._compare(path, key)
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                partial.write_text(json.dumps(dict(key), indent=1))
        except OSError as error:
            raise StorageError(f"{path} can't be written ({error}); check --output.") from error

    def has(self, unit: WorkUnit) -> bool:
        """Whether the unit is done."""
        return self._path(unit).exists()

    def save(self, scored: ScoredRollout) -> None:
        """Write a unit; its file appears complete or not at all.

        Raises:
            StorageError: it can't be written.
        """
        unit, path = JudgedUnit.of(scored), self._path(scored.rollout.unit)
        arrays: dict[str, Any] = {
            "judge_features": unit.judge_features_BF,
            "judge_logits": unit.judge_logits_BC,
            "judge_spatial": unit.judge_spatial_BS,
            "judge_hits": unit.judge_hits_B,
            "features": unit.features_BF,
            "sampling_s": np.float64(unit.sampling_s),
        }
        arrays |= {f"reward.{name}": values for name, values in unit.rewards.items()}
        found = {name: array for name, array in arrays.items() if array is not None}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial, partial.open("wb") as stream:
                np.savez(stream, **found)
        except OSError as error:
            raise StorageError(
                f"{path} can't be written ({error}); check --output and the free space."
            ) from error

    def load(self, unit: WorkUnit) -> JudgedUnit:
        """Read a finished unit.

        Raises:
            StorageError: its file is damaged.
        """
        path = self._path(unit)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            logits, spatial, hits, features = (arrays.get(name) for name in _OPTIONAL)
            return JudgedUnit(
                judge_features_BF=arrays["judge_features"],
                judge_logits_BC=logits,
                judge_spatial_BS=spatial,
                judge_hits_B=hits,
                features_BF=features,
                rewards={
                    name.removeprefix("reward."): values
                    for name, values in arrays.items()
                    if name.startswith("reward.")
                },
                sampling_s=float(arrays["sampling_s"]),
            )
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise StorageError(
                f"{path} can't be read ({type(error).__name__}: {error}); delete it and start "
                "again: its images will be sampled anew."
            ) from error

    def _path(self, unit: WorkUnit) -> Path:
        first, last = int(unit.condition_indices_P[0]), int(unit.condition_indices_P[-1])
        scale = f"scale-{unit.settings.cfg_scale:g}"
        return self._folder / scale / f"images-{first:07d}-{last:07d}.npz"

    def _compare(self, path: Path, key: Mapping[str, Any]) -> None:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} can't be read ({error}); name another --output.") from error
        differing = sorted(name for name in found | key if found.get(name) != key.get(name))
        if differing:
            told = [f"{name} ({found.get(name)}, now {key.get(name)})" for name in differing[:5]]
            raise ConfigError(
                f"--output {path.parent.parent} holds images made with other settings: "
                f"{', '.join(told)}; name another folder."
            )


def evaluation_key(config: RunConfig) -> dict[str, Any]:
    """What images, features and scores of an evaluation depend on: fields, and digests of files.

    Local files and folders count by their content, wherever they lie; so does the policy at a URL.
    What else lies at a URL counts by its address. Guidance and number of images are no part: they
    are in the units' file names.

    Raises:
        StorageError: a file can't be read.
    """
    files = named_files(config)
    key: dict[str, Any] = {"format": _FORMAT}
    for name, value in config.flattened().items():
        if not name.startswith(_DECISIVE) or name.endswith(_INDIFFERENT):
            continue
        if name in files:
            location = files[name]
            if name == "policy.checkpoint":
                location = str(cached_file(location))
            key[name] = digest_of(location)
        else:
            text = json.dumps(value)
            key[name] = json.loads(text) if len(text) <= _LONG_VALUE else sha256_hex(text.encode())
    return key


def digest_of(location: str) -> str:
    """Of a local file or folder by content; of a URL, or the name of a model, the words."""
    path = Path(location.removeprefix("file://"))
    if is_url(location) or not path.exists():
        return without_credentials(location)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            whole.update(f"{file.relative_to(path)}:{digest_of(str(file))};".encode())
    return whole.hexdigest()
