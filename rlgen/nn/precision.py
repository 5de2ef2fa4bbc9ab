"""Number formats: float32 throughout, or bfloat16 products with float32 where it matters.

A sampler holds its weights in bfloat16, a learner keeps float32 and casts at each product
(autocast). Both compute the same if what autocast leaves in float32 is float32 in the sampler too:
the residual stream with what is added to it, and the normalisations.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from rlgen.config.base import Dtype


def cast_parameters(module: nn.Module, dtype: Dtype, *, keep: Collection[str] = ()) -> None:
    """Change the parameters' format in place; linear layers then take inputs of any format.

    Buffers keep theirs: rotary tables and codebooks lose too much in bfloat16.

    Args:
        module: float32.
        dtype: of the parameters.
        keep: parts that stay as they are: names of parameters or submodules without the path to
            them, such as "norm", which is no part of "attention_norm".
    """
    if dtype == "float32":
        return
    target = getattr(torch, dtype)
    for name, parameter in module.named_parameters():
        if not set(keep) & set(name.split(".")):
            parameter.data = parameter.data.to(target)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(_enter)


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[None]:
    """Matrix products in this format; parameters and sums stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def _enter(layer: nn.Linear, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What autocast does to the inputs of a product."""
    return tuple(x.to(layer.weight.dtype) for x in inputs)
