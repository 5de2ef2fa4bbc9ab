"""What every image tokenizer offers.

Owns the protocol alone. A tokenizer is frozen by the time anyone holds it through this protocol;
both directions run without gradients.

Shapes: B images, L image tokens, S image side.
"""

from typing import Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """Images to codes and back."""

    @property
    def image_size(self) -> int:
        """S, in pixels."""
        ...

    @property
    def codebook_size(self) -> int:
        """Number of codes, V."""
        ...

    @property
    def num_tokens(self) -> int:
        """L: a grid in raster order, or several, coarse to fine."""
        ...

    def encode(self, images_01: Tensor) -> Tensor:
        """[B, 3, S, S] in [0, 1] to int64 codes [B, L]."""
        ...

    def decode(self, tokens_BL: Tensor) -> Tensor:
        """Integer codes [B, L] to float32 [B, 3, S, S], clamped to [0, 1]."""
        ...
