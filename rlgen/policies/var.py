"""VAR: all tokens of a scale are drawn at once, given the class and the scales before.

Owns the architecture, under the public weight names; loading from files is in policies/load.py.
The quantizer, which turns drawn tokens into the next scale's inputs, belongs to the tokenizer:
the policy holds a frozen copy, which is neither trained nor saved with it.

Shapes: B images, S scales, n tokens of a scale, L tokens of all scales, T positions fed,
V codebook, C code dimensions, D width, P side of the last scale.
Source: arXiv:2404.02905.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlgen.errors import ConfigError
from rlgen.nn.cache import LayerCache
from rlgen.nn.var_blocks import (
    ConditionLinear,
    ModulatedNorm,
    Modulation,
    Prefix,
    ScaleBlock,
    linear,
)
from rlgen.policies.protocol import OneNullClass
from rlgen.tokenizers.multiscale import MultiScaleQuantizer

_HEAD_SHARE = 0.02
_MODULATION_SHARE = 0.5
_GATE_SHARE = 1e-5
"""Shares of the usual initial weights."""


@dataclass(frozen=True)
class VarConfig:
    """Sizes of a VAR."""

    depth: int
    """Transformer blocks."""
    width: int
    """D; as published 64 per block."""
    num_heads: int
    """As published one per block."""
    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    """Tokens along a side, per scale."""
    codebook_size: int = 4096
    code_dim: int = 32
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    """Hidden numbers of the feed-forward per number of the width."""
    norm_eps: float = 1e-6
    shared_aln: bool = False
    """One projection of the condition for all blocks, to which each adds a constant."""
    attn_l2_norm: bool = True
    """Queries and keys have length 1, and each head a learned factor."""

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(side**2 for side in self.patch_nums)

    @property
    def ffn_width(self) -> int:
        """Hidden numbers of the feed-forward."""
        return round(self.width * self.mlp_ratio)

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have."""
        object.__setattr__(self, "patch_nums", tuple(self.patch_nums))
        for name in ("depth", "width", "num_heads", "codebook_size", "code_dim", "num_classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} must be at least 1.")
        if self.width % self.num_heads:
            raise ConfigError(
                f"width = {self.width} can't be split over num_heads = {self.num_heads}; as "
                "published, width is 64 * num_heads."
            )
        if len(self.patch_nums) < 2 or min(self.patch_nums) < 1:
            raise ConfigError(
                f"patch_nums = {list(self.patch_nums)} must be two or more positive sides, such as "
                "[1, 2, 3, 4]."
            )
        if self.ffn_width < 1 or self.norm_eps <= 0:
            raise ConfigError(
                f"mlp_ratio = {self.mlp_ratio} and norm_eps = {self.norm_eps} must be positive; "
                "as published they are 4 and 1e-6."
            )


@dataclass
class VarCache:
    """What decoding keeps of the scales before."""

    layers: list[LayerCache]
    """Keys and values of L positions."""
    positions_1LD: Tensor
    modulations: list[Modulation] = field(default_factory=list)
    """Of the condition, per block; the same for all scales."""
    head_modulation: tuple[Tensor, Tensor] | None = None
    f_hat_BCPP: Tensor | None = None
    """Sum of the scales before; None before the first."""


