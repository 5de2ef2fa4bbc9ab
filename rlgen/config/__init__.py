"""Typed run configuration: defaults, YAML, overrides, plan. Imports no torch."""

from rlgen.config.base import EMBEDDED
from rlgen.config.digits import DigitsConfig
from rlgen.config.load import config_sha256, dump_yaml, load_config
from rlgen.config.run import RunConfig

__all__ = [
    "EMBEDDED",
    "DigitsConfig",
    "RunConfig",
    "config_sha256",
    "dump_yaml",
    "load_config",
]
