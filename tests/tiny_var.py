"""A VAR in miniature, with weights so large that its distributions are far from uniform."""

import math
from typing import Any

import torch

from rlgen.policies.var import VAR, VarConfig
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer

PATCH_NUMS = (1, 2, 3, 5)
NUM_CLASSES = 4
CODE_DIM = 6


def tiny_quantizer(
    seed: int = 0, *, patch_nums: tuple[int, ...] = PATCH_NUMS, codebook_size: int = 33
) -> MultiScaleQuantizer:
    """A quantizer with a random codebook and random phis."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        quantizer = MultiScaleQuantizer(MultiScaleConfig(codebook_size, CODE_DIM, patch_nums))
    return quantizer.requires_grad_(False)


def tiny_var(
    seed: int = 0,
    *,
    patch_nums: tuple[int, ...] = PATCH_NUMS,
    codebook_size: int = 33,
    **fields: Any,
) -> VAR:
    """A VAR of two blocks; `fields` are of VarConfig."""
    sizes: dict[str, Any] = {"depth": 2, "width": 24, "num_heads": 3, "num_classes": NUM_CLASSES}
    config = VarConfig(
        patch_nums=patch_nums, codebook_size=codebook_size, code_dim=CODE_DIM, **(sizes | fields)
    )
    quantizer = tiny_quantizer(seed, patch_nums=patch_nums, codebook_size=codebook_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = VAR(config, quantizer)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                # Every other bias and table is zero or tiny at first, which would hide faults.
                parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.1)
                if name.endswith("scale_mul_1H11"):
                    # Heads on both sides of the limit of 100.
                    parameter += torch.linspace(0.5, 5.5, parameter.numel()).view_as(parameter)
    return policy


def random_images(policy: VAR, batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ids [B], the null class among them, and tokens [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(policy.codebook_size, (batch, policy.num_tokens), generator=generator)
    return torch.arange(batch) % (policy.num_classes + 1), tokens


assert math.log(100) < 5.5, "no head would be limited"
