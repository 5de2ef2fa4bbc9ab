"""VAR: what is sampled is what is scored, and no scale knows its own or later tokens.

Shapes: B images, L image tokens, V codebook.
"""

import copy
import itertools

import pytest
import torch

from rlgen.nn.precision import autocast, cast_parameters
from rlgen.sampling.decode import sample_tokens
from rlgen.sampling.logits import guidance_scales
from rlgen.sampling.noise import uniform_noise
from rlgen.sampling.scoring import score_tokens
from rlgen.types import SamplingSettings
from tests.tiny_var import random_images, tiny_var

CPU = torch.device("cpu")
SETTINGS = [
    SamplingSettings(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for cfg_scale, temperature, top_k, top_p in itertools.product(
        (1.0, 2.5), (0.7, 1.0), (0, 20), (1.0, 0.9)
    )
]
VARIANTS = [
    {"attn_l2_norm": True, "shared_aln": False},
    {"attn_l2_norm": False, "shared_aln": True},
]


def noise_for(policy, class_ids_B, seed: int = 3):
    indices = torch.arange(len(class_ids_B))
    return uniform_noise(
        seed=seed,
        purpose="train",
        step=0,
        condition_indices_B=indices,
        sample_indices_B=indices,
        num_tokens=policy.num_tokens,
    )


@torch.no_grad()
def cached_logits(policy, class_ids_B, tokens_BL):
    cache = policy.allocate_cache(len(class_ids_B))
    blocks = tokens_BL.split(policy.block_sizes, dim=1)
    logits = [policy.prefill(class_ids_B, cache)]
    for block, tokens_Bn in enumerate(blocks[:-1]):
        logits.append(policy.decode_next(tokens_Bn, block, cache))
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_logprobs_are_the_teacher_forced_ones(settings, variant) -> None:
    policy = tiny_var(**variant)
    class_ids_B = torch.arange(4).repeat_interleave(3)
    tokens, sampled = sample_tokens(policy, class_ids_B, noise_for(policy, class_ids_B), settings)
    with torch.no_grad():
        scored, _ = score_tokens(policy, class_ids_B, tokens, settings)
    # Logits of order 1 to 10 in float32, through guidance and temperature: some 1e-5.
    torch.testing.assert_close(sampled, scored, rtol=0, atol=1e-4)
    assert scored.isfinite().all(), "a code of probability 0 was drawn"
    assert scored.std() > 0.5, "a uniform policy would prove nothing"


@torch.no_grad()
def test_scoring_without_the_guidance_ramp_would_give_other_logprobs() -> None:
    policy = tiny_var()
    settings = SamplingSettings(cfg_scale=2.5)
    assert guidance_scales(policy, settings) == pytest.approx([1.0, 1.5, 2.0, 2.5])
    class_ids_B = torch.arange(4)
    tokens, sampled = sample_tokens(policy, class_ids_B, noise_for(policy, class_ids_B), settings)
    policy.guidance_ramp = (1.0,) * 4
    flat, _ = score_tokens(policy, class_ids_B, tokens, settings)
    difference = (flat - sampled).abs().split(policy.block_sizes, dim=1)
    assert all(part.max() > 0.1 for part in difference[:-1])
    assert difference[-1].max() < 1e-4, "the last scale has all of the guidance anyway"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_tokens_change_the_logits_of_later_scales_and_of_no_others(variant) -> None:
    policy = tiny_var(**variant)
    class_ids_B, tokens_BL = random_images(policy, batch=3)
    logits = policy.teacher_forced(class_ids_B, tokens_BL)
    ends = torch.tensor(policy.block_sizes).cumsum(0).tolist()
    for begin, end in itertools.pairwise([0, *ends]):
        changed = tokens_BL.clone()
        changed[:, begin:end] = (changed[:, begin:end] + 7) % policy.codebook_size
        difference = (policy.teacher_forced(class_ids_B, changed) - logits).abs().amax(dim=(0, 2))
        # What comes before is computed from the same numbers, so it is equal to the last bit.
        assert not difference[:end].any(), f"positions {begin} to {end} reach back"
        assert (difference[end:] > 1e-3).all(), f"positions {begin} to {end} do not reach on"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("patch_nums", [(1, 2, 3, 5), (2, 3), (1, 2, 3, 4, 5, 6)], ids=str)
def test_cached_decoding_gives_the_logits_of_the_full_pass(variant, patch_nums) -> None:
    policy = tiny_var(seed=5, patch_nums=patch_nums, **variant)
    class_ids_B, tokens_BL = random_images(policy, batch=5)
    with torch.no_grad():
        full_BLV = policy.teacher_forced(class_ids_B, tokens_BL)
    # Logits of order 1 to 10 in float32.
    torch.testing.assert_close(
        cached_logits(policy, class_ids_B, tokens_BL), full_BLV, rtol=1e-5, atol=5e-5
    )


@torch.no_grad()
def test_a_cache_serves_again_after_a_new_prefill() -> None:
    policy = tiny_var()
    class_ids_B, tokens_BL = random_images(policy, batch=2)
    cache = policy.allocate_cache(2)
    first = policy.prefill(class_ids_B, cache)
    second = policy.decode_next(tokens_BL[:, :1], 0, cache)
    policy.decode_next(tokens_BL[:, 1:5], 1, cache)
    assert torch.equal(policy.prefill(class_ids_B, cache), first)
    assert torch.equal(policy.decode_next(tokens_BL[:, :1], 0, cache), second)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_smaller_batches_draw_the_same_images(cfg_scale) -> None:
    policy = tiny_var()
    settings = SamplingSettings(cfg_scale=cfg_scale)
    class_ids_B = torch.arange(4).repeat_interleave(2)
    noise = noise_for(policy, class_ids_B)
    whole, whole_logprobs = sample_tokens(policy, class_ids_B, noise, settings)
    for part in (slice(0, 3), slice(3, 8)):
        tokens, logprobs = sample_tokens(policy, class_ids_B[part], noise[part], settings)
        assert torch.equal(tokens, whole[part])
        # Matrix products of other sizes round differently in float32.
        torch.testing.assert_close(logprobs, whole_logprobs[part], rtol=0, atol=5e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(variant) -> None:
    gradients = []
    for is_on in (False, True):
        policy = tiny_var(**variant)
        policy.gradient_checkpointing = is_on
        class_ids_B, tokens_BL = random_images(policy, batch=3)
        logprobs, _ = score_tokens(
            policy, class_ids_B, tokens_BL, SamplingSettings(cfg_scale=1.5, top_k=20)
        )
        logprobs[logprobs.isfinite()].sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        # The same operations on the same numbers.
        assert torch.equal(gradient, checkpointed[name]), name
        assert gradient.abs().sum() > 0, f"{name} gets no gradient"


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    for is_on in (False, True):
        policy = tiny_var(depth=6)
        policy.gradient_checkpointing = is_on
        num_bytes = 0

        def count(tensor):
            nonlocal num_bytes
            num_bytes += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            policy(*random_images(policy, batch=2))
        kept[is_on] = num_bytes
    assert kept[True] < 0.5 * kept[False]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@torch.no_grad()
def test_in_bfloat16_the_learner_scores_what_the_sampler_drew(cfg_scale, variant) -> None:
    learner = tiny_var(**variant)
    rounded = copy.deepcopy(learner)
    cast_parameters(rounded, "bfloat16", keep=rounded.float32_parts)
    settings = SamplingSettings(cfg_scale=cfg_scale)
    class_ids_B = torch.arange(4).repeat_interleave(8)
    noise = noise_for(learner, class_ids_B)
    tokens, sampled = sample_tokens(rounded, class_ids_B, noise, settings)
    with autocast(CPU, "bfloat16"):
        same_tokens, same_sampled = sample_tokens(learner, class_ids_B, noise, settings)
        same_scored, _ = score_tokens(learner, class_ids_B, same_tokens, settings)
        scored, _ = score_tokens(learner, class_ids_B, tokens, settings)
    exact, _ = score_tokens(learner, class_ids_B, tokens, settings)
    # Weights rounded to 8 bits move logits of order 5 by some 1e-2; measured means were 0.006 to
    # 0.024, and single tokens far out moved by up to 2.7.
    assert 1e-4 < (sampled - exact).abs().mean() < 0.05, "not in bfloat16, or not this policy"
    assert (sampled - scored).abs().mean() < 0.05
    # One model in one format does the same products in both; sums in another order may round a
    # few of them to the other side.
    assert (same_sampled - same_scored).abs().mean() < 0.005


@torch.no_grad()
def test_in_bfloat16_inputs_and_logits_stay_float32() -> None:
    policy = tiny_var()
    before = policy.quantizer.embedding.weight.clone()
    cast_parameters(policy, "bfloat16", keep=policy.float32_parts)
    policy.to(torch.bfloat16)
    assert torch.equal(policy.quantizer.embedding.weight, before)
    class_ids_B, tokens_BL = random_images(policy, batch=2)
    logits = policy.teacher_forced(class_ids_B, tokens_BL)
    assert logits.dtype == torch.float32
    rounded = logits.bfloat16().float()
    assert (logits != rounded).float().mean() > 0.9, "the head rounds its output"
