"""Where a run is recorded: the section of MLflow.

Owns its fields and their checks. Must not import MLflow.
"""

import re
from typing import Self

from pydantic import field_validator, model_validator

from rlgen.config.base import NonNegative, Section
from rlgen.errors import ConfigError

_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w. -]*")


def check_model_name(name: str) -> None:
    """Refuse a registered model's name that MLflow, or a filter in it, would refuse.

    Raises:
        ConfigError: says what a name may hold.
    """
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} can't name a registered model; use letters, digits, spaces, '.', '_' and "
            "'-', and begin with a letter or a digit."
        )


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking URI; by default a sqlite file beside the run folders. `none` switches it off."""
    experiment: str = "rlgen"
    """Name of the MLflow experiment."""
    model: str | None = None
    """Registered model that the policy joins at the end of the run; its alias `champion` moves to
    this policy if the judge FID is lower than the champion's, by the same judge. null registers
    nothing."""
    system_metrics_s: NonNegative = 10.0
    """Seconds between samples of CPU, memory, disk, network and GPUs of the driver's machine; 0
    takes none."""

    @field_validator("model")
    @classmethod
    def _model_can_be_named(cls, name: str | None) -> str | None:
        if name is not None:
            check_model_name(name)
        return name

    @model_validator(mode="after")
    def _registry_is_there(self) -> Self:
        if self.model is not None and self.uri == "none":
            raise ValueError(
                f"tracking.model = {self.model} needs MLflow, which tracking.uri = none switches "
                "off; name a server, or set tracking.model=null"
            )
        return self
