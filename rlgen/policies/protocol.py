"""What every policy family offers to the sampler and the learner.

Owns the protocol alone. Behaviour never depends on train() or eval(): a dropped condition is
the null class, passed like any other.

Shapes: B images, L image tokens, V codebook.
"""

from typing import Any, Protocol

from torch import Tensor


class Policy(Protocol):
    """A conditional distribution over token images."""

    num_tokens: int
    """L, tokens of an image."""
    codebook_size: int
    """V."""
    num_classes: int
    null_class: int | None
    """Class id that stands for no condition; None if guidance is impossible."""

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given the ones before it, in one pass."""
        ...

    def allocate_cache(self, batch: int) -> Any:
        """Static buffers for `prefill` and `decode_one`."""
        ...

    def prefill(self, class_ids_B: Tensor, cache: Any) -> Tensor:
        """Logits [B, V] of the first token."""
        ...

    def decode_one(self, tokens_B: Tensor, position: int, cache: Any) -> Tensor:
        """Logits [B, V] of token `position` + 1, given token `position`."""
        ...
