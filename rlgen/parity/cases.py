"""Golden cases of the public implementations: reading them, and comparing with them.

Owns the format of `cases.json` and its .npz files. Must not know the models.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.parity.rule import VERSION, is_made, make_array, make_tensor


@dataclass(frozen=True)
class Case:
    """One golden case; arrays are named in.*, out.* and aux.*."""

    name: str
    family: str
    seed: int
    config: dict[str, Any]
    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    tolerance: dict[str, dict[str, float]]
    state_entries: list[tuple[str, list[int], str, bool]]
    """(public name, shape, type, whether the rule makes it); VAR's names begin with vae: or var:"""
    folder: Path = Path()
    """Where the case was read from; real weights may lie there."""

    def tensor(self, name: str) -> Tensor:
        """An array as a tensor on the default device."""
        return torch.from_numpy(self.arrays[name]).to(torch.get_default_device())

    def weights(self, module: str = "") -> dict[str, Tensor]:
        """The rule's tensors by public name.

        Args:
            module: which of several modules; the part of the name before the colon.
        """
        prefix = f"{module}:" if module else ""
        names = {
            name.removeprefix(prefix): shape
            for name, shape, _, made in self.state_entries
            if made and name.startswith(prefix)
        }
        return {
            name: make_tensor(self.seed, name, shape)
            for name, shape in names.items()
            if is_made(name)
        }

    def check_fields(
        self, *, config: Collection[str], settings: Collection[str] = frozenset()
    ) -> None:
        """Refuse a case that asks for something the runner does not know.

        Raises:
            ConfigError: names the unknown fields.
        """
        unknown = sorted(self.config.keys() - set(config)) + sorted(
            self.settings.keys() - set(settings)
        )
        if unknown:
            raise ConfigError(f"case {self.name} has unknown fields: {', '.join(unknown)}.")


@dataclass(frozen=True)
class Codes:
    """Integers from an argmin: they must agree where the choice was clear."""

    codes: Tensor
    margin: np.ndarray
    """Distance between the best and the second best code, of the reference."""
    threshold: float
    """Margins from this on are clear."""
    is_sequential: bool = False
    """Whether a near-tie makes all later codes of the row free, as in residual quantisation."""


Outputs = dict[str, np.ndarray | Tensor | Codes]


@dataclass(frozen=True)
class Comparison:
    """One array of a case against ours."""

    array: str
    deviation: float
    """Largest absolute difference; for integers the number of differing elements."""
    tolerance: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether ours agrees."""
        return not self.problem and self.deviation <= self.tolerance


def read_cases(folder: Path) -> list[dict[str, Any]]:
    """Read the index of a folder of cases.

    Raises:
        ConfigError: no such file, not this format, or made by another rule.
    """
    index = folder / "cases.json"
    try:
        content = json.loads(index.read_text())
        entries, version = content["cases"], content.get("rule_version", VERSION)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{index} can't be read as an index of cases ({type(error).__name__}: {error}); "
            "--cases must name a folder with cases.json and its .npz files."
        ) from None
    if version != VERSION:
        raise ConfigError(f"{index} follows weight rule {version}; this version knows {VERSION}.")
    for check in content.get("rule_check", []):
        first = make_array(check["seed"], check["key"], check["shape"]).ravel()[:4]
        if first.tolist() != check["first"]:
            raise ConfigError(
                f"the weight rule gives {first.tolist()} for {check['key']} and {index} says "
                f"{check['first']}; numpy's generator differs on this machine."
            )
    return entries


def load_case(folder: Path, entry: dict[str, Any]) -> Case:
    """Read one case with its arrays.

    Raises:
        ConfigError: the entry or its file can't be read.
    """
    try:
        with np.load(folder / entry["file"], allow_pickle=False) as archive:
            arrays = dict(archive)
        return Case(
            name=entry["name"],
            family=entry["family"],
            seed=int(entry["seed"]),
            config=entry["config"],
            settings=entry.get("settings", {}),
            arrays=arrays,
            tolerance=entry["tolerance"],
            state_entries=[tuple(row) for row in entry.get("state_dict", [])],
            folder=folder,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"case {entry.get('name', '?')} can't be read ({type(error).__name__}: {error})."
        ) from None


def compare(case: Case, outputs: Outputs) -> list[Comparison]:
    """Compare everything that the case expects; what the runner did not return is a failure."""
    expected = [name for name in case.arrays if name.startswith("out.")]
    return [_compare_one(case, name, outputs.get(name)) for name in expected]


def _compare_one(case: Case, name: str, found: np.ndarray | Tensor | Codes | None) -> Comparison:
    wanted = case.arrays[name]
    tolerance = float(case.tolerance.get(name, {}).get("atol", 0.0))
    if found is None:
        return Comparison(name, np.inf, tolerance, "not computed")
    values = found.codes if isinstance(found, Codes) else found
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    if array.shape != wanted.shape:
        return Comparison(name, np.inf, tolerance, f"shape {array.shape} instead of {wanted.shape}")
    if isinstance(found, Codes) or np.issubdtype(wanted.dtype, np.integer):
        differs = array != wanted
        if isinstance(found, Codes):
            differs &= _clear(found)
        return Comparison(name, float(differs.sum()), 0.0)
    difference = np.abs(array.astype(np.float64) - wanted.astype(np.float64))
    # NaN compares as passed nowhere: max() passes it on, and NaN <= x is false.
    return Comparison(name, float(difference.max(initial=0.0)), tolerance)


def _clear(codes: Codes) -> np.ndarray:
    clear = codes.margin >= codes.threshold
    if codes.is_sequential:
        rows = clear.reshape(len(clear), -1)
        clear = np.logical_and.accumulate(rows, axis=1).reshape(clear.shape)
    return clear
