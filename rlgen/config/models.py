"""The published models by name: family, architecture, what they need. Must not import torch."""

from dataclasses import dataclass
from typing import Any

from rlgen.errors import ConfigError


@dataclass(frozen=True)
class ModelSpec:
    """A published policy or tokenizer."""

    name: str
    family: str
    """Which class builds it: llamagen, var, vqgan_gpt, llamagen_vq, var_vqvae or taming_vqgan."""
    architecture: dict[str, Any]
    """Fields of the family's config dataclass."""


MODELS: dict[str, ModelSpec] = {}


def model_spec(name: str) -> ModelSpec:
    """Look a published model up.

    Raises:
        ConfigError: no such model; names the known ones.
    """
    if name not in MODELS:
        raise ConfigError(f"there is no published model {name!r}; known are {', '.join(MODELS)}.")
    return MODELS[name]
