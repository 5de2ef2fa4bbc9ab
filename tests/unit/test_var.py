"""VAR's architecture: sizes and names of the public weights, and the formula written out.

Shapes: B images, L image tokens, T positions, D width, H heads, K head width.
"""

import copy
import math

import pytest
import torch

from rlgen.errors import ConfigError
from rlgen.nn.var_blocks import linear
from rlgen.policies.var import VAR, VarConfig
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer
from tests.tiny_var import (
    CODE_DIM,
    NUM_CLASSES,
    PATCH_NUMS,
    random_images,
    tiny_quantizer,
    tiny_var,
)

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
PUBLISHED = {
    "d16": (16, SIDES_256, False, 310_283_520),
    "d20": (20, SIDES_256, False, 600_917_136),
    "d24": (24, SIDES_256, False, 1_033_399_360),
    "d30": (30, SIDES_256, False, 2_010_020_356),
    "d36": (36, SIDES_512, True, 2_353_893_904),
}
TINY = {"depth": 2, "width": 24, "num_heads": 3}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size) -> None:
    depth, patch_nums, shared_aln, num_parameters = PUBLISHED[size]
    config = VarConfig(depth, 64 * depth, depth, patch_nums, shared_aln=shared_aln)
    with torch.device("meta"):
        policy = VAR(config, MultiScaleQuantizer(MultiScaleConfig(4096, 32, patch_nums)))
    assert sum(p.numel() for p in policy.parameters()) == num_parameters
    assert policy.num_tokens == sum(side**2 for side in patch_nums)
    assert policy.null_class == policy.num_classes == 1000


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_tensors_have_the_public_names_and_shapes(shared_aln, attn_l2_norm) -> None:
    width, num_tokens = 24, 39
    expected = {
        "pos_start": [1, 1, width],
        "pos_1LC": [1, num_tokens, width],
        "word_embed.weight": [width, CODE_DIM],
        "word_embed.bias": [width],
        "class_emb.weight": [NUM_CLASSES + 1, width],
        "lvl_embed.weight": [4, width],
        "head_nm.ada_lin.1.weight": [2 * width, width],
        "head_nm.ada_lin.1.bias": [2 * width],
        "head.weight": [33, width],
        "head.bias": [33],
    }
    if shared_aln:
        expected |= {"shared_ada_lin.1.weight": [6 * width, width]}
        expected |= {"shared_ada_lin.1.bias": [6 * width]}
    for block in ("blocks.0", "blocks.1"):
        expected |= {
            f"{block}.attn.q_bias": [width],
            f"{block}.attn.v_bias": [width],
            f"{block}.attn.mat_qkv.weight": [3 * width, width],
            f"{block}.attn.proj.weight": [width, width],
            f"{block}.attn.proj.bias": [width],
            f"{block}.ffn.fc1.weight": [96, width],
            f"{block}.ffn.fc1.bias": [96],
            f"{block}.ffn.fc2.weight": [width, 96],
            f"{block}.ffn.fc2.bias": [width],
        }
        if attn_l2_norm:
            expected |= {f"{block}.attn.scale_mul_1H11": [1, 3, 1, 1]}
        if shared_aln:
            expected |= {f"{block}.ada_gss": [1, 1, 6, width]}
        else:
            expected |= {f"{block}.ada_lin.1.weight": [6 * width, width]}
            expected |= {f"{block}.ada_lin.1.bias": [6 * width]}
    policy = tiny_var(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm)
    assert {name: list(t.shape) for name, t in policy.state_dict().items()} == expected
    assert set(dict(policy.named_parameters())) == set(expected)


