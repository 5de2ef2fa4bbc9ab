"""Pretraining of the digits' base policy by next-token prediction.

Owns its recipe. It stops short of perfect on purpose, so that there is something to gain.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import CLASS_NAMES, DigitsData
from rlgen.digits.optimise import OnStep, draw_rows, seeded_init
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.tokenizers.conv_vq import ConvVQ

BATCH_SIZE = 128
LR = 2e-3
WARMUP_STEPS = 20


def train_policy(
    data: DigitsData, tokenizer: ConvVQ, config: DigitsConfig, *, on_step: OnStep | None = None
) -> LlamaGen:
    """Train a tiny LlamaGen on the tokens of the training digits.

    A constant rate after the warm-up leaves the weights where a longer run could go on from.
    """
    with seeded_init(config.policy_seed):
        policy = LlamaGen(
            LlamaGenConfig(
                num_layers=config.policy_layers,
                num_heads=config.policy_heads,
                width=config.policy_width,
                grid_size=tokenizer.grid_size,
                codebook_size=tokenizer.codebook_size,
                num_classes=len(CLASS_NAMES),
                ffn_multiple_of=32,
            )
        )
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
    labels_B: Tensor, dropout: float, policy: LlamaGen, generator: torch.Generator
) -> Tensor:
    dropped = torch.rand(labels_B.shape, generator=generator) < dropout
    assert policy.null_class is not None, "LlamaGen has a null class"
    return torch.where(dropped, policy.null_class, labels_B)
