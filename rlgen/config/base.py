"""The base class of every config section.

Owns strictness: unknown keys and wrong types are errors, and a config never changes once it
is made. Must not import torch, so that `--help` and `--dry-run` answer at once.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

EMBEDDED = "embedded"
"""Stands for the embedded default's own file wherever a path is asked for."""

REQUIRED = "required"
"""Stands in a published preset for a path that only the user can give."""

Dtype = Literal["float32", "bfloat16"]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A frozen, strict section; the docstring under each field is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
