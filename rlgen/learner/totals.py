"""Sums over micro-batches and ranks, turned into a step's metrics.

Shapes: B images, L image tokens.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from rlgen.grpo.loss import Importance, Surrogate

_SUMS = (
    "loss/total",
    "loss/policy",
    "loss/kl",
    "policy/entropy",
    "policy/entropy_normalized",
    "policy/logprob_gap_mean",
)


class Totals:
    """Accumulates what one pass over the batch measured."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._clipped = torch.zeros(2, dtype=torch.float64, device=device)
        self._importance = torch.zeros(3, dtype=torch.float64, device=device)
        self._maxima = torch.zeros(2, dtype=torch.float64, device=device)

    def add(
        self,
        surrogate: Surrogate,
        loss_B: Tensor,
        kl_B: Tensor,
        entropies_BL: Tensor,
        gaps_BL: Tensor,
        importance: Importance | None,
        *,
        codebook_size: int,
    ) -> None:
        """Take in one micro-batch; gaps are the learner's log-probs less the sampler's."""
        entropy = entropies_BL.detach().mean(dim=1).double().sum()
        self._sums += torch.stack(
            [
                loss_B.detach().double().sum(),
                surrogate.loss_B.detach().double().sum(),
                kl_B.detach().double().sum(),
                entropy,
                entropy / math.log(codebook_size),
                gaps_BL.detach().double().abs().mean(dim=1).sum(),
            ]
        )
        self._clipped[0] += surrogate.clipped.sum()
        self._clipped[1] += surrogate.clipped.numel()
        if importance is not None:
            self._importance[0] += importance.weights.double().sum()
            self._importance[1] += importance.truncated.sum()
            self._importance[2] += importance.truncated.numel()
        deviation = (surrogate.ratio.double() - 1.0).abs().max()
        gap = gaps_BL.detach().double().abs().max()
        # torch.maximum passes NaN on, so that a NaN ratio can't look like a good one.
        self._maxima = torch.maximum(self._maxima, torch.stack([deviation, gap]))

    def reduced(self, num_images: int) -> dict[str, float]:
        """Means over the images of all ranks.

        Args:
            num_images: images of the step, over all ranks.
        """
        if dist.is_initialized():
            dist.all_reduce(self._sums)
            dist.all_reduce(self._clipped)
            dist.all_reduce(self._importance)
            every_rank = [torch.empty_like(self._maxima) for _ in range(dist.get_world_size())]
            dist.all_gather(every_rank, self._maxima)
            self._maxima = torch.stack(every_rank).amax(dim=0)  # a reduction with MAX loses NaN
        means = dict(zip(_SUMS, (self._sums / num_images).tolist(), strict=True))
        clipped, count = self._clipped.tolist()
        deviation, gap = self._maxima.tolist()
        weight, truncated, num_weighted = self._importance.tolist()
        return {
            **means,
            "policy/ratio_clipped_frac": clipped / count,
            "policy/ratio_max_deviation": deviation,
            "policy/logprob_gap_max": gap,
            "grpo/importance_mean": weight / num_weighted if num_weighted else 1.0,
            "grpo/importance_truncated": truncated / num_weighted if num_weighted else 0.0,
        }
