"""A checkpoint of any number of ranks and either sharding goes on with any other.

Two ranks add two numbers, whose order doesn't matter, so that they go on to the last bit; more or
fewer ranks, or another sharding, whose norm of the gradients is summed otherwise, to rounding.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlgen.config import RunConfig
from rlgen.errors import CheckpointError
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import dump_state, parse_state
from rlgen.nn.weights import state_sha256
from tests.ranks import (
    POLICIES,
    batches_of,
    config_for,
    learner_of,
    logits_under,
    on_ranks,
    own_share,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "everything": (
        "llamagen",
        {
            "grpo__reference": "ema",
            "grpo__reference_decay": 0.5,
            "entropy__base_coef": 0.01,
            "learner__weight_decay": 0.01,
        },
    ),
    "lora": ("llamagen", {"learner__lora": {"rank": 3, "alpha": 6.0}}),
    "var": ("var", {}),
}
SAVED_AFTER, NUM_STEPS = 2, 4
TOLERANCES = {"everything": 3e-5, "lora": 3e-5, "var": 2e-4}
"""Of the largest change of a logit, as for a run on other ranks from its start."""


def steps(learner: Learner, case: str, config: RunConfig, first: int, last: int) -> None:
    family, _ = CASES[case]
    for batch in batches_of(POLICIES[family](), config, last)[first:]:
        learner.update(own_share(batch))


def config_of(case: str, sharding: str, world_size: int) -> RunConfig:
    return config_for(CASES[case][1], sharding=sharding, world_size=world_size)


def end_of(learner: Learner) -> dict[str, Any]:
    return {"weights": learner.policy_state(), "state": learner.state_dict()}


def start_and_save(case: str, sharding: str, world_size: int, file: str) -> dict[str, Any]:
    """An uninterrupted run, and its checkpoint after two steps."""
    config = config_of(case, sharding, world_size)
    learner = learner_of(CASES[case][0], config)
    steps(learner, case, config, 0, SAVED_AFTER)
    weights, state = learner.policy_state(), learner.state_dict()  # on every rank
    if weights:
        Path(file).write_bytes(dump_state({"weights": weights, "state": state}))
    steps(learner, case, config, SAVED_AFTER, NUM_STEPS)
    return end_of(learner)


def resume(case: str, sharding: str, world_size: int, file: str) -> dict[str, Any]:
    """The last two steps, from a checkpoint."""
    config = config_of(case, sharding, world_size)
    learner = learner_of(CASES[case][0], config)
    if config.learner.lora is None:
        with torch.no_grad():
            for parameter in learner.policy.parameters():
                parameter.zero_()  # every weight must come from the checkpoint
    saved = parse_state(Path(file).read_bytes(), file)
    if config.learner.lora is None:
        learner.load_policy_state(saved["weights"], file)
    learner.load_state_dict(saved["state"])
    steps(learner, case, config, SAVED_AFTER, NUM_STEPS)
    return end_of(learner)


def misfit(sharding: str) -> str:
    """What a rank says of weights of another shape."""
    learner = learner_of("llamagen", config_of("everything", sharding, 2))
    weights = POLICIES["llamagen"]().state_dict()
    weights["output.weight"] = weights["output.weight"][:-1]
    try:
        learner.load_policy_state(weights, "some-file")
    except CheckpointError as error:
        return str(error)
    return ""


def work_of_two(rank: int, folder: str) -> dict[str, Any]:
    """What each of two ranks does."""
    results: dict[str, Any] = {"misfit": misfit("fsdp")}
    for case in CASES:
        file = f"{folder}/{case}-fsdp.pt"
        results[f"whole-{case}"] = start_and_save(case, "fsdp", 2, file)
        torch.distributed.barrier()  # rank 0 has written
        results[f"resumed-{case}"] = resume(case, "fsdp", 2, file)
        results[f"ddp-{case}"] = resume(case, "ddp", 2, file)
        results[f"one-{case}"] = resume(case, "fsdp", 2, f"{folder}/{case}-one.pt")
    return results


def work_of_four(rank: int, folder: str) -> dict[str, Any]:
    """What each of four ranks does."""
    return {case: resume(case, "fsdp", 4, f"{folder}/{case}-fsdp.pt") for case in CASES}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case and way, where rank 0 ended."""
    folder = tmp_path_factory.mktemp("resume")
    for world_size in (2, 4):
        (folder / str(world_size)).mkdir()
    found = {
        f"alone-{case}": start_and_save(case, "ddp", 1, f"{folder}/{case}-one.pt") for case in CASES
    }
    [of_two, _] = on_ranks(2, folder / "2", work_of_two, str(folder))
    found |= of_two
    [of_four, *_] = on_ranks(4, folder / "4", work_of_four, str(folder))
    found |= {f"four-{case}": end for case, end in of_four.items()}
    return found | {
        f"onto-one-{case}": resume(case, "ddp", 1, f"{folder}/{case}-fsdp.pt") for case in CASES
    }


