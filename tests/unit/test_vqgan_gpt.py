"""taming's GPT: sizes and names of the public weights, the class as a token, refusals."""

import math

import pytest
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.policies.vqgan_gpt import VqganGpt, VqganGptConfig
from tests.tiny_gpt import random_images, tiny_vqgan_gpt


def test_the_published_size_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        policy = VqganGpt(VqganGptConfig(num_layers=48, num_heads=24, width=1536, grid_size=16))
    # 48 blocks of 12 D^2 + 13 D, two tables of 16384 D, positions of 256 D, a norm of 2 D.
    assert sum(p.numel() for p in policy.parameters()) == 1_410_640_896
    assert policy.num_tokens == 256 and policy.null_class is None


def test_tensors_have_the_public_names_and_shapes() -> None:
    expected = {
        "tok_emb.weight": [40, 24],
        "pos_emb": [1, 9, 24],
        "ln_f.weight": [24],
        "ln_f.bias": [24],
        "head.weight": [40, 24],
    }
    for i in range(2):
        for layer in ("key", "query", "value", "proj"):
            expected[f"blocks.{i}.attn.{layer}.weight"] = [24, 24]
            expected[f"blocks.{i}.attn.{layer}.bias"] = [24]
        for norm in ("ln1", "ln2"):
            expected |= {f"blocks.{i}.{norm}.weight": [24], f"blocks.{i}.{norm}.bias": [24]}
        expected |= {f"blocks.{i}.mlp.0.weight": [96, 24], f"blocks.{i}.mlp.0.bias": [96]}
        expected |= {f"blocks.{i}.mlp.2.weight": [24, 96], f"blocks.{i}.mlp.2.bias": [24]}
    found = {name: list(tensor.shape) for name, tensor in tiny_vqgan_gpt().state_dict().items()}
    assert found == expected


def by_hand(policy: VqganGpt, class_id: int, codes: list[int]) -> Tensor:
    """Logits [L, V] of one image in float64, position by position, head by head."""
    state = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    head_width = policy.config.width // policy.config.num_heads
    fed = [class_id, *codes[:-1]]
    x_TD = torch.stack([state["tok_emb.weight"][i] for i in fed]) + state["pos_emb"][0, : len(fed)]

    def normed(x_TD: Tensor, name: str) -> Tensor:
        centred = x_TD - x_TD.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return state[f"{name}.weight"] * centred / scale + state[f"{name}.bias"]

    def linear(x_TD: Tensor, name: str) -> Tensor:
        return x_TD @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i in range(policy.config.num_layers):
        h_TD = normed(x_TD, f"blocks.{i}.ln1")
        query, key, value = (
            linear(h_TD, f"blocks.{i}.attn.{name}") for name in ("query", "key", "value")
        )
        mixed = torch.zeros_like(x_TD)
        for head in range(policy.config.num_heads):
            part = slice(head * head_width, (head + 1) * head_width)
            for t in range(len(x_TD)):
                scores = key[: t + 1, part] @ query[t, part] / math.sqrt(head_width)
                mixed[t, part] = scores.softmax(dim=0) @ value[: t + 1, part]
        x_TD = x_TD + linear(mixed, f"blocks.{i}.attn.proj")
        hidden = linear(normed(x_TD, f"blocks.{i}.ln2"), f"blocks.{i}.mlp.0")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))  # exact GELU
        x_TD = x_TD + linear(hidden, f"blocks.{i}.mlp.2")
    return normed(x_TD, "ln_f") @ state["head.weight"].T


@torch.no_grad()
def test_the_network_is_the_formula_written_out() -> None:
    policy = tiny_vqgan_gpt(seed=4)
    codes = [3, 16, 0, 39, 7, 1, 12, 5, 9]
    found = policy.teacher_forced(torch.tensor([2]), torch.tensor([codes]))[0]
    # Logits of order 1 to 10 through two float32 layers.
    torch.testing.assert_close(found.double(), by_hand(policy, 2, codes), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_class_is_the_token_of_that_id() -> None:
    policy = tiny_vqgan_gpt()
    class_ids_B, tokens_BL = random_images(policy, 3)
    tokens_BL[:, :-1] = tokens_BL[:, :-1].clamp_min(policy.num_classes)  # no code is a class
    before = policy.teacher_forced(class_ids_B, tokens_BL)
    policy.tok_emb.weight[1].neg_()
    changed = (policy.teacher_forced(class_ids_B, tokens_BL) - before).abs().amax(dim=(1, 2))
    assert changed[1] > 1e-2 and not changed[[0, 2]].any()


@torch.no_grad()
def test_positions_beyond_the_image_are_kept_and_not_used() -> None:
    policy = tiny_vqgan_gpt(num_positions=20)
    assert list(policy.pos_emb.shape) == [1, 20, 24]
    class_ids_B, tokens_BL = random_images(policy, 2)
    before = policy.teacher_forced(class_ids_B, tokens_BL)
    policy.pos_emb[:, 9:] = torch.nan
    assert torch.equal(policy.teacher_forced(class_ids_B, tokens_BL), before)


def test_codes_need_not_be_a_square() -> None:
    policy = tiny_vqgan_gpt(num_tokens=6)
    assert policy.num_tokens == 6 and policy.block_sizes == (1,) * 6
    class_ids_B, tokens_BL = random_images(policy, 2)
    assert policy.teacher_forced(class_ids_B, tokens_BL).shape == (2, 6, 40)


@torch.no_grad()
def test_the_null_class_is_the_id_after_the_classes() -> None:
    policy = tiny_vqgan_gpt(has_null_class=True)
    assert policy.null_class == policy.num_classes == 4
    assert policy.null_of(torch.tensor([0, 3])).tolist() == [4, 4]
    assert len(policy.tok_emb.weight) == 40, "it shares the table"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 25}, r"width = 25 can't be split over num_heads = 2"),
        ({"num_classes": 41}, r"num_classes = 41 .* codebook_size = 40"),
        ({"num_classes": 40, "has_null_class": True}, r"num_classes = 40 with has_null_class"),
        ({"num_positions": 8}, r"num_positions = 8 is less than the 9 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_vqgan_gpt(**fields)
