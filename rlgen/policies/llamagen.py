"""LlamaGen's GPT, conditioned on classes or on captions, with the public weight names.

Owns the architecture; loading from files is in policies/load.py.
Shapes: B images, L image tokens, S condition slots, T = S + L - 1 positions fed (slots and all
codes but the last), V codebook, D width.
Source: arXiv:2406.06525.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlgen.errors import ConfigError
from rlgen.nn.attention import (
    ConditionSlots,
    GatedFeedForward,
    RotaryAttention,
    log_counts,
)
from rlgen.nn.cache import DecodeCache, TokenCache
from rlgen.nn.norms import RMSNorm
from rlgen.nn.rotary import RotaryTable2D
from rlgen.policies.captions import CaptionEmbedding, Captions


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen."""

    num_layers: int
    num_heads: int
    width: int
    grid_size: int
    """Codes per side; L = grid_size^2."""
    codebook_size: int = 16384
    num_classes: int = 1000
    """Unused if there are captions: they are the classes then."""
    ffn_multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    """The slowest pair turns by about 1 / rope_base per code."""
    has_null_class: bool = True
    """Whether one more class stands for none; captions can always be left out."""
    caption_width: int | None = None
    """Features of a text token (2048 for flan-t5-xl); None for a class-conditional policy."""
    num_caption_slots: int = 120
    """Text tokens of the longest caption."""

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
        if self.caption_width is not None and self.num_caption_slots < 1:
            raise ConfigError(
                f"num_caption_slots = {self.num_caption_slots} leaves no place for captions; as "
                "published it is 120."
            )


class LabelEmbedding(nn.Module):
    """One vector per class, and the last row for the null class if there is one."""

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, width)

    def forward(self, class_ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """[B] -> the only slot [B, 1, D], and that it is valid, [B, 1] bool."""
        slots_B1D = self.embedding_table(class_ids_B)[:, None]
        return slots_B1D, torch.ones_like(slots_B1D[..., 0], dtype=torch.bool)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.attention = RotaryAttention(config.width, config.num_heads)
        self.feed_forward = GatedFeedForward(config.width, config.ffn_width)
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        table: Tensor,
        slots: ConditionSlots | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """One layer over all positions; see RotaryAttention for the arguments."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), table, slots, cache)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))

    def step(
        self, x_BD: Tensor, table: Tensor, cache: DecodeCache, layer: int, position: int
    ) -> Tensor:
        """One layer at one position; see RotaryAttention for the arguments."""
        normed = self.attention_norm(x_BD)
        x_BD = x_BD + self.attention.step(normed, table, cache, layer, position)
        return x_BD + self.feed_forward.step(self.ffn_norm(x_BD), cache.linear)


class LlamaGen(nn.Module):
    """The GPT: condition slots first, then codes; the output before code i predicts it."""

    float32_parts: tuple[str, ...] = (
        "tok_embeddings",
        "embedding_table",
        "attention_norm",
        "ffn_norm",
        "norm",
    )

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = config.grid_size**2
        self.codebook_size = config.codebook_size
        self.num_classes = config.num_classes
        self.null_class: int | None = config.num_classes if config.has_null_class else None
        self.block_sizes = (1,) * self.num_tokens
        self.guidance_ramp = (1.0,) * self.num_tokens
        self.gradient_checkpointing = False
        self.cls_embedding: LabelEmbedding | CaptionEmbedding
        if config.caption_width is None:
            num_rows = config.num_classes + config.has_null_class
            self.cls_embedding = LabelEmbedding(num_rows, config.width)
            num_slots = 1
        else:
            num_slots = config.num_caption_slots
            self.cls_embedding = CaptionEmbedding(
                config.caption_width, config.width, num_slots=num_slots
            )
            self.num_classes = self.null_class = 0
        self.tok_embeddings = nn.Embedding(config.codebook_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        self.rotary = RotaryTable2D(
            config.grid_size,
            config.width // config.num_heads,
            num_condition_slots=num_slots,
            base=config.rope_base,
        )
        self._first_code = num_slots
        self.apply(_initialize)

    def set_captions(self, captions: Captions) -> None:
        """Make these captions the classes, in their order.

        Raises:
            ConfigError: the policy has classes, or the captions do not fit it.
        """
        if not isinstance(self.cls_embedding, CaptionEmbedding):
            raise ConfigError(
                "captions were given to a class-conditional policy; leave policy.captions out, or "
                "load a text-conditional one."
            )
        self.cls_embedding.set_captions(captions)
        self.num_classes = self.null_class = len(captions.prompts)

    def null_of(self, class_ids_B: Tensor) -> Tensor:
        """[B] int64: the null class, or "without caption i" for caption i."""
        assert self.null_class is not None, "check_guidance comes first"
        if self.config.caption_width is None:
            return torch.full_like(class_ids_B, self.null_class)
        return class_ids_B + self.null_class

    def forward(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Same as teacher_forced; what a data-parallel wrapper calls."""
        return self.teacher_forced(class_ids_B, tokens_BL)

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given the ones before it, in one causal pass.

        Args:
            class_ids_B: int64; `null_of` gives those without condition.
            tokens_BL: int64 codes; the last one is only predicted, never fed.
        """
        condition, valid_BS = self.cls_embedding(class_ids_B)
        codes = self.tok_embeddings(tokens_BL[:, :-1])
        slots = None  # one slot that all see needs no special care
        if self.config.caption_width is not None:
            slots = ConditionSlots.make(valid_BS, codes.shape[1])
        x_BTD = torch.cat([condition, codes], dim=1)
        table = self.rotary(self._first_code - condition.shape[1], x_BTD.shape[1])
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, table, slots, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, table, slots)
        return self.output(self.norm(x_BTD[:, condition.shape[1] - 1 :])).float()

    def allocate_cache(self, batch: int) -> DecodeCache:
        """Caches for L positions: one for the condition, however many slots it has."""
        heads = self.config.num_heads
        return DecodeCache(
            len(self.layers), batch, heads, self.num_tokens, weight=self.output.weight
        )

    def prefill(self, class_ids_B: Tensor, cache: DecodeCache) -> Tensor:
        """Feed the condition; logits [B, 1, V] of code 0."""
        x_BSD, valid_BS = self.cls_embedding(class_ids_B)
        num_slots = x_BSD.shape[1]
        slots = ConditionSlots.make(valid_BS, 0)
        if self.config.caption_width is not None:
            bias = torch.zeros(len(x_BSD), 1, 1, self.num_tokens, device=x_BSD.device)
            bias[..., 0] = log_counts(valid_BS)[:, None, None]
            cache.bias_B11T = bias
        table = self.rotary(self._first_code - num_slots, num_slots)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x_BSD = layer(x_BSD, table, slots, layer_cache)
        return self._logits(x_BSD[:, -1], cache)

    def decode_next(self, tokens_B1: Tensor, block: int, cache: DecodeCache) -> Tensor:
        """Feed code `block`; logits [B, 1, V] of code `block` + 1."""
        x_BD = self.tok_embeddings(tokens_B1[:, 0])
        table = self.rotary(self._first_code + block, 1)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            x_BD = layer.step(x_BD, table, cache, index, block + 1)
        return self._logits(x_BD, cache)

    def _logits(self, x_BD: Tensor, cache: DecodeCache) -> Tensor:
        return cache.linear(self.norm(x_BD), self.output).float()[:, None]


def _initialize(module: nn.Module) -> None:
    """Normal(0, 0.02) everywhere, as the family is trained from scratch."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
