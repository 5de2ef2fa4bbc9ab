"""The configuration of stored rollouts. Must not import torch."""

from typing import Annotated

from pydantic import Field

from rlgen.config.base import Section


class ReplayConfig(Section):
    """Rollouts kept as tokens, to be scored again with other rewards."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between stored rollouts, the first step included; 0 stores none."""
