"""A step split over two ranks is the step of one rank, but for float32 rounding."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rlgen.config import RunConfig
from rlgen.learner.batch import split_batch
from rlgen.learner.learner import Learner
from rlgen.types import LearnerBatch
from tests.tiny import CPU, sampled_batch, tiny_config, tiny_policy

WORLD_SIZE = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"grpo__kl_coef": 0.05},
    "guided": {
        "rollout__cfg_scale": 1.5,
        "grpo__ratio": "sequence",
        "grpo__kl_coef": 0.05,
        "entropy__base_coef": 0.01,
    },
}


def config_of(name: str) -> RunConfig:
    """Six images for each of two ranks, in micro-batches that don't divide them."""
    return tiny_config(
        steps=3, grpo__inner_epochs=2, learner__micro_batch_size=4, learner__lr=1e-3,
        **SETTINGS[name],
    )  # fmt: skip


def batches_of(config: RunConfig) -> list[LearnerBatch]:
    """Three steps of the base policy: the first on policy, the others stale."""
    return [sampled_batch(tiny_policy(), config, step=step) for step in range(3)]


def updates(config: RunConfig, *, rank: int, world_size: int) -> dict[str, Any]:
    learner = Learner(tiny_policy(), config, device=CPU)
    metrics = [
        learner.update(split_batch(batch, rank=rank, world_size=world_size))
        for batch in batches_of(config)
    ]
    return {"metrics": metrics, "weights": learner.policy.state_dict()}


def run_rank(rank: int, folder: str) -> None:
    """What each spawned process does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD_SIZE
    )
    try:
        results = {
            name: updates(config_of(name), rank=rank, world_size=WORLD_SIZE) for name in SETTINGS
        }
        torch.save(results, f"{folder}/rank-{rank}.pt")
    finally:
        dist.destroy_process_group()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def results_by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found for all settings; starting them takes most of the time."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_end_where_one_rank_ends(results_by_rank, name: str) -> None:
    ranks = [results[name] for results in results_by_rank]
    alone = updates(config_of(name), rank=0, world_size=1)

    assert largest_difference(ranks[0]["weights"], ranks[1]["weights"]) == 0.0
    assert ranks[0]["metrics"] == ranks[1]["metrics"], "metrics are of the whole step"

    moved = largest_difference(alone["weights"], tiny_policy().state_dict())
    assert moved > 1e-3, "six optimiser steps of 1e-3"
    # Gradients are summed in another order. AdamW divides by their size, so that rounding shows
    # most where a gradient nearly vanishes; the largest difference is a thousandth of the way.
    assert largest_difference(ranks[0]["weights"], alone["weights"]) < 1e-3 * moved

    for step, (ours, theirs) in enumerate(zip(ranks[0]["metrics"], alone["metrics"], strict=True)):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, key)
    assert alone["metrics"][2]["policy/ratio_max_deviation"] > 1e-3, "later steps are off policy"
