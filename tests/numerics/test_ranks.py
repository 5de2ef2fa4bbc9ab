"""A step split over two or four ranks, by DDP or FSDP2, is the step of one rank.

What differs is the order of float32 sums. Gradients show it as some 1e-7 of the largest one. AdamW
divides by their size, so that a weight whose gradient vanishes but for rounding (a bias of keys)
goes either way; such a weight moves no logit, and so policies are compared by their logits.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.errors import NumericsError
from rlgen.nn.weights import state_sha256
from tests.ranks import (
    POLICIES,
    batches_of,
    config_for,
    first_gradients,
    learner_of,
    logits_under,
    on_ranks,
    own_share,
)

NUM_STEPS = 3
GRADIENT_TOLERANCES = {"llamagen": 1e-6, "vqgan_gpt": 1e-6, "var": 2e-5}
"""Of the largest gradient. Found were 3e-7, float32 sums in another order, and 9e-6 for VAR, whose
heads multiply cosines by up to 100 before the softmax, and rounding with them."""
MOVEMENT_TOLERANCES = {"llamagen": 3e-5, "vqgan_gpt": 3e-5, "var": 2e-4}
"""Of the largest change of a logit in six optimiser steps. Found were 9e-6 and 7e-5."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llamagen", {}),
    "guided": (
        "llamagen",
        {"rollout__cfg_scale": 1.5, "grpo__ratio": "sequence", "entropy__base_coef": 0.01},
    ),
    "ema": ("llamagen", {"grpo__reference": "ema", "grpo__reference_decay": 0.5}),
    "lora": ("llamagen", {"learner__lora": {"rank": 3, "alpha": 6.0}}),
    "checkpointing": ("llamagen", {"learner__gradient_checkpointing": True}),
    "vqgan": ("vqgan_gpt", {}),
    "var": ("var", {"grpo__scale_weight_alpha": 0.7, "learner__gradient_checkpointing": True}),
}
BFLOAT16: dict[str, tuple[str, dict[str, Any]]] = {
    f"bfloat16-{family}": (
        family,
        {"learner__dtype": "bfloat16", "grpo__kl_coef": 0.0, "grpo__inner_epochs": 1},
    )
    for family in POLICIES
}
ON_FOUR = ("plain", "lora", "var")
SHARDINGS = ("ddp", "fsdp")


def updates(case: str, sharding: str, world_size: int) -> dict[str, Any]:
    family, settings = (CASES | BFLOAT16)[case]
    config = config_for(settings, sharding=sharding, world_size=world_size)
    learner = learner_of(family, config)
    batches = batches_of(POLICIES[family](), config, NUM_STEPS)
    with first_gradients(learner) as gradients:
        metrics = [learner.update(own_share(batch)) for batch in batches]
    return {"metrics": metrics, "gradients": gradients, "weights": learner.policy_state()}


def failures(sharding: str, world_size: int) -> dict[str, Any]:
    """What every rank says of a number that only the last one sees."""
    config = config_for({}, sharding=sharding, world_size=world_size)
    [batch] = batches_of(POLICIES["llamagen"](), config, 1)
    found: dict[str, Any] = {}
    undisturbed = learner_of("llamagen", config)
    undisturbed.update(own_share(batch))
    found["nothing after"] = undisturbed.policy_state()
    for what, field in (("gradient", "advantages_B"), ("ratio", "rollout_logprobs_BL")):
        learner = learner_of("llamagen", config)
        values = np.copy(getattr(batch, field))
        values[-1] = math.nan
        before = learner.policy_state()
        try:
            learner.update(own_share(replace(batch, **{field: values})))
        except NumericsError as error:
            found[what] = str(error)
        found[f"{what} moved"] = state_sha256(before) != state_sha256(learner.policy_state())
        learner.update(own_share(batch))
        found[f"{what} after"] = learner.policy_state()
    return found


def work(rank: int, world_size: int) -> dict[str, Any]:
    """What each process does; starting them takes most of the time."""
    cases = [*CASES, *BFLOAT16] if world_size == 2 else ON_FOUR
    results = {
        f"{case}-{sharding}": updates(case, sharding, world_size)
        for sharding in SHARDINGS
        for case in cases
    }
    return results | {f"failures-{s}": failures(s, world_size) for s in SHARDINGS}


