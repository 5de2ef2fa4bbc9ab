"""The compose files as docker compose reads them: variables substituted, files laid over another.

Only what our files use: ${NAME}, ${NAME:-default} and ${NAME:?message}.
"""

import gzip
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

from tests.infra.rules import INFRA

FILES = ("compose.yaml", "compose.s3.yaml")
_SCHEMA = Path(__file__).parent / "data" / "compose-spec.json.gz"
"""schema/compose-spec.json of compose-spec/compose-spec at commit 170098ba07d9 (Apache-2.0)."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def raw(name: str) -> dict[str, Any]:
    """A compose file before substitution."""
    return yaml.safe_load((INFRA / name).read_text(encoding="utf-8"))


def services(*names: str) -> dict[str, dict[str, Any]]:
    """The services of these files by name, before substitution; later files add keys."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        for service, value in raw(name)["services"].items():
            found[service] = {**found.get(service, {}), **value}
    return found


def variables(name: str) -> dict[str, tuple[str, str]]:
    """Each variable of a file with the kind of its substitution and what follows it."""
    text = (INFRA / name).read_text(encoding="utf-8")
    return {found[1]: (found[2] or "", found[3] or "") for found in _VARIABLE.finditer(text)}


def substituted(value: Any, settings: Mapping[str, str]) -> Any:
    """The same tree with the variables in its strings replaced."""
    if isinstance(value, dict):
        return {key: substituted(item, settings) for key, item in value.items()}
    if isinstance(value, list):
        return [substituted(item, settings) for item in value]
    if not isinstance(value, str):
        return value

    def one(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if settings.get(name):
            return settings[name]
        if kind == "-":
            return rest
        raise KeyError(f"{name}: {rest}")

    return _VARIABLE.sub(one, value)


def complaints(tree: Mapping[str, Any]) -> list[str]:
    """What the Compose Specification has against a file."""
    schema = json.loads(gzip.decompress(_SCHEMA.read_bytes()))
    found = Draft7Validator(schema).iter_errors(tree)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]
