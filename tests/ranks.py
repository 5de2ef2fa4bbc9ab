"""Real processes in a gloo group, and what a learner does there.

Processes are forked from a server that has imported torch once; each has one thread.
Shapes: B images, L image tokens.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rlgen.config import RunConfig
from rlgen.learner.batch import split_batch
from rlgen.learner.learner import Learner
from rlgen.learner.sharding import gathered
from rlgen.types import LearnerBatch
from tests.tiny import CPU, sampled_batch, tiny_config, tiny_policy
from tests.tiny_gpt import tiny_vqgan_gpt
from tests.tiny_var import tiny_var

MICRO_BATCH_SIZES = {1: 5, 2: 4, 4: 2}
"""By the number of ranks, for their shares of 12 images; none divides its share."""
POLICIES: dict[str, Callable[[], Any]] = {
    "llamagen": tiny_policy,
    "vqgan_gpt": tiny_vqgan_gpt,
    "var": tiny_var,
}


def on_ranks(world_size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in each of some processes that form a group.

    Args:
        world_size: processes.
        folder: an empty one.
        work: a module's function; takes the rank, then `arguments`. It returns plain values and
            tensors.
    Returns:
        what they returned, by rank.
    """
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(
        _run_rank,
        args=(world_size, str(folder), work, arguments),
        nprocs=world_size,
        start_method="forkserver",
    )
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(world_size)]


def _run_rank(
    rank: int, world_size: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    try:
        torch.save(work(rank, *arguments), f"{folder}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def config_for(settings: dict[str, Any], *, sharding: str, world_size: int) -> RunConfig:
    """Twelve images in micro-batches that don't divide a rank's share; two optimiser steps each."""
    return tiny_config(
        steps=4,
        learner__lr=1e-3,
        learner__sharding=sharding,
        learner__num_workers=world_size,
        learner__micro_batch_size=MICRO_BATCH_SIZES[world_size],
        **({"grpo__inner_epochs": 2, "grpo__kl_coef": 0.05} | settings),
    )


def batches_of(policy: Any, config: RunConfig, num_steps: int) -> list[LearnerBatch]:
    """Steps of the base policy: the first on policy, the others stale."""
    return [sampled_batch(policy, config, step=step) for step in range(num_steps)]


def own_share(batch: LearnerBatch) -> LearnerBatch:
    """This rank's images."""
    if not dist.is_initialized():
        return batch
    return split_batch(batch, rank=dist.get_rank(), world_size=dist.get_world_size())


def learner_of(family: str, config: RunConfig) -> Learner:
    """A learner of a tiny policy."""
    return Learner(POLICIES[family](), config, device=CPU)


@contextmanager
def first_gradients(learner: Learner) -> Iterator[dict[str, Tensor]]:
    """Whole gradients by name, as the first optimiser step within the block finds them."""
    found: dict[str, Tensor] = {}
    step = learner.optimizer.step

    def recording_step(*args: Any, **options: Any) -> Any:
        learner.optimizer.step = step  # type: ignore[method-assign]
        named = learner.policy.named_parameters()
        gradients = gathered({name: p.grad for name, p in named if p.grad is not None})
        found.update({name: gradient.clone() for name, gradient in gradients.items()})
        return step(*args, **options)

    learner.optimizer.step = recording_step  # type: ignore[method-assign]
    yield found


def logits_under(family: str, state: dict[str, Tensor]) -> Tensor:
    """What a policy with these weights predicts for some tokens: [B, L, V]."""
    policy = POLICIES[family]()
    policy.load_state_dict(state)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(policy.codebook_size, (8, policy.num_tokens), generator=generator)
    with torch.no_grad():
        return policy.teacher_forced(torch.arange(8) % policy.num_classes, tokens)