@pytest.fixture(scope="module")
def results_by_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, what each of them found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    results = {}
    for world_size in (2, 4):
        (folder / str(world_size)).mkdir()
        results[world_size] = on_ranks(world_size, folder / str(world_size), work, world_size)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one rank finds."""
    return {case: updates(case, "ddp", 1) for case in CASES}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    ("world_size", "case"), [(2, case) for case in CASES] + [(4, case) for case in ON_FOUR]
)
def test_several_ranks_end_where_one_rank_ends(
    results_by_rank, alone, sharding: str, world_size: int, case: str
) -> None:
    ranks = [results[f"{case}-{sharding}"] for results in results_by_rank[world_size]]
    one, family = alone[case], CASES[case][0]
    first = ranks[0]

    assert all(other["metrics"] == first["metrics"] for other in ranks), "of the whole step"
    for step, (ours, theirs) in enumerate(zip(first["metrics"], one["metrics"], strict=True)):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, key)

    assert first["gradients"].keys() == one["gradients"].keys()
    tolerance = GRADIENT_TOLERANCES[family]
    largest = max(gradient.abs().max().item() for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(
            first["gradients"][name], gradient, rtol=0, atol=tolerance * largest, msg=name
        )

    base = logits_under(family, POLICIES[family]().state_dict())
    expected = logits_under(family, one["weights"])
    moved = (expected - base).abs().max().item()
    assert moved > 0.05, "six optimiser steps of 1e-3"
    gap = (logits_under(family, first["weights"]) - expected).abs().max().item()
    assert gap < MOVEMENT_TOLERANCES[family] * moved
    for other in ranks[1:]:
        if sharding == "ddp":
            assert state_sha256(other["weights"]) == state_sha256(first["weights"])
        else:
            assert other["weights"] == {}, "whole weights are gathered on rank 0 alone"


def test_the_later_steps_are_off_policy(alone) -> None:
    last = alone["plain"]["metrics"][2]
    assert last["policy/lag_steps"] == 2.0
    assert last["policy/logprob_gap_max"] > 1e-3
    assert abs(last["grpo/importance_mean"] - 1.0) > 1e-5


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_what_one_rank_alone_finds_not_finite_stops_all_before_the_step(
    results_by_rank, sharding: str, world_size: int
) -> None:
    found = [results[f"failures-{sharding}"] for results in results_by_rank[world_size]]
    for rank in found:
        assert "gradient norm is nan at step 0; the optimiser was not stepped" in rank["gradient"]
        assert "|ratio - 1| reaches nan" in rank["ratio"]
        assert not rank["gradient moved"] and not rank["ratio moved"]
    # DDP forms other buckets after the first pass, in which four ranks add in another order.
    digests = {state_sha256(found[0][f"{what} after"]) for what in ("gradient", "ratio", "nothing")}
    assert len(digests) == 1 or (sharding == "ddp" and world_size == 4)
    expected = logits_under("llamagen", found[0]["nothing after"])
    for what in ("gradient", "ratio"):
        after = logits_under("llamagen", found[0][f"{what} after"])
        torch.testing.assert_close(after, expected, rtol=0, atol=3e-5)  # logits up to about 5


@pytest.mark.parametrize("case", BFLOAT16)
def test_in_bfloat16_both_shardings_compute_the_same(results_by_rank, case: str) -> None:
    ddp, fsdp = (results_by_rank[2][0][f"{case}-{sharding}"] for sharding in SHARDINGS)
    first, other = ddp["metrics"][0], fsdp["metrics"][0]
    assert first["policy/logprob_gap_mean"] > 1e-4, "the batch was drawn in float32"
    assert other["policy/logprob_gap_mean"] == pytest.approx(first["policy/logprob_gap_mean"])
    assert {tensor.dtype for tensor in fsdp["weights"].values()} == {torch.float32}
    largest = max(gradient.abs().max().item() for gradient in ddp["gradients"].values())
    for name, gradient in ddp["gradients"].items():
        # The same products of the same micro-batches; only the sum over the norm differs.
        torch.testing.assert_close(
            fsdp["gradients"][name], gradient, rtol=0, atol=1e-6 * largest, msg=name
        )
