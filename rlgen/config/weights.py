"""The configuration of weight transfer from the learner to the samplers. Must not import torch."""

from typing import Annotated, Literal

from pydantic import Field

from rlgen.config.base import Positive, Section


class WeightsConfig(Section):
    """How published weights reach the rollout workers."""

    transport: Literal["object_store", "collective"] = "object_store"
    """`object_store` keeps one copy a node, which workers map; `collective` broadcasts over a
    process group (NCCL between whole GPUs, else gloo) and falls back to the object store."""
    timeout_s: Positive = 60.0
    """Deadline of one transfer; a broadcast that misses it falls back to the object store."""
    chunk_mib: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """Weights travel in pieces of this size, so that a large model needs no memory twice."""
