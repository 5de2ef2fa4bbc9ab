"""The configuration of the guard against collapse. Must not import torch."""

from typing import Annotated, Literal

from pydantic import Field

from rlgen.config.base import Fraction, PositiveInt, Section


class GuardConfig(Section):
    """Rules on what the judge says during training, and what follows if one is broken."""

    every: Annotated[int, Field(ge=0)] = 20
    """Steps between judgements of a fixed-seed sample; 0 switches the guard off."""
    action: Literal["alarm", "stop", "rollback"] = "alarm"
    """Say so and go on; end the run; or go back to the best checkpoint with a smaller step."""
    max_fid_ratio: Annotated[float, Field(gt=1.0)] | None = 2.0
    """Judge FID may reach this times the best one so far; null drops the rule. A good run's early
    steps swing by 1.7 on the digits."""
    min_recall_ratio: Fraction | None = 0.93
    """Recall may fall to this times the base's; null drops the rule."""
    max_hollow_gains: PositiveInt | None = 2
    """Successive judgements in which the instance rewards and the judge FID both rise; null drops
    the rule."""
    rollback_lr_factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """The learning rate is multiplied by this at each rollback."""
    max_rollbacks: PositiveInt = 3
    """Rollbacks after which the run ends instead."""
