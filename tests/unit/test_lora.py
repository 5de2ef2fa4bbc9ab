"""Low-rank adapters: what is trained, what is published, and what the reference is."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rlgen.config import load_config
from rlgen.errors import CheckpointError, ConfigError
from rlgen.learner.checkpoint import commit_checkpoint, write_parts
from rlgen.learner.learner import Learner
from rlgen.learner.state_io import restore_learner, snapshot_learner
from rlgen.nn.lora import LowRank, adapter_state, add_lora, lora_disabled, merged_state
from rlgen.nn.weights import state_sha256
from rlgen.policies.llamagen import LlamaGen
from tests.tiny import CPU, sampled_batch, tiny_config, tiny_policy

LORA = {"learner.lora": {"rank": 4, "alpha": 8.0}}


def logits_of(policy: LlamaGen) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(policy.codebook_size, (3, policy.num_tokens), generator=generator)
    with torch.no_grad():
        return policy.teacher_forced(torch.tensor([0, 1, 2]), tokens)


def adapted_policy(*, moved: bool) -> LlamaGen:
    policy = tiny_policy()
    add_lora(policy, rank=4, alpha=8.0, seed=1)
    if moved:
        generator = torch.Generator().manual_seed(5)
        for module in policy.modules():
            if isinstance(module, LowRank):
                module.up.data.normal_(std=0.1, generator=generator)
    return policy


def test_fresh_adapters_change_no_logit_and_are_all_that_is_trained() -> None:
    policy = adapted_policy(moved=False)
    assert torch.equal(logits_of(policy), logits_of(tiny_policy()))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all(".parametrizations.weight.0." in name for name in trained)
    assert len(trained) == 2 * 2 * 5, "two matrices for five linear layers in each of two blocks"


def test_merged_weights_have_the_public_names_and_give_the_same_logits_to_the_last_bit() -> None:
    policy = adapted_policy(moved=True)
    plain = tiny_policy()
    assert not torch.equal(logits_of(policy), logits_of(plain)), "or this test proves nothing"
    plain.load_state_dict(merged_state(policy))  # strict
    assert torch.equal(logits_of(policy), logits_of(plain))


def test_without_adapters_the_merged_state_is_the_state() -> None:
    policy = tiny_policy()
    assert state_sha256(merged_state(policy)) == state_sha256(policy.state_dict())
    assert adapter_state(policy) == {}


def test_disabled_adapters_give_the_base_and_come_back() -> None:
    policy = adapted_policy(moved=True)
    adapted = logits_of(policy)
    with lora_disabled(policy):
        assert torch.equal(logits_of(policy), logits_of(tiny_policy()))
    assert torch.equal(logits_of(policy), adapted)


def test_the_divergence_is_taken_to_the_frozen_weights() -> None:
    config = tiny_config(grpo__kl_coef=0.5, learner__lr=1e-2).with_values(LORA)
    learner = Learner(tiny_policy(), config, device=CPU)
    assert learner.reference is None, "no second copy of the weights"
    batch = sampled_batch(tiny_policy(), config)
    assert learner.update(batch)["loss/kl"] == 0.0
    moved = learner.update(batch)["loss/kl"]
    full = Learner(tiny_policy(), tiny_config(grpo__kl_coef=0.5), device=CPU)
    again = Learner(tiny_policy(), config, device=CPU)
    again.update(batch)
    full.policy.load_state_dict(again.policy_state())
    other_version = replace(batch, policy_version=-1)  # the ratio is not 1 and need not be
    assert moved == pytest.approx(full.update(other_version)["loss/kl"], rel=1e-5)
    assert moved > 0


def test_an_update_moves_the_adapters_and_leaves_the_base() -> None:
    config = tiny_config(learner__lr=1e-2).with_values(LORA)
    learner = Learner(tiny_policy(), config, device=CPU)
    learner.update(sampled_batch(tiny_policy(), config))
    with lora_disabled(learner.policy):
        assert state_sha256(learner.policy_state()) == state_sha256(tiny_policy().state_dict())
    moved = learner.policy_state()["layers.0.attention.wqkv.weight"]
    assert not torch.equal(moved, tiny_policy().layers[0].attention.wqkv.weight)


def test_resumed_with_adapters_ends_like_an_uninterrupted_run_to_the_last_bit(tmp_path) -> None:
    config = tiny_config(grpo__kl_coef=0.1).with_values(LORA)

    def steps(learner: Learner, first: int, last: int) -> None:
        for step in range(first, last):
            current = tiny_policy()
            current.load_state_dict(learner.policy_state())
            learner.update(sampled_batch(current, config, step=step, version=step))

    whole = Learner(tiny_policy(), config, device=CPU)
    steps(whole, 0, 4)
    part = Learner(tiny_policy(), config, device=CPU)
    steps(part, 0, 2)
    uri = str(tmp_path / "step-00002")
    commit_checkpoint(uri, write_parts(uri, snapshot_learner(part)), meta={})
    resumed = Learner(tiny_policy(), config, device=CPU)
    restore_learner(resumed, uri)
    steps(resumed, 2, 4)
    assert state_sha256(resumed.policy_state()) == state_sha256(whole.policy_state())


def test_a_checkpoint_without_adapters_is_refused_by_a_run_with_them() -> None:
    plain = Learner(tiny_policy(), tiny_config(), device=CPU)
    state = copy.deepcopy(plain.state_dict())
    adapted = Learner(
        tiny_policy(), tiny_config().with_values(LORA | {"grpo.kl_coef": 0.0}), device=CPU
    )
    state.pop("reference")
    with pytest.raises(CheckpointError, match="without LoRA"):
        adapted.load_state_dict(state)


def test_an_ema_reference_beside_adapters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"grpo.reference = ema.*learner.lora"):
        load_config(None, ["learner.lora={rank: 4}", "grpo.reference=ema"])


def test_every_rank_makes_the_same_adapters() -> None:
    one, two = adapted_policy(moved=False), adapted_policy(moved=False)
    assert state_sha256(adapter_state(one)) == state_sha256(adapter_state(two))
    assert np.any([bool(t.any()) for t in adapter_state(one).values()])
