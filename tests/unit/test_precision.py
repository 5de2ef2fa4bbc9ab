"""bfloat16 in the sampler and the learner: what is cast, what is measured, what is refused."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlgen.config import RunConfig, load_config
from rlgen.config.plan import check_trainable
from rlgen.errors import ConfigError, NumericsError
from rlgen.learner.batch import learner_batch
from rlgen.learner.learner import Learner
from rlgen.nn.flat import pack_weights
from rlgen.nn.precision import autocast, cast_parameters
from rlgen.nn.weights import state_sha256
from rlgen.sampling.decode import sample_tokens
from rlgen.sampling.sampler import Sampler
from rlgen.sampling.scoring import score_tokens
from rlgen.sampling.units import training_units
from rlgen.types import LearnerBatch, SamplingSettings, StepRewards
from tests.tiny import CPU, sampled_batch, scored, tiny_config, tiny_policy
from tests.tiny_gpt import tiny_llamagen, tiny_text_llamagen, tiny_vqgan_gpt
from tests.tiny_var import tiny_var

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


SIZES: dict[str, Any] = {"width": 64, "num_layers": 4, "num_heads": 4, "grid_size": 6}
POLICIES: dict[str, Callable[[], Any]] = {
    "llamagen": lambda: tiny_llamagen(**SIZES),
    "llamagen text": lambda: tiny_text_llamagen(**SIZES),
    "vqgan": lambda: tiny_vqgan_gpt(**SIZES),
    "var": lambda: tiny_var(width=48, depth=4),
    "var shared": lambda: tiny_var(width=48, depth=4, shared_aln=True),
}


@pytest.mark.parametrize("family", POLICIES)
def test_a_bfloat16_sampler_casts_the_products_weights_and_leaves_tables(family) -> None:
    sampler = Sampler(POLICIES[family](), device=CPU, dtype="bfloat16")
    parts = sampler.policy.float32_parts
    for name, parameter in sampler.policy.named_parameters():
        is_kept = any(part in name.split(".") for part in parts)
        assert parameter.dtype == (torch.float32 if is_kept else torch.bfloat16), name
        # Matrices within the blocks are nearly all of a policy.
        assert not (is_kept and parameter.ndim == 2 and re.match(r"(layers|blocks)\.", name)), name
    assert all(b.dtype == torch.float32 for b in sampler.policy.buffers() if b.is_floating_point())


def gap_of(policy: Any, *, keep: tuple[str, ...]) -> torch.Tensor:
    """How far the log-probs of a cast policy are from those of its float32 original's learner."""
    cast = copy.deepcopy(policy)
    cast_parameters(cast, "bfloat16", keep=keep)
    class_ids_B = torch.arange(16) % policy.num_classes
    generator = torch.Generator().manual_seed(0)
    noise_BL = torch.rand(16, policy.num_tokens, generator=generator, dtype=torch.float64)
    tokens_BL, sampled_BL = sample_tokens(cast, class_ids_B, noise_BL, SamplingSettings())
    with torch.no_grad(), autocast(CPU, "bfloat16"):
        scored_BL, _ = score_tokens(policy, class_ids_B, tokens_BL, SamplingSettings())
    return (sampled_BL - scored_BL).abs()


@pytest.mark.parametrize("family", POLICIES)
def test_what_stays_float32_brings_the_sampler_nearer_to_the_learner(family) -> None:
    policy = POLICIES[family]()
    plain, near = gap_of(policy, keep=()), gap_of(policy, keep=policy.float32_parts)
    assert plain.mean() > 0.01
    if family.startswith("var"):
        # The same products of the same numbers; sums in another order may round a few apart.
        assert near.mean() < 0.02 * plain.mean()
    else:  # cached decoding attends by another kernel than the learner's one pass
        assert near.mean() < 0.7 * plain.mean()


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
