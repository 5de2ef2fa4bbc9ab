"""bfloat16 in the sampler and the learner: what is cast, what is measured, what is refused."""

import copy

import pytest
import torch

from rlgen.config import RunConfig, load_config
from rlgen.config.plan import check_trainable
from rlgen.errors import ConfigError, NumericsError
from rlgen.learner.batch import learner_batch
from rlgen.learner.learner import Learner
from rlgen.nn.flat import pack_weights
from rlgen.nn.weights import state_sha256
from rlgen.sampling.sampler import Sampler
from rlgen.sampling.units import training_units
from rlgen.types import LearnerBatch, StepRewards
from tests.tiny import CPU, sampled_batch, scored, tiny_config, tiny_policy

BF16 = {"rollout.dtype": "bfloat16", "learner.dtype": "bfloat16"}


def bf16_config() -> RunConfig:
    return tiny_config().with_values(BF16)


def bf16_batch(config: RunConfig, *, seed: int = 0) -> LearnerBatch:
    """A step drawn by a sampler in bfloat16, from the weights of a learner in float32."""
    policy = tiny_policy(seed)
    sampler = Sampler(copy.deepcopy(policy), device=CPU, dtype="bfloat16")
    sampler.update_weights(*pack_weights(policy.state_dict(), version=0))
    rollouts = [
        scored(sampler.sample(unit)) for unit in training_units(config, 0, policy_version=0)
    ]
    advantages = sampled_batch(policy, config).advantages_B
    return learner_batch(0, rollouts, StepRewards(0, advantages, {}, {}))


def test_a_bfloat16_sampler_casts_parameters_and_leaves_tables() -> None:
    sampler = Sampler(tiny_policy(), device=CPU, dtype="bfloat16")
    assert {p.dtype for p in sampler.policy.parameters()} == {torch.bfloat16}
    tables = [b for b in sampler.policy.buffers() if b.is_floating_point()]
    assert tables and {b.dtype for b in tables} == {torch.float32}


def test_the_gap_between_sampler_and_learner_is_measured() -> None:
    config = bf16_config()
    learner = Learner(tiny_policy(), config, device=CPU)
    metrics = learner.update(bf16_batch(config))
    # Two roundings of 2^-9 relative on logits of order 1 to 10: some 1e-2 nats.
    assert 1e-4 < metrics["policy/logprob_gap_mean"] < 0.1
    assert metrics["policy/logprob_gap_mean"] < metrics["policy/logprob_gap_max"] < 1.0
    exact = tiny_config()
    found = Learner(tiny_policy(), exact, device=CPU).update(sampled_batch(tiny_policy(), exact))
    assert found["policy/logprob_gap_max"] < 1e-5


def test_weights_and_optimiser_stay_float32() -> None:
    config = bf16_config()
    learner = Learner(tiny_policy(), config, device=CPU)
    before = state_sha256(learner.policy_state())
    learner.update(bf16_batch(config))
    assert {t.dtype for t in learner.policy_state().values()} == {torch.float32}
    moments = [t for s in learner.optimizer.state.values() for t in s.values() if t.ndim]
    assert moments and {t.dtype for t in moments} == {torch.float32}
    assert state_sha256(learner.policy_state()) != before


def test_another_policy_than_the_sampled_one_is_found_in_bfloat16_too() -> None:
    config = bf16_config()
    learner = Learner(tiny_policy(seed=1), config, device=CPU)
    with pytest.raises(NumericsError, match=r"differ by .* nats a token \(allowed in bfloat16"):
        learner.update(bf16_batch(config, seed=0))


@pytest.mark.parametrize("cut", ["rollout.top_k=20", "rollout.top_p=0.9"])
def test_cut_distributions_need_float32_on_both_sides(cut) -> None:
    with pytest.raises(ConfigError, match="cut off different codes"):
        check_trainable(load_config(None, ["learner.dtype=bfloat16", cut]))
    check_trainable(load_config(None, [cut]))


def test_recomputed_activations_give_the_same_update_to_the_last_bit() -> None:
    plain = tiny_config(learner__lr=1e-3)
    saving = tiny_config(learner__lr=1e-3, learner__gradient_checkpointing=True)
    batch = sampled_batch(tiny_policy(), plain)
    digests = []
    for config in (plain, saving):
        learner = Learner(tiny_policy(), config, device=CPU)
        learner.update(batch)
        digests.append(state_sha256(learner.policy_state()))
    assert digests[0] == digests[1] != state_sha256(tiny_policy().state_dict())
