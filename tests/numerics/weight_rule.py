"""Frozen rule that turns a state-dict key and a shape into a weight tensor.

The parity fixtures store no weights.  Every weight of a reference model was
produced by this module from three things only: an integer seed (one per case,
written in ``cases.json``), the tensor's state-dict key in the *reference*
model's naming, and its shape.  Regenerating the same tensors here and loading
them into another implementation of the same architecture (renaming keys as
needed) must therefore reproduce the stored outputs.

The stream for a tensor is ``numpy.random.RandomState(crc32("{seed}:{key}"))``,
a legacy generator whose output NumPy guarantees never to change.  A normal
tensor is ``standard_normal(shape)`` cast to float32, times ``std``, plus
``mean`` (all in float32); a uniform tensor is ``low + (high - low) *
random_sample(shape)`` evaluated in float64 and cast to float32; a constant
tensor is filled with one float32 number.  ``spec`` picks the kind and the
numbers; the first matching line of its body wins.

Only NumPy is needed; ``torch_tensor`` and ``load_into`` import torch lazily.
Changing anything in this file invalidates every stored expectation.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

VERSION = 1

#: Last key component (or two) of entries that a model computes by itself and
#: that must be left exactly as its constructor makes them.
LEFT_ALONE = (
    "num_batches_tracked",  # batch norm counter (integer)
    "attn_bias_for_masking",  # VAR block-causal mask
    "lvl_1L",  # VAR scale index of every position
    "zero_k_bias",  # VAR: the key bias is always zero
    "ema_vocab_hit_SV",  # VAR tokenizer usage statistics
    "codebook_used",  # LlamaGen tokenizer usage statistics
    "attn.mask",  # minGPT causal mask
    "attn_mask",  # CLIP text causal mask
    "freqs_cis",  # rotary table
    "k_cache",
    "v_cache",  # key/value caches
)

#: Key endings of lookup tables and learned single vectors (std 0.5).
EMBEDDINGS = (
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

#: Key endings of learned position tables (std 0.3).
POSITIONS = ("pos_emb", "pos_1LC", "pos_start", "positional_embedding")


def is_generated(key: str) -> bool:
    """Say whether the rule produces ``key`` (False: leave the model's own value)."""
    return not any(key == s or key.endswith("." + s) for s in LEFT_ALONE)


def _ends(key, endings):
    """True if ``key`` is one of ``endings`` or ends with ``'.' + ending``."""
    return any(key == e or key.endswith("." + e) for e in endings)


def spec(key: str, shape) -> tuple[str, float, float]:
    """Return ``(kind, a, b)`` for a tensor; first matching line wins.

    kind ``normal``: a = mean, b = std.  kind ``uniform``: a = low, b = high.
    kind ``constant``: a = value, b unused (0).
    ``fan_in`` below is the product of all dimensions but the first.
    """
    shape = tuple(int(s) for s in shape)
    if _ends(key, ("running_var",)):
        return "uniform", 0.75, 1.25
    if _ends(key, ("running_mean",)):
        return "normal", 0.0, 0.05
    if _ends(key, ("logit_scale",)):
        return "constant", math.log(1 / 0.07), 0.0
    if _ends(key, ("scale_mul_1H11",)):
        return "normal", math.log(4.0), 0.3
    if _ends(key, EMBEDDINGS):
        return "normal", 0.0, 0.5
    if _ends(key, POSITIONS):
        return "normal", 0.0, 0.3
    if _ends(key, ("ada_gss",)):
        return "normal", 0.0, 0.3
    if _ends(key, ("text_projection", "proj")) and len(shape) == 2:
        return "normal", 0.0, 1.0 / math.sqrt(shape[0])  # used as x @ W
    if len(shape) <= 1 and key.endswith("bias"):
        return "normal", 0.0, 0.02
    if len(shape) <= 1:
        return "normal", 1.0, 0.05  # norm scales
    fan_in = math.prod(shape[1:])
    if key.startswith(("Conv2d_", "Mixed_")):
        return "normal", 0.0, math.sqrt(2.0 / fan_in)  # conv followed by ReLU
    return "normal", 0.0, 1.0 / math.sqrt(fan_in)


def stream(seed: int, key: str) -> np.random.RandomState:
    """The frozen random stream belonging to ``(seed, key)``."""
    return np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()))


def make(seed: int, key: str, shape) -> np.ndarray:
    """The float32 tensor that the rule assigns to ``key`` with ``shape``."""
    kind, a, b = spec(key, shape)
    shape = tuple(int(s) for s in shape)
    if kind == "constant":
        return np.full(shape, a, dtype=np.float32)
    rs = stream(seed, key)
    if kind == "uniform":
        return np.asarray(a + (b - a) * rs.random_sample(shape), dtype=np.float32)
    z = np.asarray(rs.standard_normal(shape), dtype=np.float32)
    z *= np.float32(b)
    z += np.float32(a)
    return z


def normal(seed: int, name: str, shape, mean=0.0, std=1.0) -> np.ndarray:
    """A float32 normal array from the same kind of stream (for big test inputs)."""
    z = np.asarray(stream(seed, name).standard_normal(tuple(shape)), dtype=np.float32)
    return z * np.float32(std) + np.float32(mean)


def torch_tensor(seed: int, key: str, shape, dtype=None):
    """``make`` as a torch tensor (float32 unless ``dtype`` is given)."""
    import torch

    t = torch.from_numpy(make(seed, key, shape))
    return t if dtype is None else t.to(dtype)


def load_into(module, seed: int, rename=None) -> list[str]:
    """Fill every generated entry of ``module.state_dict()`` in place.

    ``rename`` maps a key of this module to the reference key whose stream is
    to be used (None: same name; a rename that returns None skips the entry).
    It suits implementations that keep the reference's tensor shapes; where
    tensors are fused, split or transposed, call ``make`` with the reference
    key and shape from ``cases.json`` and convert.  Returns the keys filled.
    """
    import torch

    done = []
    with torch.no_grad():
        for key, value in module.state_dict().items():
            ref = key if rename is None else rename(key)
            if ref is None or not is_generated(ref) or not value.is_floating_point():
                continue
            value.copy_(torch_tensor(seed, ref, value.shape))
            done.append(key)
    return done