def tensors_in(value: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value}
    nested: dict[Any, Any] = {}
    if isinstance(value, dict):
        nested = value
    elif isinstance(value, list):
        nested = dict(enumerate(value))
    return {
        name: tensor
        for key, item in nested.items()
        for name, tensor in tensors_in(item, f"{prefix}.{key}").items()
    }


@pytest.mark.parametrize("case", CASES)
def test_the_same_ranks_go_on_to_the_last_bit(ends, case: str) -> None:
    resumed, whole = ends[f"resumed-{case}"], ends[f"whole-{case}"]
    assert state_sha256(tensors_in(resumed)) == state_sha256(tensors_in(whole))
    assert len(tensors_in(whole)) > 2 * len(whole["weights"]) or case == "lora"


@pytest.mark.parametrize("way", ["ddp", "four", "onto-one", "one"])
@pytest.mark.parametrize("case", CASES)
def test_other_ranks_and_the_other_sharding_go_on_to_rounding(ends, case: str, way: str) -> None:
    family = CASES[case][0]
    found, whole = ends[f"{way}-{case}"], ends[f"whole-{case}"]
    expected = logits_under(family, whole["weights"])
    base = logits_under(family, POLICIES[family]().state_dict())
    moved = (expected - base).abs().max().item()
    gap = (logits_under(family, found["weights"]) - expected).abs().max().item()
    assert gap < TOLERANCES[case] * moved
    ours, theirs = tensors_in(found["state"]), tensors_in(whole["state"])
    assert {name: t.shape for name, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    # AdamW's first moments, by number: of the order of the gradients, about 1e-2.
    for name in [name for name in theirs if name.endswith("exp_avg")]:
        largest = theirs[name].abs().max().item()
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-3 * largest + 1e-8)


def test_without_the_optimisers_state_the_end_is_another(tmp_path) -> None:
    case, config = "everything", config_of("everything", "ddp", 1)
    whole = start_and_save(case, "ddp", 1, str(tmp_path / "saved.pt"))
    saved = parse_state((tmp_path / "saved.pt").read_bytes(), "saved.pt")
    forgetful = learner_of("llamagen", config)
    forgetful.load_policy_state(saved["weights"], "saved.pt")
    forgetful.policy_version = SAVED_AFTER
    steps(forgetful, case, config, SAVED_AFTER, NUM_STEPS)
    expected = logits_under("llamagen", whole["weights"])
    moved = (expected - logits_under("llamagen", POLICIES["llamagen"]().state_dict())).abs().max()
    gap = (logits_under("llamagen", forgetful.policy_state()) - expected).abs().max()
    assert gap > 100 * TOLERANCES[case] * moved, "or the tests above would pass without it"


def test_shares_of_weights_that_do_not_fit_are_refused_by_name(ends) -> None:
    assert "some-file does not fit" in ends["misfit"]
    assert "output.weight" in ends["misfit"]
