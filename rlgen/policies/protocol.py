"""What every policy family offers to the sampler and the learner.

Owns the protocol, and what class-conditional families share of it. Behaviour never depends on
train() or eval(): a dropped condition is a null id, passed like any other. Tokens are drawn in
blocks: one token at a time in a next-token policy, all tokens of a scale at once in a next-scale
one.

Shapes: B images, L image tokens, n tokens of a block, V codebook.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Policy(Protocol):
    """A conditional distribution over token images."""

    num_tokens: int
    """L, tokens of an image."""
    codebook_size: int
    """V."""
    num_classes: int
    """Conditions: classes, or encoded captions."""
    null_class: int | None
    """First id that stands for no condition; None if guidance is impossible."""
    block_sizes: tuple[int, ...]
    """Tokens drawn together, in order; they sum to L."""
    guidance_ramp: tuple[float, ...]
    """Per block the share of the guidance that applies: all 1, or rising over VAR's scales."""

    float32_parts: tuple[str, ...]
    """What stays float32 when the rest is cast: parameters or submodules, by their own names."""
    gradient_checkpointing: bool
    """Keep only each transformer block's input for the backward pass."""

    def null_of(self, class_ids_B: Tensor) -> Tensor:
        """Ids that stand for these images without their conditions: [B] int64.

        One id for all in a class-conditional policy; a caption's absence keeps its length.
        """
        ...

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] float32 of every token given the blocks before its own, in one pass."""
        ...

    def allocate_cache(self, batch: int) -> Any:
        """Static buffers for `prefill` and `decode_next`."""
        ...

    def prefill(self, class_ids_B: Tensor, cache: Any) -> Tensor:
        """Logits [B, n, V] float32 of the first block."""
        ...

    def decode_next(self, tokens_Bn: Tensor, block: int, cache: Any) -> Tensor:
        """Logits [B, n', V] float32 of block `block` + 1, given the tokens of block `block`."""
        ...


class OneNullClass:
    """The null ids of a class-conditional policy: `null_class` for every class."""

    null_class: int | None

    def null_of(self, class_ids_B: Tensor) -> Tensor:
        """[B] int64 of null classes."""
        assert self.null_class is not None, "check_guidance comes first"
        return torch.full_like(class_ids_B, self.null_class)
