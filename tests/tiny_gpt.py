"""The next-token policies in miniature, with weights so large that nothing is near uniform."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlgen.policies.captions import Captions
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.policies.vqgan_gpt import VqganGpt, VqganGptConfig

NUM_CLASSES = 4
CODEBOOK_SIZE = 40
FEATURE_WIDTH = 12
NUM_SLOTS = 9
VALID_TOKENS = (1, 3, 7, 3)
"""Of the four tiny captions; the table is 7 long, shorter than the slots."""


def randomized(policy: nn.Module, seed: int) -> None:
    """Draw every parameter; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            is_scale = "norm" in name or ("ln" in name and name.endswith("weight"))
            mean, std = (1.0, 0.2) if is_scale else (0.0, 0.3)
            parameter.normal_(mean, std, generator=generator)


def tiny_captions(valid_tokens: Sequence[int] = VALID_TOKENS, seed: int = 0) -> Captions:
    """Random features; the padding holds values, as an encoder's does."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(valid_tokens), max(valid_tokens), FEATURE_WIDTH, generator=generator)
    prompts = tuple(f"caption {index}" for index in range(len(valid_tokens)))
    return Captions(prompts, features, torch.tensor(valid_tokens))


def tiny_llamagen(seed: int = 0, **fields: Any) -> LlamaGen:
    """Class-conditional; `fields` are of LlamaGenConfig."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "width": 24, "grid_size": 3}
    sizes |= {"codebook_size": CODEBOOK_SIZE, "num_classes": NUM_CLASSES, "ffn_multiple_of": 16}
    policy = LlamaGen(LlamaGenConfig(**(sizes | fields)))
    randomized(policy, seed)
    return policy


def tiny_text_llamagen(
    seed: int = 0, *, valid_tokens: Sequence[int] = VALID_TOKENS, **fields: Any
) -> LlamaGen:
    """Text-conditional, with the tiny captions as its classes."""
    sizes = {"caption_width": FEATURE_WIDTH, "num_caption_slots": NUM_SLOTS}
    policy = tiny_llamagen(seed, **(sizes | fields))
    embedding = policy.cls_embedding.get_buffer("uncond_embedding")
    embedding.normal_(generator=torch.Generator().manual_seed(seed))
    policy.set_captions(tiny_captions(valid_tokens))
    return policy


def tiny_vqgan_gpt(seed: int = 0, **fields: Any) -> VqganGpt:
    """taming's GPT; without a null class unless `fields`, of VqganGptConfig, say so."""
    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "width": 24, "grid_size": 3}
    sizes |= {"codebook_size": CODEBOOK_SIZE, "num_classes": NUM_CLASSES}
    policy = VqganGpt(VqganGptConfig(**(sizes | fields)))
    randomized(policy, seed)
    return policy


def random_images(policy: LlamaGen | VqganGpt, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Class ids [B], and tokens [B, L]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(policy.codebook_size, (batch, policy.num_tokens), generator=generator)
    return torch.arange(batch) % policy.num_classes, tokens
