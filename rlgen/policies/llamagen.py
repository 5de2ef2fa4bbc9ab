"""LlamaGen's class-conditional GPT, with the public weight names.

Owns the architecture; loading from files is in policies/load.py.
Shapes: B images, L image tokens, T = L positions fed (condition + first L-1 codes), V codebook,
D width, K head width.
Source: arXiv:2406.06525.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlgen.errors import ConfigError
from rlgen.nn.attention import GatedFeedForward, LayerCache, RotaryAttention
from rlgen.nn.norms import RMSNorm
from rlgen.nn.rotary import rotary_table_2d


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a class-conditional LlamaGen."""

    num_layers: int
    num_heads: int
    width: int
    grid_size: int
    """Codes per side; L = grid_size^2."""
    codebook_size: int = 16384
    num_classes: int = 1000
    ffn_multiple_of: int = 256

    @property
    def ffn_width(self) -> int:
        """8/3 of the width, rounded up to a multiple of ffn_multiple_of."""
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    def __post_init__(self) -> None:
        """Refuse widths that the heads or the rotary pairs do not divide."""
        if self.width % self.num_heads or (self.width // self.num_heads) % 4:
            raise ConfigError(
                f"width = {self.width} over num_heads = {self.num_heads} must give a head width "
                "divisible by 4; change one of them."
            )


class LabelEmbedding(nn.Module):
    """One vector per class and one for the null class, which has the last row."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, class_ids_B: Tensor) -> Tensor:
        """[B] -> [B, 1, D]."""
        return self.embedding_table(class_ids_B)[:, None]


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = RotaryAttention(config.width, config.num_heads)
        self.feed_forward = GatedFeedForward(config.width, config.ffn_width)
        self.attention_norm = RMSNorm(config.width)
        self.ffn_norm = RMSNorm(config.width)

    def forward(self, x_BTD: Tensor, table: Tensor, cache: LayerCache | None, start: int) -> Tensor:
        """One layer; see RotaryAttention for the arguments."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), table, cache, start)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class LlamaGen(nn.Module):
    """The GPT: condition slot at position 0, code i at position i + 1, output i predicts code i."""

    rotary: Tensor

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.grid_size**2
        self.codebook_size = config.codebook_size
        self.num_classes = config.num_classes
        self.null_class: int | None = config.num_classes
        self.block_sizes = (1,) * self.num_tokens
        self.guidance_ramp = (1.0,) * self.num_tokens
        self.cls_embedding = LabelEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        table = rotary_table_2d(
            config.grid_size, config.width // config.num_heads, num_condition_slots=1
        )
        self.register_buffer("rotary", table, persistent=False)
        self.apply(_initialize)

    def forward(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Same as teacher_forced; what a data-parallel wrapper calls."""
        return self.teacher_forced(class_ids_B, tokens_BL)

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given the ones before it, in one causal pass.

        Args:
            class_ids_B: int64; the null class is `null_class`.
            tokens_BL: int64 codes; the last one is only predicted, never fed.
        """
        condition = self.cls_embedding(class_ids_B)
        codes = self.tok_embeddings(tokens_BL[:, :-1])
        return self._run(torch.cat([condition, codes], dim=1), None, 0)

    def allocate_cache(self, batch: int) -> list[LayerCache]:
        """One cache per layer for L positions."""
        weight = self.output.weight
        heads = self.config.num_heads
        return [
            LayerCache.allocate(
                batch,
                heads,
                self.num_tokens,
                self.config.width // heads,
                device=weight.device,
                dtype=weight.dtype,
            )
            for _ in self.layers
        ]

    def prefill(self, class_ids_B: Tensor, cache: list[LayerCache]) -> Tensor:
        """Feed the condition; logits [B, 1, V] of code 0."""
        return self._run(self.cls_embedding(class_ids_B), cache, 0)[:, -1:]

    def decode_next(self, tokens_B1: Tensor, block: int, cache: list[LayerCache]) -> Tensor:
        """Feed code `block`; logits [B, 1, V] of code `block` + 1."""
        return self._run(self.tok_embeddings(tokens_B1), cache, block + 1)

    def _run(self, x_BTD: Tensor, cache: list[LayerCache] | None, start: int) -> Tensor:
        table = self.rotary[start : start + x_BTD.shape[1]]
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, table, None if cache is None else cache[index], start)
        return self.output(self.norm(x_BTD)).float()


def _initialize(module: nn.Module) -> None:
    """Normal(0, 0.02) everywhere, as the family is trained from scratch."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
