"""A policy over the ranks of a group: DDP keeps it whole on each, FSDP2 a share on each.

Owns how a policy is spread, when gradients travel, and the way between shares and whole tensors.
What leaves a learner (weights, checkpoints) is always whole, so that it fits any number of ranks
and either kind. Must not know the loss.
Source: FSDP2 is torch.distributed.fsdp.fully_shard.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Sharding = Literal["ddp", "fsdp"]


def spread(module: nn.Module, *, sharding: Sharding, device: torch.device) -> nn.Module:
    """Spread a module over the ranks of the default process group.

    Under fsdp the transformer blocks, which must stand in a ModuleList, and the rest are gathered
    apart, for as long as they compute. Only a call of the module itself gathers, not one of its
    other methods. Shares and sums of gradients are float32, and so is what is gathered: autocast
    makes bfloat16 of it at each product, as under ddp, so that the samplers' log-probs are met as
    closely. Gathered in bfloat16, norms and tables would be rounded too: half the bytes to
    gather, and about twice the gap.

    Args:
        module: equal on all ranks, on the device; changed in place under fsdp.
        sharding: "ddp" or "fsdp".
        device: of this rank.
    Returns:
        what to call; the module itself if there is one rank, or nothing is trained under ddp.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return module
    if sharding == "ddp":
        is_trained = any(parameter.requires_grad for parameter in module.parameters())
        return DistributedDataParallel(module) if is_trained else module
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in [child for child in module.children() if isinstance(child, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mesh=mesh)
    # A root left gathered after a pass without gradients would hide its share from the optimiser.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module


def send_gradients(module: nn.Module, *, is_last: bool) -> None:
    """Say whether the next backward pass is the last before the optimiser's step.

    Gradients travel with the last one alone. Until then fsdp holds whole ones on every rank:
    4 bytes a parameter beside the shares.
    """
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = is_last
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)


def limit_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm.

    Returns:
        the norm before, over all parameters; the same on every rank. If it is not finite, the
        gradients are as they were.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    norm = _whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    if norm.isfinite():
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm.item()


def gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with whole tensors in place of shares; every rank must call it.

    Args:
        state: tensors and plain values, also in dictionaries and lists within.
    Returns:
        on rank 0 the state, with tensors that were shares on the CPU; on other ranks the same if
        nothing is shared, else {}.
    """
    keeps = not dist.is_initialized() or dist.get_rank() == 0
    found_shares = False

    def visit(value: Any) -> Any:
        nonlocal found_shares
        if isinstance(value, DTensor):
            found_shares = True
            whole = value.full_tensor()
            return whole.cpu() if keeps else None
        if isinstance(value, Mapping):
            return {key: visit(item) for key, item in value.items()}
        return [visit(item) for item in value] if isinstance(value, list) else value

    whole_state = visit(state)
    return whole_state if keeps or not found_shares else {}


def cut(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's shares of whole tensors; no rank waits for another.

    Args:
        state: whole tensors by name, the same on every rank.
        like: what is shared, and how; names that it lacks stay as they are.
    """
    return {name: _cut(tensor, like.get(name)) for name, tensor in state.items()}


def cut_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This rank's shares of a whole optimiser state, for `optimizer.load_state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {
        index: {
            # Counters of steps have no dimension and are no one's share.
            name: _cut(value, parameters[index]) if value.ndim else value
            for name, value in own.items()
        }
        for index, own in state["state"].items()
    }
    return {**state, "state": slots}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    local = tensor.to(like.device)
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)
