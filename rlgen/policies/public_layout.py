"""A policy's weights as its public implementation stores them, for the public samplers to load.

Owns the wrapping, and the tables that the public modules keep as buffers and ask for when they
load strictly. `nn.public_files` is the way back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlgen.errors import CheckpointError


def public_layout(
    kind: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    first_stage: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return what the public implementation's checkpoint holds.

    LlamaGen: the tensors under `model`. VAR: the tensors at the top, with the level of each token,
    the mask and the zero key biases. taming: under `state_dict`, the transformer's tensors and
    masks with the prefix `transformer.` and the VQGAN's with `first_stage_model.`.

    Args:
        kind: "llamagen", "var" or "vqgan_gpt".
        config: fields of the family's config dataclass.
        state: the policy's tensors, by public names.
        first_stage: for "vqgan_gpt", the tensors of its VQGAN; None leaves them out.
    Raises:
        CheckpointError: another kind.
    """
    if kind == "llamagen":
        return {"model": dict(state)}
    if kind == "var":
        return {**state, **_var_tables(config)}
    if kind == "vqgan_gpt":
        own = {**state, **_causal_masks(config)}
        beside = {} if first_stage is None else first_stage
        return {
            "state_dict": {
                **{f"transformer.{name}": tensor for name, tensor in own.items()},
                **{f"first_stage_model.{name}": tensor for name, tensor in beside.items()},
            }
        }
    raise CheckpointError(
        f"weights of kind {kind!r} have no public layout; a policy is a llamagen, a var or a "
        "vqgan_gpt."
    )


def _var_tables(config: Mapping[str, Any]) -> dict[str, Tensor]:
    sides = torch.tensor(config["patch_nums"])
    level_L = torch.arange(len(sides)).repeat_interleave(sides**2)
    is_seen_LL = level_L[:, None] >= level_L[None]
    mask_LL = torch.zeros(is_seen_LL.shape).masked_fill_(~is_seen_LL, -torch.inf)
    zeros = {
        f"blocks.{index}.attn.zero_k_bias": torch.zeros(config["width"])
        for index in range(config["depth"])
    }
    return {"lvl_1L": level_L[None], "attn_bias_for_masking": mask_LL[None, None], **zeros}


def _causal_masks(config: Mapping[str, Any]) -> dict[str, Tensor]:
    length = config.get("num_positions") or config.get("num_tokens") or config["grid_size"] ** 2
    return {
        f"blocks.{index}.attn.mask": torch.ones(length, length).tril()[None, None]
        for index in range(config["num_layers"])
    }
