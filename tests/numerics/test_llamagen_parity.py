"""The policy computes what the public LlamaGen computes, on weights from a frozen rule."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.sampling.logits import guide
from tests.numerics.weight_rule import torch_tensor

DATA = Path(__file__).parent / "data" / "llamagen"
[CASE] = json.loads((DATA / "cases.json").read_text())["cases"]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(DATA / CASE["file"]) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def policy() -> LlamaGen:
    public = CASE["config"]
    policy = LlamaGen(
        LlamaGenConfig(
            num_layers=public["n_layer"],
            num_heads=public["n_head"],
            width=public["dim"],
            grid_size=int(public["block_size"] ** 0.5),
            codebook_size=public["vocab_size"],
            num_classes=public["num_classes"],
            ffn_multiple_of=public["multiple_of"],
        )
    )
    state = {
        key: torch_tensor(CASE["seed"], key, shape)
        for key, shape, _, is_made in CASE["state_dict"]
        if is_made
    }
    policy.load_state_dict(state)  # strict: the names are the public ones
    return policy.requires_grad_(False)


def decode(policy: LlamaGen, class_ids: Tensor, tokens: Tensor) -> Tensor:
    """Logits of cached decoding with the given tokens fed back: [B, L, V]."""
    cache = policy.allocate_cache(len(class_ids))
    logits = [policy.prefill(class_ids, cache)]
    for position in range(tokens.shape[1] - 1):
        logits.append(policy.decode_one(tokens[:, position], position, cache))
    return torch.stack(logits, dim=1)


def assert_equal_to(found: Tensor, name: str, arrays: dict[str, Any]) -> None:
    # Five times what the reference itself moves with threads and precision.
    np.testing.assert_allclose(
        found.numpy(), arrays[name], rtol=0, atol=CASE["tolerance"][name]["atol"]
    )


def test_one_pass_logits(policy: LlamaGen, arrays: dict[str, np.ndarray]) -> None:
    labels = torch.from_numpy(arrays["in.labels"]).long()
    tokens = torch.from_numpy(arrays["in.tokens"]).long()
    assert_equal_to(policy.teacher_forced(labels, tokens), "out.tf_cond", arrays)
    null = torch.full_like(labels, policy.num_classes)
    assert_equal_to(policy.teacher_forced(null, tokens), "out.tf_uncond", arrays)


def test_cached_decoding_without_and_with_guidance(
    policy: LlamaGen, arrays: dict[str, np.ndarray]
) -> None:
    labels = torch.from_numpy(arrays["in.labels"]).long()
    tokens = torch.from_numpy(arrays["in.tokens"]).long()
    conditional = decode(policy, labels, tokens)
    unconditional = decode(policy, torch.full_like(labels, policy.num_classes), tokens)
    assert_equal_to(conditional, "out.decode_nocfg", arrays)
    guided = guide(conditional, unconditional, CASE["settings"]["cfg_scale"])
    assert_equal_to(guided, "out.decode_cfg", arrays)
