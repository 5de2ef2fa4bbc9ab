"""The next-token families: sampler and scorer agree, the cache changes nothing, nor does saving.

Shapes: B images, L image tokens, V codebook.
"""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.nn.lora import LowRank, add_lora
from rlgen.nn.precision import cast_parameters
from rlgen.policies.llamagen import LlamaGen
from rlgen.policies.vqgan_gpt import VqganGpt
from rlgen.sampling.decode import check_guidance, decode, sample_tokens
from rlgen.sampling.noise import uniform_noise
from rlgen.sampling.scoring import score_tokens
from rlgen.types import SamplingSettings
from tests.tiny_gpt import (
    random_images,
    tiny_llamagen,
    tiny_text_llamagen,
    tiny_vqgan_gpt,
)

Gpt = LlamaGen | VqganGpt

FAMILIES: dict[str, Callable[[], Gpt]] = {
    "llamagen": tiny_llamagen,
    "llamagen-text": tiny_text_llamagen,
    "vqgan-gpt": tiny_vqgan_gpt,
    "vqgan-gpt-with-null": lambda: tiny_vqgan_gpt(has_null_class=True),
}
LARGE: dict[str, Callable[[], Gpt]] = {
    "llamagen": lambda: tiny_llamagen(width=256, num_heads=4, ffn_multiple_of=256),
    "llamagen-text": lambda: tiny_text_llamagen(width=256, num_heads=4, ffn_multiple_of=256),
    "vqgan-gpt": lambda: tiny_vqgan_gpt(width=256, num_heads=4),
}
"""Wide enough that decoding packs their weights."""
SETTINGS = [
    SamplingSettings(cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
    for cfg_scale, temperature, top_k, top_p in itertools.product(
        (1.0, 1.75), (0.7, 1.0), (0, 20), (1.0, 0.9)
    )
]


def noise_for(policy: Gpt, batch: int) -> Tensor:
    return uniform_noise(
        seed=3,
        purpose="train",
        step=1,
        condition_indices_B=torch.arange(batch),
        sample_indices_B=torch.zeros(batch, dtype=torch.int64),
        num_tokens=policy.num_tokens,
    )


def cached_logits(
    policy: Gpt, class_ids_B: Tensor, tokens_BL: Tensor, settings: SamplingSettings
) -> Tensor:
    """Logits [B, L, V] of decoding with these tokens fed back."""
    logits: list[Tensor] = []

    def choose(logits_B1V: Tensor, block: int) -> Tensor:
        logits.append(logits_B1V)
        return tokens_BL[:, block, None]

    decode(policy, class_ids_B, settings, choose)
    return torch.cat(logits, dim=1)


def shrunk(policy: Gpt) -> Gpt:
    """Weights of a wide policy scaled so that its logits are of order 1 to 10."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim == 2:
                parameter.mul_(0.2)
    return policy


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_logprobs_are_the_teacher_forced_ones(family, settings) -> None:
    policy = FAMILIES[family]()
    class_ids_B = torch.arange(24) % policy.num_classes
    if settings.is_guided and policy.null_class is None:
        with pytest.raises(ConfigError, match=r"cfg_scale = 1\.75 needs a null class"):
            sample_tokens(policy, class_ids_B, noise_for(policy, 24), settings)
        return
    tokens_BL, sampled_BL = sample_tokens(policy, class_ids_B, noise_for(policy, 24), settings)
    with torch.no_grad():
        scored_BL, _ = score_tokens(policy, class_ids_B, tokens_BL, settings)
    # Two float32 layers: some 1e-6. The run's own gate allows 1e-4.
    torch.testing.assert_close(sampled_BL, scored_BL, rtol=0, atol=1e-4)
    assert scored_BL.isfinite().all(), "a code of probability 0 was drawn"
    assert scored_BL.std() > 0.1, "a uniform policy would prove nothing"


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_gives_the_logits_of_the_full_pass(family, cfg_scale) -> None:
    policy = FAMILIES[family]()
    if cfg_scale != 1.0 and policy.null_class is None:
        pytest.skip("no guidance without a null class")
    class_ids_B, tokens_BL = random_images(policy, 6)
    found = cached_logits(policy, class_ids_B, tokens_BL, SamplingSettings(cfg_scale=cfg_scale))
    expected = policy.teacher_forced(class_ids_B, tokens_BL)
    if cfg_scale != 1.0:
        null_BLV = policy.teacher_forced(policy.null_of(class_ids_B), tokens_BL)
        assert (expected - null_BLV).abs().max() > 0.1, "the condition must matter"
        expected = null_BLV + cfg_scale * (expected - null_BLV)
    # Logits of order 1 to 10 in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", LARGE)
@torch.no_grad()
def test_packed_weights_give_the_logits_of_the_full_pass(family) -> None:
    policy = shrunk(LARGE[family]())
    class_ids_B, tokens_BL = random_images(policy, 3)
    cache = policy.allocate_cache(3)
    policy.prefill(class_ids_B, cache)
    policy.decode_next(tokens_BL[:, :1], 0, cache)
    assert torch.backends.mkldnn.is_available() == cache.linear.has_packed
    found = cached_logits(policy, class_ids_B, tokens_BL, SamplingSettings())
    expected = policy.teacher_forced(class_ids_B, tokens_BL)
    # Logits of order 1 to 10 through sums of 256 to 1024 float32 terms.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_decoding_uses_the_weights_of_its_moment() -> None:
    policy = shrunk(LARGE["llamagen"]())
    class_ids_B, tokens_BL = random_images(policy, 2)
    before = cached_logits(policy, class_ids_B, tokens_BL, SamplingSettings())
    for parameter in policy.parameters():
        parameter.mul_(0.5)
    after = cached_logits(policy, class_ids_B, tokens_BL, SamplingSettings())
    expected = policy.teacher_forced(class_ids_B, tokens_BL)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-4)
    assert (before - after).abs().max() > 0.1


@torch.no_grad()
def test_decoding_honours_adapters() -> None:
    policy = shrunk(LARGE["vqgan-gpt"]())
    class_ids_B, tokens_BL = random_images(policy, 2)
    plain = policy.teacher_forced(class_ids_B, tokens_BL)
    add_lora(policy, rank=4, alpha=8.0, seed=0)
    for adapter in [module for module in policy.modules() if isinstance(module, LowRank)]:
        adapter.up.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    expected = policy.teacher_forced(class_ids_B, tokens_BL)
    found = cached_logits(policy, class_ids_B, tokens_BL, SamplingSettings())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1, "adapters that do nothing prove nothing"


def test_gradients_flow_through_cached_decoding() -> None:
    policy = shrunk(LARGE["vqgan-gpt"]())
    class_ids_B, tokens_BL = random_images(policy, 2)
    policy.teacher_forced(class_ids_B, tokens_BL)[:, 0].sum().backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    policy.prefill(class_ids_B, policy.allocate_cache(2)).sum().backward()
    found = policy.head.weight.grad
    assert found is not None
    torch.testing.assert_close(found, expected["head.weight"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", LARGE)
def test_the_gap_in_bfloat16_is_finite_and_small(family) -> None:
    policy = shrunk(LARGE[family]())
    class_ids_B = torch.arange(8) % policy.num_classes
    reduced = copy.deepcopy(policy)
    cast_parameters(reduced, "bfloat16", keep=reduced.float32_parts)
    settings = SamplingSettings()
    tokens_BL, sampled_BL = sample_tokens(reduced, class_ids_B, noise_for(policy, 8), settings)
    with torch.no_grad():
        same_BL, _ = score_tokens(reduced, class_ids_B, tokens_BL, settings)
        exact_BL, _ = score_tokens(policy, class_ids_B, tokens_BL, settings)
    # Two roundings of 2^-9 relative on logits of order 1 to 10: some 1e-2 nats a token.
    for gap in ((sampled_BL - same_BL).abs(), (sampled_BL - exact_BL).abs()):
        assert gap.isfinite().all()
        assert 1e-4 < gap.mean() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(family) -> None:
    policy = FAMILIES[family]()
    class_ids_B, tokens_BL = random_images(policy, 5)
    gradients: list[dict[str, Tensor]] = []
    for saving in (False, True):
        policy.gradient_checkpointing = saving
        policy.zero_grad(set_to_none=True)
        logprobs, _ = score_tokens(policy, class_ids_B, tokens_BL, SamplingSettings())
        logprobs.mean().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(policy.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_code_changes_the_logits_after_it_and_none_before(family) -> None:
    policy = FAMILIES[family]()
    class_ids_B, tokens_BL = random_images(policy, 2)
    logits = policy.teacher_forced(class_ids_B, tokens_BL)
    for position in range(policy.num_tokens):
        changed = tokens_BL.clone()
        changed[:, position] = (changed[:, position] + 1) % policy.codebook_size
        difference = (policy.teacher_forced(class_ids_B, changed) - logits).abs().amax(dim=(0, 2))
        # Masked positions add exact zeros, so these are equal to the last bit.
        assert not difference[: position + 1].any(), position
        assert (difference[position + 1 :] > 1e-4).all(), position


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_depend_on_their_company(family) -> None:
    policy = FAMILIES[family]()
    settings = SamplingSettings(temperature=0.7, top_k=20)
    class_ids_B, noise_BL = torch.arange(12) % policy.num_classes, noise_for(policy, 12)
    whole, logprobs = sample_tokens(policy, class_ids_B, noise_BL, settings)
    for part in (slice(0, 1), slice(1, 8), slice(8, 12)):
        tokens, own = sample_tokens(policy, class_ids_B[part], noise_BL[part], settings)
        assert torch.equal(tokens, whole[part])
        # Matrix products of other sizes round differently in float32.
        torch.testing.assert_close(own, logprobs[part], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_never_reads_a_value_back(family) -> None:
    # Tensors on the meta device have no values, so whoever asked for one would fail.
    policy = FAMILIES[family]().to("meta")
    settings = SamplingSettings(
        cfg_scale=1.0 if policy.null_class is None else 2.0, temperature=0.7, top_k=20, top_p=0.9
    )
    class_ids_B = torch.arange(5, device="meta") % policy.num_classes
    noise_BL = noise_for(policy, 5).to("meta")
    tokens_BL, logprobs_BL = sample_tokens(policy, class_ids_B, noise_BL, settings)
    assert tokens_BL.shape == logprobs_BL.shape == (5, policy.num_tokens)
    with pytest.raises(RuntimeError):
        tokens_BL.max().item()


def test_guidance_is_refused_where_no_condition_was_ever_dropped() -> None:
    guided = SamplingSettings(cfg_scale=1.5)
    for policy in (tiny_vqgan_gpt(), tiny_llamagen(has_null_class=False)):
        assert policy.null_class is None
        with pytest.raises(ConfigError, match=r"use cfg_scale 1, or a policy trained with dropped"):
            check_guidance(policy, guided)
    for policy in (tiny_vqgan_gpt(has_null_class=True), tiny_llamagen(), tiny_text_llamagen()):
        check_guidance(policy, guided)
