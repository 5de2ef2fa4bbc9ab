"""Captions as conditions: one cached slot equals all of them, and padding never matters.

Shapes: B images, L image tokens, N captions, S condition slots, T positions, V codebook, H heads,
K head width, D width.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.precision import cast_parameters
from rlgen.nn.rotary import apply_rotary
from rlgen.nn.weights import tensors_to_bytes
from rlgen.policies.captions import PROMPTS_KEY, Captions, load_captions, save_captions
from rlgen.policies.llamagen import LlamaGen
from rlgen.sampling.decode import decode
from rlgen.storage import write_bytes
from rlgen.types import SamplingSettings
from tests.tiny_gpt import (
    FEATURE_WIDTH,
    NUM_SLOTS,
    VALID_TOKENS,
    random_images,
    tiny_captions,
    tiny_llamagen,
    tiny_text_llamagen,
)


def all_slots(
    policy: LlamaGen, captions: Captions, class_ids_B: Tensor, tokens_BL: Tensor
) -> Tensor:
    """Logits [B, L, V] in float64 with every slot and an explicit mask, as published."""
    state = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    num_captions, heads = len(captions.prompts), policy.config.num_heads
    num_codes = tokens_BL.shape[1] - 1
    inputs, seen = [], []
    for class_id in class_ids_B.tolist():
        num_valid = int(captions.num_valid_N[class_id % num_captions])
        slots_SW = torch.zeros(NUM_SLOTS, FEATURE_WIDTH, dtype=torch.float64)
        caption = captions.features_NTW[class_id % num_captions, :num_valid]
        slots_SW[NUM_SLOTS - num_valid :] = caption.double()
        if class_id >= num_captions:
            slots_SW = state["cls_embedding.uncond_embedding"]
        inputs.append(slots_SW)
        seen.append(torch.arange(NUM_SLOTS) >= NUM_SLOTS - num_valid)
    hidden = torch.stack(inputs) @ state["cls_embedding.cap_proj.fc1.weight"].T
    hidden = F.gelu(hidden, approximate="tanh") @ state["cls_embedding.cap_proj.fc2.weight"].T
    codes = state["tok_embeddings.weight"][tokens_BL[:, :-1]]
    x_BTD = torch.cat([hidden, codes], dim=1)
    length = x_BTD.shape[1]
    columns_BT = torch.cat([torch.stack(seen), torch.ones(len(seen), num_codes).bool()], dim=1)
    mask_BTT = torch.ones(length, length).tril().bool() & columns_BT[:, None]
    mask_BTT = mask_BTT | torch.eye(length).bool()
    table = policy.rotary(0, length)
    for i in range(policy.config.num_layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in state.items()}
        qkv = normed(x_BTD, layer["attention_norm.weight"]) @ layer["attention.wqkv.weight"].T
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )
        query, key = (turned(part, table) for part in (query, key))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask_BTT[:, None], -torch.inf).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        x_BTD = x_BTD + mixed @ layer["attention.wo.weight"].T
        h_BTD = normed(x_BTD, layer["ffn_norm.weight"])
        gate = F.silu(h_BTD @ layer["feed_forward.w1.weight"].T)
        up = h_BTD @ layer["feed_forward.w3.weight"].T
        x_BTD = x_BTD + (gate * up) @ layer["feed_forward.w2.weight"].T
    logits = normed(x_BTD, state["norm.weight"]) @ state["output.weight"].T
    return logits[:, NUM_SLOTS - 1 :]


def normed(x_BTD: Tensor, weight: Tensor) -> Tensor:
    return weight * x_BTD / (x_BTD.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def turned(x_BHTK: Tensor, table: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BHTK.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.view_as_complex(table.double())).flatten(-2)


def cached_logits(policy: LlamaGen, class_ids_B: Tensor, tokens_BL: Tensor) -> Tensor:
    logits: list[Tensor] = []

    def choose(logits_B1V: Tensor, block: int) -> Tensor:
        logits.append(logits_B1V)
        return tokens_BL[:, block, None]

    decode(policy, class_ids_B, SamplingSettings(), choose)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_one_slot_equals_all_slots_with_a_mask() -> None:
    # Seven valid tokens fill the table, one is the least; the slots are nine.
    policy = tiny_text_llamagen()
    _, tokens_BL = random_images(policy, 8)
    ids_B = torch.arange(8)  # each caption, then its absence
    expected = all_slots(policy, tiny_captions(), ids_B, tokens_BL)
    # Logits of order 1 to 10 through two float32 layers.
    one_pass = policy.teacher_forced(ids_B, tokens_BL).double()
    torch.testing.assert_close(one_pass, expected, rtol=1e-5, atol=1e-4)
    cached = cached_logits(policy, ids_B, tokens_BL).double()
    torch.testing.assert_close(cached, expected, rtol=1e-5, atol=1e-4)
    assert expected.std() > 0.5, "logits that are all alike would prove nothing"


@pytest.mark.parametrize("valid_tokens", [(NUM_SLOTS, 2), (1, 1), (0, 4)])
@torch.no_grad()
def test_captions_of_extreme_lengths(valid_tokens) -> None:
    policy = tiny_text_llamagen(valid_tokens=valid_tokens)
    _, tokens_BL = random_images(policy, 4)
    ids_B = torch.arange(4)
    expected = all_slots(policy, tiny_captions(valid_tokens), ids_B, tokens_BL)
    for found in (policy.teacher_forced(ids_B, tokens_BL), cached_logits(policy, ids_B, tokens_BL)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_the_cache_holds_one_position_for_the_condition() -> None:
    policy = tiny_text_llamagen()
    cache = policy.allocate_cache(2)
    assert {layer.keys.shape[2] for layer in cache.layers} == {policy.num_tokens}
    with torch.no_grad():
        policy.prefill(torch.tensor([0, 2]), cache)
    for layer in cache.layers:
        assert not layer.keys.any(), "the condition's key is zero"
        assert layer.values[:, :, 0].any() and not layer.values[:, :, 1:].any()
    assert cache.bias_B11T is not None
    # Log of 1 and of 7 tokens.
    torch.testing.assert_close(cache.bias_B11T[:, 0, 0, 0], torch.tensor([0.0, 1.9459101]))
    assert not cache.bias_B11T[..., 1:].any()


@torch.no_grad()
def test_what_lies_in_the_padding_does_not_matter() -> None:
    policy = tiny_text_llamagen()
    ids_B, tokens_BL = random_images(policy, 4)
    before = policy.teacher_forced(ids_B, tokens_BL)
    captions = tiny_captions()
    for features_TW, num_valid in zip(captions.features_NTW, VALID_TOKENS, strict=True):
        features_TW[num_valid:] = 1e3
    policy.set_captions(captions)
    assert torch.equal(policy.teacher_forced(ids_B, tokens_BL), before)
    captions.features_NTW[1, 2] += 1.0  # the last valid one of three
    policy.set_captions(captions)
    changed = (policy.teacher_forced(ids_B, tokens_BL) - before).abs().amax(dim=(1, 2))
    assert changed[1] > 1e-2 and not changed[[0, 2, 3]].any()


@torch.no_grad()
def test_padding_that_all_captions_share_costs_nothing() -> None:
    policy = tiny_text_llamagen()
    ids_B, tokens_BL = random_images(policy, 4)
    before = policy.teacher_forced(ids_B, tokens_BL)
    captions = tiny_captions()
    padded = F.pad(captions.features_NTW, (0, 0, 0, 500))  # more than the policy has slots
    policy.set_captions(Captions(captions.prompts, padded, captions.num_valid_N))
    assert policy.cls_embedding(ids_B)[0].shape[1] == max(VALID_TOKENS)
    assert torch.equal(policy.teacher_forced(ids_B, tokens_BL), before)


@torch.no_grad()
def test_longer_captions_in_the_table_change_nothing_for_the_others() -> None:
    policy = tiny_text_llamagen(valid_tokens=(2, 3))
    ids_B, tokens_BL = random_images(policy, 2)
    before = policy.teacher_forced(torch.cat([ids_B, ids_B + 2]), tokens_BL.repeat(2, 1))
    features = F.pad(tiny_captions((2, 3)).features_NTW, (0, 0, 0, NUM_SLOTS - 3))
    longest = torch.ones(1, NUM_SLOTS, FEATURE_WIDTH)
    policy.set_captions(
        Captions(("a", "b", "c"), torch.cat([features, longest]), torch.tensor([2, 3, NUM_SLOTS]))
    )
    after = policy.teacher_forced(torch.cat([ids_B, ids_B + 3]), tokens_BL.repeat(2, 1))
    # Other positions of the same sums: float32 rounding on logits of order 1 to 10.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_no_caption_keeps_the_captions_length_and_nothing_else() -> None:
    policy = tiny_text_llamagen()
    tokens_BL = random_images(policy, 1)[1].expand(4, -1)
    null_B = policy.null_of(torch.arange(4))
    assert null_B.tolist() == [4, 5, 6, 7] and policy.null_class == policy.num_classes == 4
    logits = policy.teacher_forced(null_B, tokens_BL)
    assert torch.equal(logits[1], logits[3]), "captions of three tokens each"
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "of one and of three tokens"


@torch.no_grad()
def test_in_bfloat16_one_slot_is_as_near_to_the_truth_as_all_slots() -> None:
    lengths = (NUM_SLOTS, 5, 7)  # their logarithms are rounded in bfloat16
    policy = tiny_text_llamagen(valid_tokens=lengths, width=64)
    for parameter in policy.parameters():
        if parameter.ndim == 2:
            parameter.mul_(0.5)
    _, tokens_BL = random_images(policy, 3)
    ids_B = torch.arange(3)
    truth = all_slots(policy, tiny_captions(lengths), ids_B, tokens_BL)
    cast_parameters(policy, "bfloat16")
    rounded = all_slots(policy, tiny_captions(lengths), ids_B, tokens_BL)
    found = policy.teacher_forced(ids_B, tokens_BL).double()
    # Rounding the weights alone, with exact arithmetic after, is the least that bfloat16 costs.
    assert (found - truth).abs().mean() < 4 * (rounded - truth).abs().mean()


@torch.no_grad()
def test_turned_pairs_are_those_of_the_model() -> None:
    # The reference above has a rotation of its own; it must be the same one.
    x_BTHK = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    table = tiny_llamagen(width=16).rotary(0, 5)
    expected = turned(x_BTHK.double().transpose(1, 2), table).transpose(1, 2)
    torch.testing.assert_close(apply_rotary(x_BTHK, table).double(), expected)


def test_the_unconditional_embedding_is_no_parameter() -> None:
    policy = tiny_text_llamagen()
    assert "cls_embedding.uncond_embedding" in policy.state_dict()
    assert "cls_embedding.uncond_embedding" not in dict(policy.named_parameters())
    assert not any("features" in name or "num_valid" in name for name in policy.state_dict())


def test_captions_come_back_from_a_file(tmp_path) -> None:
    captions = tiny_captions()
    for location in (str(tmp_path / "captions.safetensors"), "memory://text/captions.safetensors"):
        save_captions(location, captions)
        loaded = load_captions(location)
        assert loaded.prompts == captions.prompts
        assert torch.equal(loaded.features_NTW, captions.features_NTW)
        assert torch.equal(loaded.num_valid_N, captions.num_valid_N)


def broken(**changes: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    captions = tiny_captions()
    parts: dict[str, Any] = {
        "features": captions.features_NTW,
        "num_valid": captions.num_valid_N,
        "prompts": '["a", "b", "c", "d"]',
    }
    parts |= changes
    prompts = parts.pop("prompts")
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return tensors, {} if prompts is None else {PROMPTS_KEY: prompts}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": None}, "metadata 'rlgen.prompts' is no list of texts"),
        ({"prompts": "[1, 2]"}, "is no list of texts"),
        ({"prompts": "{"}, "is no list of texts"),
        ({"prompts": "[]"}, "has no prompts"),
        ({"prompts": '["a"]'}, r"features are \[4, 7, 12\] torch.float32 for 1 prompts"),
        ({"num_valid": None}, r"tensors are \['features'\]"),
        ({"num_valid": torch.tensor([1, 2])}, r"num_valid is \[2\] torch.int64 for 4 prompts"),
        ({"num_valid": torch.tensor([1, 2, 8, 1])}, r"num_valid\[2\] = 8 is not within 1 and 7"),
        ({"num_valid": torch.tensor([1, 2, 3, 0])}, r"num_valid\[3\] = 0 is not within 1 and 7"),
        ({"features": torch.ones(4, 7, 12).long()}, "features are .* torch.int64"),
        ({"features": torch.full((4, 7, 12), torch.nan)}, "some features are not finite"),
    ],
)
def test_a_file_without_proper_captions_is_refused(tmp_path, changes, message) -> None:
    location = str(tmp_path / "captions.safetensors")
    write_bytes(location, tensors_to_bytes(*broken(**changes)))
    with pytest.raises(CheckpointError, match=rf"captions\.safetensors.*{message}.*save_captions"):
        load_captions(location)


def test_captions_that_do_not_fit_the_policy_are_refused() -> None:
    policy = tiny_text_llamagen()
    for width, length in ((FEATURE_WIDTH, NUM_SLOTS + 1), (FEATURE_WIDTH + 1, 2)):
        features = torch.zeros(1, length, width)
        with pytest.raises(ConfigError, match=f"{length} tokens of {width} features.*at most 9"):
            policy.set_captions(Captions(("a",), features, torch.tensor([length])))
    with pytest.raises(ConfigError, match="class-conditional policy"):
        tiny_llamagen().set_captions(tiny_captions())


def test_a_text_policy_without_captions_says_what_is_missing() -> None:
    policy = tiny_llamagen(caption_width=FEATURE_WIDTH, num_caption_slots=NUM_SLOTS)
    assert policy.num_classes == 0
    with pytest.raises(ConfigError, match=r"set policy\.captions"):
        policy.teacher_forced(torch.tensor([0]), torch.zeros(1, 9, dtype=torch.int64))
