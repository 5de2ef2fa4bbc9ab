"""Number formats: float32 throughout, or bfloat16 arithmetic with float32 where it matters."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rlgen.config.base import Dtype


def cast_parameters(module: nn.Module, dtype: Dtype) -> None:
    """Change the parameters' format in place.

    Buffers keep theirs: rotary tables and codebooks lose too much in bfloat16.
    """
    target = getattr(torch, dtype)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(target)


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[None]:
    """Matrix products in this format; parameters and sums stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