def test_blocks_and_guidance_grow_with_the_scale() -> None:
    policy = tiny_var()
    assert policy.block_sizes == (1, 4, 9, 25)
    assert policy.guidance_ramp == pytest.approx((0, 1 / 3, 2 / 3, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 25}, r"width = 25 can't be split over num_heads = 3; .*64 \* num_heads"),
        ({"depth": 0}, r"depth = 0 must be at least 1"),
        ({"patch_nums": (4,)}, r"patch_nums = \[4\] must be two or more"),
        ({"patch_nums": (0, 4)}, r"patch_nums = \[0, 4\] must be two or more positive"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio = 0.0 and norm_eps = 1e-06 must be positive"),
        ({"norm_eps": 0.0}, r"norm_eps = 0.0 must be positive"),
    ],
)
def test_impossible_sizes_are_refused(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        VarConfig(**(TINY | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_nums": (1, 2, 3)}, r"patch_nums = \(1, 2, 3\) .*patch_nums = \(1, 2, 3, 5\)"),
        ({"codebook_size": 34}, r"codebook_size = 34 and the tokenizer's codebook_size = 33"),
        ({"code_dim": 7}, r"code_dim = 7 and the tokenizer's code_dim = 6 differ"),
    ],
)
def test_a_tokenizer_of_other_scales_or_codes_is_refused(fields, message) -> None:
    fits = {"patch_nums": PATCH_NUMS, "codebook_size": 33, "code_dim": CODE_DIM}
    with pytest.raises(ConfigError, match=message):
        VAR(VarConfig(**(TINY | fits | fields)), tiny_quantizer())


@torch.no_grad()
def test_the_policy_keeps_its_own_frozen_quantizer() -> None:
    quantizer = tiny_quantizer().requires_grad_(True)
    policy = VAR(
        VarConfig(**TINY, patch_nums=[1, 2, 3, 5], codebook_size=33, code_dim=6), quantizer
    )
    own = policy.quantizer.embedding.weight
    assert not own.requires_grad and torch.equal(own, quantizer.embedding.weight)
    quantizer.embedding.weight.zero_()
    assert own.any(), "the tokenizer's training would change the policy"
    twin = copy.deepcopy(policy)
    assert twin.quantizer is not policy.quantizer
    assert torch.equal(twin.quantizer.embedding.weight, own)
    policy.to("meta")
    assert all(p.is_meta for p in policy.quantizer.parameters()), "left on the other device"


def by_hand(policy: VAR, class_id: int, tokens_L: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of one image in float64, position by position and head by head."""
    state = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    config = policy.config
    width, heads = config.width, config.num_heads
    head_width = width // heads
    levels = [s for s, side in enumerate(config.patch_nums) for _ in range(side**2)]
    condition_D = state["class_emb.weight"][class_id]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(x_TD: torch.Tensor, scale_D: torch.Tensor, shift_D: torch.Tensor):
        centred = x_TD - x_TD.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return centred / (variance + config.norm_eps).sqrt() * (1 + scale_D) + shift_D

    def vectors(name: str, num: int) -> torch.Tensor:
        return linear(condition_D / (1 + (-condition_D).exp()), f"{name}.1").view(num, width)

    inputs = policy.quantizer.inputs_of(tokens_L[None])[0].double()
    first = condition_D + state["pos_start"][0]
    x_TD = torch.cat([first, linear(inputs, "word_embed")])
    x_TD = x_TD + state["pos_1LC"][0] + state["lvl_embed.weight"][levels]
    for name in (f"blocks.{i}" for i in range(config.depth)):
        if config.shared_aln:
            m = vectors("shared_ada_lin", 6) + state[f"{name}.ada_gss"][0, 0]
        else:
            m = vectors(f"{name}.ada_lin", 6)
        gate1, gate2, scale1, scale2, shift1, shift2 = m
        qkv = modulated(x_TD, scale1, shift1) @ state[f"{name}.attn.mat_qkv.weight"].T
        query, key, value = qkv.split(width, dim=1)
        query, value = query + state[f"{name}.attn.q_bias"], value + state[f"{name}.attn.v_bias"]
        mixed = torch.zeros_like(x_TD)
        for head in range(heads):
            part = slice(head * head_width, (head + 1) * head_width)
            for t, level in enumerate(levels):
                seen = [s for s, other in enumerate(levels) if other <= level]
                q, keys = query[t, part], key[seen, part]
                if config.attn_l2_norm:
                    factor = min(state[f"{name}.attn.scale_mul_1H11"][0, head].exp().item(), 100)
                    scores = factor * (keys / keys.norm(dim=1, keepdim=True)) @ (q / q.norm())
                else:
                    scores = keys @ q / (4 * math.sqrt(head_width))
                mixed[t, part] = scores.softmax(dim=0) @ value[seen, part]
        x_TD = x_TD + gate1 * linear(mixed, f"{name}.attn.proj")
        hidden = linear(modulated(x_TD, scale2, shift2), f"{name}.ffn.fc1")
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        x_TD = x_TD + gate2 * linear(hidden / 2 * (1 + inner.tanh()), f"{name}.ffn.fc2")
    scale, shift = vectors("head_nm.ada_lin", 2)
    return linear(modulated(x_TD, scale, shift), "head")


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
@torch.no_grad()
def test_the_network_is_the_formula_written_out(shared_aln, attn_l2_norm) -> None:
    policy = tiny_var(
        seed=2, shared_aln=shared_aln, attn_l2_norm=attn_l2_norm, mlp_ratio=2.5, norm_eps=1e-3
    )
    class_ids_B, tokens_BL = random_images(policy, batch=3)
    found = policy.teacher_forced(class_ids_B, tokens_BL).double()
    expected = torch.stack(
        [by_hand(policy, int(c), t) for c, t in zip(class_ids_B, tokens_BL, strict=True)]
    )
    # Logits of order 1 to 10 through two float32 layers; a head with factor 100 amplifies.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_the_class_reaches_every_position() -> None:
    policy = tiny_var()
    tokens_BL = torch.zeros(2, policy.num_tokens, dtype=torch.int64)
    a, b = policy.teacher_forced(torch.tensor([0, policy.null_class]), tokens_BL)
    assert ((a - b).abs().amax(dim=1) > 1e-3).all()


@torch.no_grad()
def test_a_fresh_policy_is_almost_uniform_and_its_blocks_do_almost_nothing() -> None:
    torch.manual_seed(0)
    policy = VAR(
        VarConfig(3, 64, 4, PATCH_NUMS, codebook_size=33, code_dim=CODE_DIM), tiny_quantizer()
    )
    class_ids_B, tokens_BL = random_images(policy, batch=4)
    logits = policy.teacher_forced(class_ids_B, tokens_BL)
    assert 1e-3 < logits.std() < 0.1
    for block in policy.blocks:
        block.ada_lin[1].weight.zero_()
    without = policy.teacher_forced(class_ids_B, tokens_BL)
    torch.testing.assert_close(without, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("has_gelu", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (5, 8), (3, 7, 8)], ids=str)
def test_a_linear_layer_is_the_same_with_and_without_gradients(shape, has_gelu) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in (shape, (6, 8), (6,)))
    with torch.no_grad():
        found = linear(x, weight, bias, has_gelu=has_gelu)
    weight.requires_grad_(True)
    expected = linear(x, weight, bias, has_gelu=has_gelu)
    assert expected.requires_grad and not found.requires_grad
    # Sums of 8 products of order 1; the two libraries' tanh differ by some 1e-6.
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=5e-6)
