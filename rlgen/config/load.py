"""From YAML text and `section.key=value` words to a RunConfig.

Owns merging, reading and the wording of configuration errors. Must not import torch.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlgen.config.imagenet import IMAGENET, imagenet_class_names
from rlgen.config.reward import SCORER_TYPES
from rlgen.config.run import RunConfig
from rlgen.config.secrets import is_scrubbed, scrubbed_tree
from rlgen.config.tree import digest
from rlgen.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?([eE][-+]?\d+)$"),
    list("-+0123456789"),
)


def load_config(
    path: str | Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> RunConfig:
    """Build the configuration: defaults, then the YAML file or files, then the overrides.

    Sections merge; a value replaces. `null` removes an optional section. The word `imagenet` for
    class_names stands for the names of ImageNet's 1000 classes.

    Args:
        path: YAML file, several that merge in this order, or None for the embedded default.
        overrides: words like "rollout.num_workers=3"; values are YAML.
    Raises:
        ConfigError: unreadable file, unknown key, wrong type, impossible combination.
    """
    layers: list[Mapping[str, Any]] = []
    paths = [path] if isinstance(path, str) else path or []
    layers.extend(_read_yaml(one) for one in paths)
    layers.extend(_parse_override(word) for word in overrides)
    merged: dict[str, Any] = RunConfig().model_dump()
    for layer in layers:
        merged = _merge(merged, layer)
    if merged["class_names"] == IMAGENET:
        merged["class_names"] = imagenet_class_names()
    try:
        config = RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    for key, value in config.flattened().items():
        if is_scrubbed(value):
            raise ConfigError(
                f"{key} = {value} comes from a dump that leaves secrets out; give it again: "
                f"{key}=... on the command line."
            )
    return config


def dump_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML, without secrets.

    Loading it again gives an equal config; if a secret was left out, an error that says so.
    """
    return yaml.safe_dump(scrubbed_tree(config.model_dump(mode="json")), sort_keys=False)


def config_sha256(config: RunConfig) -> str:
    """Return the digest of the resolved configuration, 64 hexadecimal digits."""
    return digest(config.model_dump(mode="json"))


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"config file {path} can't be read ({type(error).__name__}); check --config."
        ) from None
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"config file {path} holds a {type(content).__name__}; it must hold sections such as "
            "`rollout:` with their keys."
        )
    return content


def _parse_override(word: str) -> Mapping[str, Any]:
    key, separator, text = word.partition("=")
    if not separator or not re.fullmatch(r"[a-z_]\w*(\.[a-z_]\w*)*", key):
        raise ConfigError(
            f"{word!r} is no override; write section.key=value, such as rollout.num_workers=3."
        )
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {word!r} is not YAML: {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: Any, layer: Any) -> Any:
    """Merge mappings key by key; another `type` starts afresh instead of mixing fields."""
    if not isinstance(base, Mapping) or not isinstance(layer, Mapping):
        return layer
    if "type" in layer and layer["type"] != base.get("type"):
        return dict(layer)
    return {
        **base,
        **{k: _merge(base[k], v) if k in base else v for k, v in layer.items()},
    }


def _explain(error: ValidationError) -> str:
    sentences = []
    for problem in error.errors():
        location, tag = _without_tag(problem["loc"])
        where = ".".join(location)
        if problem["type"] == "extra_forbidden":
            sentences.append(_unknown_key(location, tag))
        elif problem["type"] == "value_error":
            prefix = f"{where}: " if where else ""
            sentences.append(prefix + str(problem["ctx"]["error"]) + ".")
        elif problem["type"] == "missing":
            sentences.append(f"{where} is not given.")
        elif problem["type"] == "union_tag_not_found":
            sentences.append(f"{where}.type is not given; it is one of {', '.join(SCORER_TYPES)}.")
        else:
            given = problem["input"]
            sentences.append(
                f"{where} = {given!r} ({type(given).__name__}) won't do: {problem['msg']}."
            )
    return " ".join(sentences)


def _without_tag(location: Sequence[int | str]) -> tuple[list[str], str | None]:
    """Drop the union tag that pydantic inserts after a scorer's name; the tag comes second."""
    parts = [str(part) for part in location]
    if parts[:2] == ["reward", "scorers"] and len(parts) > 3:
        return [*parts[:3], *parts[4:]], parts[3]
    return parts, None


def _unknown_key(location: Sequence[str], tag: str | None) -> str:
    *parents, key = location
    known = _fields_at(parents) if tag is None else sorted(SCORER_TYPES[tag].model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}."
    return f"unknown key {'.'.join([*parents, key])}; {hint}"


def _fields_at(parents: Sequence[str]) -> list[str]:
    section: Any = RunConfig()
    for part in parents:
        if isinstance(section, Mapping):
            section = section.get(part, section)
        else:
            section = getattr(section, part, section)
    if isinstance(section, BaseModel):
        return sorted(type(section).model_fields)
    return []