class VAR(OneNullClass, nn.Module):
    """The transformer: the class is the input of the first scale, and modulates every block."""

    lvl_1L: Tensor
    float32_parts: tuple[str, ...] = (
        "pos_start",
        "pos_1LC",
        "word_embed",
        "class_emb",
        "lvl_embed",
        "scale_mul_1H11",
        "ada_gss",
        "head",
    )

    def __init__(self, config: VarConfig, quantizer: MultiScaleQuantizer) -> None:
        """Make a policy with random weights.

        Args:
            config: the sizes.
            quantizer: the tokenizer's; it is copied.
        Raises:
            ConfigError: the quantizer has other scales or codes than the config says.
        """
        super().__init__()
        _check_quantizer(config, quantizer)
        self.config = config
        self.block_sizes = config.block_sizes
        self.num_tokens = sum(config.block_sizes)
        self.codebook_size = config.codebook_size
        self.num_classes = config.num_classes
        self.null_class: int | None = config.num_classes
        num_scales = len(config.patch_nums)
        self.guidance_ramp = tuple(scale / (num_scales - 1) for scale in range(num_scales))
        self.gradient_checkpointing = False
        """Keep only each block's input for the backward pass."""
        self._ends = tuple(accumulate(config.block_sizes))
        # In a tuple, so that its tensors are no part of this module's.
        self._frozen = (copy.deepcopy(quantizer).requires_grad_(False),)

        width = config.width
        self.pos_start = nn.Parameter(torch.empty(1, config.block_sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.num_tokens, width))
        self.word_embed = nn.Linear(config.code_dim, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.lvl_embed = nn.Embedding(num_scales, width)
        if config.shared_aln:
            self.shared_ada_lin = ConditionLinear(width, 6)
        self.blocks = nn.ModuleList(
            ScaleBlock(
                width,
                config.num_heads,
                ffn_width=config.ffn_width,
                norm_eps=config.norm_eps,
                has_unit_vectors=config.attn_l2_norm,
                has_own_modulation=not config.shared_aln,
            )
            for _ in range(config.depth)
        )
        self.head_nm = ModulatedNorm(width, eps=config.norm_eps)
        self.head = nn.Linear(width, config.codebook_size)
        levels = [scale for scale, size in enumerate(config.block_sizes) for _ in range(size)]
        self.register_buffer("lvl_1L", torch.tensor([levels]), persistent=False)
        self._initialize()

    @property
    def quantizer(self) -> MultiScaleQuantizer:
        """What makes a scale's inputs of the tokens before; frozen."""
        return self._frozen[0]

    def forward(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Same as teacher_forced; what a data-parallel wrapper calls."""
        return self.teacher_forced(class_ids_B, tokens_BL)

    def teacher_forced(self, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
        """Logits [B, L, V] float32 of every token given the scales before its own, in one pass.

        Args:
            class_ids_B: int64; the null class is `null_class`.
            tokens_BL: int64 codes, coarse to fine; those of the last scale are never fed.
        """
        with torch.no_grad():
            inputs_BTC = self.quantizer.inputs_of(tokens_BL)
        condition_BD = self.class_emb(class_ids_B)
        positions_1LD = self._positions()
        start_BnD = self._start(condition_BD, positions_1LD)
        rest_BTD = self._embed(inputs_BTC, positions_1LD[:, self.block_sizes[0] :])
        x_BLD = torch.cat([start_BnD, rest_BTD], dim=1)
        condition = self._block_condition(condition_BD)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, condition, self._ends, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, condition, self._ends)
        return self._logits(x_BLD, self.head_nm.modulation(condition_BD))

    def allocate_cache(self, batch: int) -> VarCache:
        """Room for the keys and values of L positions in every layer."""
        bias = self._scale_blocks()[0].attn.q_bias
        device, heads = bias.device, self.config.num_heads
        is_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_autocast else bias.dtype
        layers = [
            LayerCache.allocate(
                batch,
                heads,
                self.num_tokens,
                self.config.width // heads,
                device=device,
                dtype=dtype,
            )
            for _ in self.blocks
        ]
        return VarCache(layers, self._positions())

    def prefill(self, class_ids_B: Tensor, cache: VarCache) -> Tensor:
        """Feed the class; logits [B, n, V] of scale 0."""
        condition_BD = self.class_emb(class_ids_B)
        condition = self._block_condition(condition_BD)
        cache.modulations = [block.modulation(condition) for block in self._scale_blocks()]
        cache.head_modulation = self.head_nm.modulation(condition_BD)
        cache.f_hat_BCPP = None
        return self._run_scale(self._start(condition_BD, cache.positions_1LD), 0, cache)

    def decode_next(self, tokens_Bn: Tensor, block: int, cache: VarCache) -> Tensor:
        """Feed the tokens of scale `block`; logits [B, n', V] of scale `block` + 1."""
        f_hat_BCPP, inputs_BnC = self.quantizer.embed_step(cache.f_hat_BCPP, tokens_Bn, block)
        cache.f_hat_BCPP = f_hat_BCPP
        assert inputs_BnC is not None, f"scale {block} is the last one, nothing follows it"
        positions = cache.positions_1LD[:, self._ends[block] : self._ends[block + 1]]
        return self._run_scale(self._embed(inputs_BnC, positions), block + 1, cache)

    def _run_scale(self, x_BnD: Tensor, scale: int, cache: VarCache) -> Tensor:
        assert cache.head_modulation is not None, "prefill comes first"
        size = self.block_sizes[scale]
        start = self._ends[scale] - size
        for block, modulation, layer in zip(
            self._scale_blocks(), cache.modulations, cache.layers, strict=True
        ):
            x_BnD = block.run(x_BnD, modulation, (size,), Prefix(layer, start))
        return self._logits(x_BnD, cache.head_modulation)

    def _scale_blocks(self) -> list[ScaleBlock]:
        return cast(list[ScaleBlock], list(self.blocks))

    def _positions(self) -> Tensor:
        """Embedding of each position and its scale: [1, L, D] float32."""
        return self.lvl_embed(self.lvl_1L).float() + self.pos_1LC.float()

    def _start(self, condition_BD: Tensor, positions_1LD: Tensor) -> Tensor:
        """Inputs of scale 0: [B, n, D] float32."""
        places_1nD = self.pos_start.float() + positions_1LD[:, : self.block_sizes[0]]
        return condition_BD.float()[:, None] + places_1nD

    def _embed(self, inputs_BTC: Tensor, positions_1TD: Tensor) -> Tensor:
        """Inputs of later scales: [B, T, D] float32, the same for the sampler and the learner."""
        with self._float32_only():
            embed = self.word_embed
            return linear(inputs_BTC, embed.weight.float(), embed.bias.float()) + positions_1TD

    def _block_condition(self, condition_BD: Tensor) -> Tensor:
        """What the blocks' modulation takes."""
        return self.shared_ada_lin(condition_BD) if self.config.shared_aln else condition_BD

    def _logits(self, x_BTD: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, V] float32."""
        normed_BTD = self.head_nm(x_BTD, modulation)
        with self._float32_only():
            return linear(normed_BTD, self.head.weight.float(), self.head.bias.float())

    def _float32_only(self) -> torch.autocast:
        return torch.autocast(self.pos_1LC.device.type, enabled=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take the quantizer along to another device, but never to another format."""
        super()._apply(fn, recurse)
        self.quantizer.to(self.pos_1LC.device)
        return self

    def _initialize(self) -> None:
        """Random weights as the family is trained from scratch: blocks that do little at first.

        Source: FoundationVision/VAR, models/var.py.
        """
        std = math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for table in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(table, std=std)
        with torch.no_grad():
            self.head.weight.mul_(_HEAD_SHARE)
            self.head_nm.ada_lin.linear.weight.mul_(_MODULATION_SHARE)
        for block in self._scale_blocks():
            block.shrink(
                residual=1 / math.sqrt(2 * self.config.depth),
                gates=_GATE_SHARE,
                modulation=_MODULATION_SHARE,
            )


def _check_quantizer(config: VarConfig, quantizer: MultiScaleQuantizer) -> None:
    for name in ("patch_nums", "codebook_size", "code_dim"):
        ours, theirs = getattr(config, name), getattr(quantizer, name)
        if ours != theirs:
            raise ConfigError(
                f"the policy's {name} = {ours} and the tokenizer's {name} = {theirs} differ; name "
                "the tokenizer that the policy was trained with."
            )
