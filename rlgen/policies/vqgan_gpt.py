"""taming-transformers' GPT over VQGAN codes, with the public weight names less `transformer.`.

Owns the architecture; loading from files is in policies/load.py. The class is an ordinary token
id before the first code, so there is no null class unless the policy was trained with one.

Shapes: B images, L image tokens, T = L positions fed (class + first L-1 codes), V codebook,
D width, H heads, K head width.
Source: arXiv:2012.09841.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlgen.errors import ConfigError
from rlgen.nn.attention import attend_one
from rlgen.nn.cache import DecodeCache
from rlgen.policies.protocol import OneNullClass


@dataclass(frozen=True)
class VqganGptConfig:
    """Sizes of a class-conditional GPT of the taming family."""

    num_layers: int
    num_heads: int
    width: int
    grid_size: int
    """Codes per side; L = grid_size^2."""
    codebook_size: int = 16384
    """Codes, and rows of the table that codes and classes share."""
    num_classes: int = 1000
    has_null_class: bool = False
    """Whether token id num_classes in the place of the class means none."""
    num_positions: int | None = None
    """Rows of the position table; None for L, which is what is fed."""
    num_tokens: int | None = None
    """L if the codes are not a square; None for grid_size^2."""

    @property
    def length(self) -> int:
        """L, codes of an image."""
        return self.num_tokens or self.grid_size**2

    def __post_init__(self) -> None:
        """Refuse tables that are too small for what is looked up in them."""
        if self.width % self.num_heads:
            raise ConfigError(
                f"width = {self.width} can't be split over num_heads = {self.num_heads}; change "
                "one of them."
            )
        if self.num_classes + self.has_null_class > self.codebook_size:
            raise ConfigError(
                f"num_classes = {self.num_classes} with has_null_class = {self.has_null_class} "
                f"does not fit into codebook_size = {self.codebook_size}, whose ids the classes "
                "share; take fewer classes or more codes."
            )
        if self.num_positions is not None and self.num_positions < self.length:
            raise ConfigError(
                f"num_positions = {self.num_positions} is less than the {self.length} tokens of "
                "an image; take a smaller grid_size."
            )


class SelfAttention(nn.Module):
    """Multi-head causal attention; four linear layers with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Attend from every position to all up to it."""
        query, key, value = (
            # (B, T, D) -> (B, H, T, K)
            layer(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def step(self, x_BD: Tensor, cache: DecodeCache, layer: int, position: int) -> Tensor:
        """Attend from one position, whose key and value enter layer `layer` of the cache."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1))  # (B, D) -> (B, H, K)
            for part in cache.linear.fused(x_BD, self.query, self.key, self.value)
        )
        own = cache.layers[layer]
        own.put(position, key, value)
        mixed_BHK = attend_one(query, own, position + 1)
        return cache.linear(mixed_BHK.flatten(1), self.proj)


class FeedForward(nn.Sequential):
    """Two linear layers, named 0 and 2, with an exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def step(self, x_BD: Tensor, cache: DecodeCache) -> Tensor:
        """One position of each image."""
        return cache.linear(F.gelu(cache.linear(x_BD, self[0])), self[2])


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.mlp = FeedForward(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """One layer over all positions."""
        x_BTD = x_BTD + self.attn(self.ln1(x_BTD))
        return x_BTD + self.mlp(self.ln2(x_BTD))

    def step(self, x_BD: Tensor, cache: DecodeCache, layer: int, position: int) -> Tensor:
        """One layer at one position; see SelfAttention."""
        x_BD = x_BD + self.attn.step(self.ln1(x_BD), cache, layer, position)
        return x_BD + self.mlp.step(self.ln2(x_BD), cache)


class VqganGpt(OneNullClass, nn.Module):
    """The GPT: class at position 0, code i at position i + 1, output i predicts code i."""

    float32_parts: tuple[str, ...] = ("tok_emb", "pos_emb", "ln1", "ln2", "ln_f")

    def __init__(self, config: VqganGptConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.length
        self.codebook_size = config.codebook_size
        self.num_classes = config.num_classes
        self.null_class: int | None = config.num_classes if config.has_null_class else None
        self.block_sizes = (1,) * self.num_tokens
        self.guidance_ramp = (1.0,) * self.num_tokens
        self.gradient_checkpointing = False
        num_positions = config.num_positions or config.length
        self.tok_emb = nn.Embedding(config.codebook_size, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, num_positions, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.num_heads) for _ in range(config.num_layers)
        )
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.apply(_initialize)

    def forward(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Same as teacher_forced; what a data-parallel wrapper calls."""
        return self.teacher_forced(class_ids_B, tokens_BL)

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given the ones before it, in one causal pass.

        Args:
            class_ids_B: int64; the null class, if there is one, is `null_class`.
            tokens_BL: int64 codes; the last one is only predicted, never fed.
        """
        ids_BT = torch.cat([class_ids_B[:, None], tokens_BL[:, :-1]], dim=1)
        x_BTD = self.tok_emb(ids_BT) + self.pos_emb[:, : ids_BT.shape[1]]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, use_reentrant=False)
            else:
                x_BTD = block(x_BTD)
        return self.head(self.ln_f(x_BTD)).float()

    def allocate_cache(self, batch: int) -> DecodeCache:
        """Caches for L positions."""
        heads = self.config.num_heads
        return DecodeCache(len(self.blocks), batch, heads, self.num_tokens, weight=self.head.weight)

    def prefill(self, class_ids_B: Tensor, cache: DecodeCache) -> Tensor:
        """Feed the class; logits [B, 1, V] of code 0."""
        return self._step(class_ids_B, 0, cache)

    def decode_next(self, tokens_B1: Tensor, block: int, cache: DecodeCache) -> Tensor:
        """Feed code `block`; logits [B, 1, V] of code `block` + 1."""
        return self._step(tokens_B1[:, 0], block + 1, cache)

    def _step(self, ids_B: Tensor, position: int, cache: DecodeCache) -> Tensor:
        x_BD = self.tok_emb(ids_B) + self.pos_emb[0, position]
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x_BD = block.step(x_BD, cache, index, position)
        return cache.linear(self.ln_f(x_BD), self.head).float()[:, None]


def _initialize(module: nn.Module) -> None:
    """Normal(0, 0.02) for matrices and tables, zero biases, as the family is trained."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
