"""Low-rank adaptation of linear layers: the weight becomes W + alpha / rank * B A.

Owns the parametrisation and the merged weights. The sum is formed before the product, so that
a learner with adapters and a sampler with merged weights compute the same numbers.
Source: arXiv:2106.09685.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_ORIGINAL = ".parametrizations.weight.original"
_ADAPTER = ".parametrizations.weight.0."


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a weight; zero at the start."""

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        num_out, num_in = weight.shape
        rank = min(rank, num_out, num_in)
        self.scale = alpha / rank
        self.is_enabled = True
        self.down = nn.Parameter(weight.new_empty(rank, num_in))
        self.up = nn.Parameter(weight.new_zeros(num_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out, in]."""
        if not self.is_enabled:
            return weight
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_lora(module: nn.Module, *, rank: int, alpha: float, seed: int) -> None:
    """Freeze a module and give every linear layer of its blocks an adapter.

    The head and the embeddings stay as they are. Every rank of a group makes the same adapters.

    Args:
        module: its transformer blocks must stand in a ModuleList.
        rank: rows of A; smaller where a layer is.
        alpha: the addition is scaled by alpha / rank.
        seed: of A; B starts at zero.
    """
    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for blocks in [child for child in module.children() if isinstance(child, nn.ModuleList)]:
            for linear in [m for m in blocks.modules() if isinstance(m, nn.Linear)]:
                low_rank = LowRank(linear.weight, rank=rank, alpha=alpha)
                parametrize.register_parametrization(linear, "weight", low_rank)


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Use the frozen weights alone within the block."""
    adapters = [m for m in module.modules() if isinstance(m, LowRank)]
    for adapter in adapters:
        adapter.is_enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_enabled = True


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state under its public names, adapters merged in; without any, its state."""
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(_ORIGINAL):
                owner = name.removesuffix(_ORIGINAL)
                linear = module.get_submodule(owner)
                assert isinstance(linear, nn.Linear), owner
                state[f"{owner}.weight"] = linear.weight.detach()
            elif _ADAPTER not in name:
                state[name] = tensor
    return state


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone; empty if there are none."""
    return {name: tensor for name, tensor in module.state_dict().items() if _ADAPTER in name}
