"""Causal self-attention, in one pass or with a static key-value cache, and the gated feed-forward.

Owns the building blocks of the next-token transformers; LlamaGen's under their public weight
names. Condition slots are positions before the first code whose queries and keys are zero, so
that they attend evenly: any number of them is to the codes one slot with the mean of their
values, key zero and the logarithm of their number as a bias.

Shapes: B batch, S condition slots, T positions of this call, H heads, K head width, D = H*K width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.nn.cache import DecodeCache, TokenCache
from rlgen.nn.packed import PackedLinears
from rlgen.nn.rotary import apply_rotary


@dataclass(frozen=True)
class ConditionSlots:
    """The condition slots of a pass: the first S positions."""

    valid_BS: Tensor
    """bool: slots that others may see; the rest see themselves alone."""
    bias_B1TT: Tensor | None
    """[B, 1, T, 1 + T] float32 for T codes: what is added to their scores, -inf where a position
    may not look; the first column is the slots'. None without codes."""

    @classmethod
    def make(cls, valid_BS: Tensor, num_codes: int) -> "ConditionSlots":
        """Make the biases for a pass of S slots and then `num_codes` codes."""
        if num_codes == 0:
            return cls(valid_BS, None)
        bias = torch.full((num_codes, 1 + num_codes), -torch.inf, device=valid_BS.device)
        bias_B1TT = bias.triu(diagonal=2).repeat(len(valid_BS), 1, 1, 1)  # the future
        bias_B1TT[..., 0] += log_counts(valid_BS)[:, None, None]
        return cls(valid_BS, bias_B1TT)

    def attend(self, value_BHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Attention among the slots, and what the codes see of them.

        Returns:
            [B, H, S, K], in a valid slot the mean of the valid values up to its own; and
            [B, H, 1, K], the mean of all valid values, 0 if there are none.
        """
        valid = self.valid_BS[:, None, :, None]
        totals = (value_BHSK.float() * valid).cumsum(dim=2)
        means = (totals / valid.cumsum(dim=2).clamp_min(1)).to(value_BHSK.dtype)
        return torch.where(valid, means, value_BHSK), means[:, :, -1:]


def log_counts(valid_BS: Tensor) -> Tensor:
    """[B] float32: logarithm of the number of valid slots, -inf if there are none."""
    return valid_BS.sum(dim=1).float().log()


def attend_one(
    query_BHK: Tensor, cache: TokenCache, length: int, bias_B11T: Tensor | None = None
) -> Tensor:
    """Attention of one position to the first `length` of the cache: [B, H, K]."""
    query = query_BHK[:, :, None]
    if query.device.type != "cpu":
        mask = None if bias_B11T is None else bias_B11T[..., :length].to(query.dtype)
        keys, values = cache.keys[:, :, :length], cache.values[:, :, :length]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)[:, :, 0]
    # On a CPU the fused kernel is made for many queries; for one it takes up to six times as long.
    keys, values = cache.keys, cache.values
    scores = torch.matmul(query, keys.transpose(2, 3)).float() * query.shape[-1] ** -0.5
    if bias_B11T is not None:
        scores = scores + bias_B11T[..., : keys.shape[2]]
    scores[..., length:] = -torch.inf
    return torch.matmul(scores.softmax(dim=-1).to(values.dtype), values)[:, :, 0]


class RotaryAttention(nn.Module):
    """Multi-head causal attention with rotary positions; fused `wqkv`, no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        table: Tensor,
        slots: ConditionSlots | None = None,
        cache: TokenCache | None = None,
    ) -> Tensor:
        """Attend to all earlier positions.

        Args:
            x_BTD: inputs from position 0 on.
            table: [T, K/2, 2] rotary rows of these positions.
            slots: the first positions, if they are not just one that all codes see.
            cache: receives what later codes see of the slots; codes must not follow them then.
        """
        batch, length, width = x_BTD.shape
        qkv = self.wqkv(x_BTD).view(batch, length, 3 * self.heads, width // self.heads)
        query, key, value = self._split(qkv, table)
        if slots is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            num = slots.valid_BS.shape[1]
            mixed, seen = slots.attend(value[:, :, :num])
            if cache is not None:
                cache.put(0, torch.zeros_like(seen[:, :, 0]), seen[:, :, 0])
            if slots.bias_B1TT is not None:
                codes = F.scaled_dot_product_attention(
                    query[:, :, num:],
                    torch.cat([torch.zeros_like(seen), key[:, :, num:]], dim=2),
                    torch.cat([seen, value[:, :, num:]], dim=2),
                    attn_mask=slots.bias_B1TT.to(query.dtype),
                )
                mixed = torch.cat([mixed, codes], dim=2)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, width))

    def step(
        self, x_BD: Tensor, table: Tensor, cache: DecodeCache, layer: int, position: int
    ) -> Tensor:
        """Attend from one position, whose key and value enter the cache.

        Args:
            x_BD: input at `position`.
            table: [1, K/2, 2] rotary row of the position.
            cache: holds the positions before.
            layer: which of the cache's layers this is.
            position: counted with all condition slots as one.
        """
        batch, width = x_BD.shape
        qkv = cache.linear(x_BD, self.wqkv).view(batch, 1, 3 * self.heads, width // self.heads)
        query, key, value = self._split(qkv, table)
        own = cache.layers[layer]
        own.put(position, key[:, :, 0], value[:, :, 0])
        mixed_BHK = attend_one(query[:, :, 0], own, position + 1, cache.bias_B11T)
        return cache.linear(mixed_BHK.flatten(1), self.wo)

    def _split(self, qkv: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3H, K) -> turned queries, turned keys and values, each (B, H, T, K)."""
        turned = apply_rotary(qkv[:, :, : 2 * self.heads], table)
        query, key = turned.transpose(1, 2).chunk(2, dim=1)
        return query, key, qkv[:, :, 2 * self.heads :].transpose(1, 2)


class GatedFeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), no biases. Source: arXiv:2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def step(self, x_BD: Tensor, linear: PackedLinears) -> Tensor:
        """One position of each image."""
        gate, up = linear.fused(x_BD, self.w1, self.w3)
        return linear(F.silu(gate) * up, self.w2)
