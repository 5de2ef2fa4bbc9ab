"""The frozen rule that makes a public model's weights from a seed, a tensor's name and its shape.

Golden cases store no weights: whoever follows this rule gets the same ones. Owns the rule alone.
A tensor is drawn from numpy's legacy generator, whose output never changes, seeded with the CRC
of "seed:name"; its name and shape decide the distribution.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

VERSION = 1

_COMPUTED = (
    "num_batches_tracked",
    "attn_bias_for_masking",
    "lvl_1L",
    "zero_k_bias",
    "ema_vocab_hit_SV",
    "codebook_used",
    "attn.mask",
    "attn_mask",
    "freqs_cis",
    "k_cache",
    "v_cache",
)
"""Entries that models compute by themselves."""
_TABLES = (
    "tok_embeddings.weight",
    "embedding_table.weight",
    "tok_emb.weight",
    "token_embedding.weight",
    "class_emb.weight",
    "lvl_embed.weight",
    "embedding.weight",
    "uncond_embedding",
    "class_embedding",
)
_POSITIONS = ("pos_emb", "pos_1LC", "pos_start", "positional_embedding")


class Distribution(NamedTuple):
    """normal: mean a, standard deviation b; uniform: from a to b; constant: a."""

    kind: Literal["normal", "uniform", "constant"]
    a: float
    b: float = 0.0


def is_made(name: str) -> bool:
    """Whether the rule makes this tensor; others stay as the model computes them."""
    return not _has_ending(name, _COMPUTED)


def distribution_of(name: str, shape: Sequence[int]) -> Distribution:
    """What a tensor is drawn from; the first rule that fits counts."""
    by_name = (
        (("running_var",), Distribution("uniform", 0.75, 1.25)),
        (("running_mean",), Distribution("normal", 0.0, 0.05)),
        (("logit_scale",), Distribution("constant", math.log(1 / 0.07))),
        (("scale_mul_1H11",), Distribution("normal", math.log(4.0), 0.3)),
        (_TABLES, Distribution("normal", 0.0, 0.5)),
        (_POSITIONS, Distribution("normal", 0.0, 0.3)),
        (("ada_gss",), Distribution("normal", 0.0, 0.3)),
    )
    for endings, distribution in by_name:
        if _has_ending(name, endings):
            return distribution
    if len(shape) == 2 and _has_ending(name, ("text_projection", "proj")):
        return Distribution("normal", 0.0, 1.0 / math.sqrt(shape[0]))  # applied from the right
    if len(shape) <= 1:
        is_bias = name.endswith("bias")
        return Distribution("normal", *((0.0, 0.02) if is_bias else (1.0, 0.05)))
    fan_in = math.prod(shape[1:])
    is_inception = name.startswith(("Conv2d_", "Mixed_"))
    return Distribution("normal", 0.0, math.sqrt((2.0 if is_inception else 1.0) / fan_in))


def make_array(seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
    """The float32 array that the rule assigns to a public tensor name and shape."""
    kind, a, b = distribution_of(name, shape)
    shape = tuple(shape)
    if kind == "constant":
        return np.full(shape, a, dtype=np.float32)
    generator = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    if kind == "uniform":
        return np.asarray(a + (b - a) * generator.random_sample(shape), dtype=np.float32)
    array = np.asarray(generator.standard_normal(shape), dtype=np.float32)
    array *= np.float32(b)  # in float32, as the rule says, and in place
    array += np.float32(a)
    return array


def make_normal(seed: int, name: str, shape: Sequence[int], *, std: float) -> np.ndarray:
    """A float32 normal array of mean 0 from the same kind of stream, for large inputs."""
    generator = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    return generator.standard_normal(tuple(shape)).astype(np.float32) * np.float32(std)


def make_tensor(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """`make_array` as a float32 tensor."""
    return torch.from_numpy(make_array(seed, name, shape))


def _has_ending(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
