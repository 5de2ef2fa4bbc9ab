"""Pretraining of the digits' base policy, of any family, by maximum likelihood.

Owns its recipe. It stops short of perfect on purpose, so that there is something to gain.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import CLASS_NAMES, DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, seeded_init
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.policies.protocol import Policy
from rlgen.policies.var import VAR, VarConfig
from rlgen.policies.vqgan_gpt import VqganGpt, VqganGptConfig
from rlgen.tokenizers.multiscale_conv_vq import MultiScaleConvVQ
from rlgen.tokenizers.protocol import Tokenizer

BATCH_SIZE = 128
LR = 2e-3
WARMUP_STEPS = 20


def make_policy(tokenizer: Tokenizer, config: DigitsConfig) -> Any:
    """A tiny policy of the configured family with fresh weights, for this tokenizer's codes."""
    sizes: dict[str, Any] = {
        "width": config.policy_width,
        "num_heads": config.policy_heads,
        "codebook_size": tokenizer.codebook_size,
        "num_classes": len(CLASS_NAMES),
    }
    if config.family == "var":
        assert isinstance(tokenizer, MultiScaleConvVQ), "VAR has the multi-scale tokenizer"
        quantizer = tokenizer.quantize
        return VAR(
            VarConfig(
                depth=config.policy_layers,
                patch_nums=quantizer.patch_nums,
                code_dim=quantizer.code_dim,
                **sizes,
            ),
            quantizer,
        )
    grid: dict[str, Any] = {
        "num_layers": config.policy_layers,
        "grid_size": math.isqrt(tokenizer.num_tokens),
    }
    if config.family == "vqgan":
        return VqganGpt(VqganGptConfig(has_null_class=config.class_dropout > 0, **grid, **sizes))
    return LlamaGen(LlamaGenConfig(ffn_multiple_of=32, **grid, **sizes))


def train_policy(
    data: DigitsData, tokenizer: Tokenizer, config: DigitsConfig, *, on_step: OnStep | None = None
) -> Any:
    """Train a tiny policy on the tokens of the training digits.

    A constant rate after the warm-up leaves the weights where a longer run could go on from.
    """
    with seeded_init(config.policy_seed):
        policy = make_policy(tokenizer, config)
    with torch.inference_mode():
        tokens_NL = torch.cat(
            [tokenizer.encode(images) for images in data.train.images_rgb_01.split(2000)]
        )
    tokens_NL = tokens_NL.clone()  # an inference tensor can't enter the graph
    generator = torch.Generator().manual_seed(config.policy_seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, betas=(0.9, 0.95), fused=True)
    for step in range(config.policy_steps):
        rows = draw_rows(len(tokens_NL), BATCH_SIZE, generator)
        class_ids = _drop_labels(data.train.labels_N[rows], config.class_dropout, policy, generator)
        logits_BLV = policy(class_ids, tokens_NL[rows])
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), tokens_NL[rows].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP_STEPS)
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, config.policy_steps)
    return policy.requires_grad_(False)


def _drop_labels(
    labels_B: Tensor, dropout: float, policy: Policy, generator: torch.Generator
) -> Tensor:
    dropped = torch.rand(labels_B.shape, generator=generator) < dropout
    if policy.null_class is None:
        return labels_B
    return torch.where(dropped, policy.null_class, labels_B)
