"""The base class of every config section.

Owns strictness: unknown keys and wrong types are errors, and a config never changes once it
is made. Must not import torch, so that `--help` and `--dry-run` answer at once.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict section; the docstring under each field is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )
