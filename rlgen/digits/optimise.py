"""The loop that all the tiny models are trained with.

Owns the optimiser, its schedule and where initial weights come from; must not know the models.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Make modules built in the block depend on the seed alone, and the block leave no trace."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def minimize(
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    num_steps: int,
    max_lr: float,
    on_step: OnStep | None = None,
) -> None:
    """Train the module's free parameters with AdamW under a one-cycle schedule; leave it in eval.

    Args:
        loss_at: gives the scalar loss of a step, counted from 0; all randomness is its own.
    """
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=max_lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=max_lr, total_steps=num_steps + 1, pct_start=0.2
    )
    for step in range(num_steps):
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, num_steps)
    module.requires_grad_(False).eval()


def draw_rows(num_rows: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw rows of a data set with replacement: int64 [batch_size]."""
    return torch.randint(num_rows, (batch_size,), generator=generator)
