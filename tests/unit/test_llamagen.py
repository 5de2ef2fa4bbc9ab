"""LlamaGen's architecture: sizes and names of the public weights, causality, weight files."""

from typing import Any

import pytest
import torch

from rlgen.config import RunConfig
from rlgen.errors import CheckpointError, ConfigError
from rlgen.nn.weights import save_weights, state_sha256
from rlgen.policies.captions import save_captions
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.policies.load import load_policy, save_policy
from tests.tiny import CPU, tiny_policy
from tests.tiny_gpt import (
    random_images,
    tiny_captions,
    tiny_llamagen,
    tiny_text_llamagen,
    tiny_vqgan_gpt,
)

PUBLISHED = {
    "B": (12, 12, 768, 2048, 110_888_448),
    "L": (24, 16, 1024, 2816, 342_910_976),
    "XL": (36, 20, 1280, 3584, 774_699_520),
    "XXL": (48, 24, 1536, 4096, 1_410_972_672),
    "3B": (24, 32, 3200, 8704, 3_096_659_200),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size) -> None:
    num_layers, num_heads, width, ffn_width, num_parameters = PUBLISHED[size]
    config = LlamaGenConfig(num_layers, num_heads, width, grid_size=16)
    assert config.ffn_width == ffn_width
    with torch.device("meta"):
        policy = LlamaGen(config)
    assert sum(p.numel() for p in policy.parameters()) == num_parameters
    assert policy.num_tokens == 256 and policy.null_class == 1000


def test_tensors_have_the_public_names_and_shapes() -> None:
    config = LlamaGenConfig(2, 2, 16, grid_size=3, codebook_size=17, num_classes=4)
    expected = {
        "cls_embedding.embedding_table.weight": [5, 16],
        "tok_embeddings.weight": [17, 16],
        "norm.weight": [16],
        "output.weight": [17, 16],
    }
    for i in range(2):
        expected |= {
            f"layers.{i}.attention.wqkv.weight": [48, 16],
            f"layers.{i}.attention.wo.weight": [16, 16],
            f"layers.{i}.feed_forward.w1.weight": [256, 16],
            f"layers.{i}.feed_forward.w2.weight": [16, 256],
            f"layers.{i}.feed_forward.w3.weight": [256, 16],
            f"layers.{i}.attention_norm.weight": [16],
            f"layers.{i}.ffn_norm.weight": [16],
        }
    found = {name: list(tensor.shape) for name, tensor in LlamaGen(config).state_dict().items()}
    assert found == expected


@pytest.mark.parametrize(
    ("width", "multiple", "expected"),
    [(96, 256, 256), (100, 256, 512), (16, 16, 48), (48, 128, 128), (52, 128, 256)],
)
def test_ffn_width_is_eight_thirds_rounded_up(width, multiple, expected) -> None:
    config = LlamaGenConfig(1, 1, width, grid_size=2, ffn_multiple_of=multiple)
    assert config.ffn_width == expected


@pytest.mark.parametrize(("width", "heads"), [(30, 4), (24, 4), (16, 8)])
def test_head_widths_that_rotary_pairs_do_not_divide_are_refused(width, heads) -> None:
    with pytest.raises(ConfigError, match=f"width = {width} over num_heads = {heads}.*divisible"):
        LlamaGenConfig(1, heads, width, grid_size=2)


def by_hand(policy: LlamaGen, class_id: int, codes: list[int]) -> torch.Tensor:
    """Logits [L, V] of one image in float64, position by position, head by head."""
    state = {name: tensor.double() for name, tensor in policy.state_dict().items()}
    config = policy.config
    head_width = config.width // config.num_heads

    def normed(x_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x_TD / (x_TD.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()

    def turned(x_K: torch.Tensor, position: int) -> torch.Tensor:
        if position == 0:  # the condition: zero, as in the public code
            return torch.zeros_like(x_K)
        row, column = divmod(position - 1, config.grid_size)
        quarter = head_width // 4
        steps = 10000.0 ** (-torch.arange(quarter).double() / quarter)
        angles = torch.cat([row * steps, column * steps])
        pairs = torch.view_as_complex(x_K.view(-1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten()

    inputs = [state["cls_embedding.embedding_table.weight"][class_id]]
    inputs += [state["tok_embeddings.weight"][code] for code in codes[:-1]]
    x_TD = torch.stack(inputs)
    for i in range(config.num_layers):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in state.items()}
        qkv = normed(x_TD, layer["attention_norm.weight"]) @ layer["attention.wqkv.weight"].T
        mixed = torch.zeros_like(x_TD)
        for head in range(config.num_heads):
            part = slice(head * head_width, (head + 1) * head_width)
            query, key, value = (block[:, part] for block in qkv.split(config.width, dim=1))
            for t in range(len(x_TD)):
                scores = torch.stack(
                    [turned(query[t], t) @ turned(key[s], s) for s in range(t + 1)]
                )
                weights = (scores / head_width**0.5).softmax(dim=0)
                mixed[t, part] = weights @ value[: t + 1]
        x_TD = x_TD + mixed @ layer["attention.wo.weight"].T
        h_TD = normed(x_TD, layer["ffn_norm.weight"])
        gate = h_TD @ layer["feed_forward.w1.weight"].T
        gate = gate / (1 + (-gate).exp())
        up = h_TD @ layer["feed_forward.w3.weight"].T
        x_TD = x_TD + (gate * up) @ layer["feed_forward.w2.weight"].T
    return normed(x_TD, state["norm.weight"]) @ state["output.weight"].T


@torch.no_grad()
def test_the_network_is_the_formula_written_out() -> None:
    policy = tiny_policy(seed=4)
    for name, parameter in policy.named_parameters():
        if "norm" in name:  # ones would hide a norm that isn't applied
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    codes = [3, 16, 0, 7, 7, 1, 12, 5, 9]
    found = policy.teacher_forced(torch.tensor([2]), torch.tensor([codes]))[0]
    # Logits of order 1 to 5 through two float32 layers.
    torch.testing.assert_close(found.double(), by_hand(policy, 2, codes), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_code_changes_the_logits_after_it_and_none_before() -> None:
    policy = tiny_policy()
    length, codes = policy.num_tokens, policy.codebook_size
    generator = torch.Generator().manual_seed(0)
    tokens_BL = torch.randint(codes, (2, length), generator=generator)
    class_ids_B = torch.tensor([1, 3])
    logits = policy.teacher_forced(class_ids_B, tokens_BL)
    for position in range(length):
        changed = tokens_BL.clone()
        changed[:, position] = (changed[:, position] + 1) % codes
        difference = (policy.teacher_forced(class_ids_B, changed) - logits).abs().amax(dim=(0, 2))
        # Masked positions add exact zeros, so these are equal to the last bit.
        assert not difference[: position + 1].any(), position
        assert (difference[position + 1 :] > 1e-4).all(), position


@torch.no_grad()
def test_the_class_reaches_every_position() -> None:
    policy = tiny_policy()
    tokens_BL = torch.zeros(2, policy.num_tokens, dtype=torch.int64)
    a, b = policy.teacher_forced(torch.tensor([0, policy.null_class]), tokens_BL)
    assert ((a - b).abs().amax(dim=1) > 1e-4).all()


@torch.no_grad()
def test_train_and_eval_mode_are_the_same_function() -> None:
    policy = tiny_policy()
    tokens_BL = torch.zeros(3, policy.num_tokens, dtype=torch.int64)
    class_ids_B = torch.tensor([0, 1, 2])
    in_eval = policy.eval()(class_ids_B, tokens_BL)
    assert torch.equal(policy.train()(class_ids_B, tokens_BL), in_eval)


def load(location: str, **policy: Any) -> LlamaGen:
    return load_policy(RunConfig(policy={"checkpoint": location, **policy}), device=CPU)


@pytest.mark.parametrize("where", ["file", "url"])
def test_a_saved_policy_comes_back(tmp_path, where) -> None:
    policy = tiny_policy(seed=2)
    location = {
        "file": str(tmp_path / "policy.safetensors"),
        "url": "memory://test-llamagen/policy.safetensors",
    }[where]
    save_policy(location, policy)
    loaded = load(location)
    assert loaded.config == policy.config
    assert state_sha256(loaded.state_dict()) == state_sha256(policy.state_dict())
    tokens_BL = torch.zeros(2, policy.num_tokens, dtype=torch.int64)
    class_ids_B = torch.tensor([0, 4])
    assert torch.equal(loaded(class_ids_B, tokens_BL), policy(class_ids_B, tokens_BL))


def test_a_saved_text_policy_comes_back_with_its_captions(tmp_path) -> None:
    location, text = (str(tmp_path / f"{name}.safetensors") for name in ("policy", "captions"))
    policy = tiny_text_llamagen()
    save_policy(location, policy)
    save_captions(text, tiny_captions())
    loaded = load(location, captions=text)
    assert loaded.config == policy.config and loaded.num_classes == 4
    class_ids_B, tokens_BL = random_images(policy, 4)
    assert torch.equal(loaded(class_ids_B, tokens_BL), policy(class_ids_B, tokens_BL))
    with pytest.raises(ConfigError, match=r"conditioned on text; set policy\.captions"):
        load(location)


def test_a_saved_gpt_of_the_taming_family_comes_back(tmp_path) -> None:
    location = str(tmp_path / "policy.safetensors")
    policy = tiny_vqgan_gpt(has_null_class=True)
    save_policy(location, policy)
    loaded = load(location)
    assert loaded.config == policy.config
    assert state_sha256(loaded.state_dict()) == state_sha256(policy.state_dict())


def test_a_file_of_another_kind_is_refused(tmp_path) -> None:
    location = str(tmp_path / "tokenizer.safetensors")
    save_weights(location, tiny_policy(), kind="conv_vq", config={})
    with pytest.raises(CheckpointError, match=r"tokenizer.*is a conv_vq; a policy is one of"):
        load(location)


def test_a_config_of_another_version_is_refused(tmp_path) -> None:
    location = str(tmp_path / "policy.safetensors")
    fields = {"num_layers": 2, "num_heads": 2, "width": 16, "depth": 7}
    save_weights(location, tiny_policy(), kind="llamagen", config=fields)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors.*depth"):
        load(location)


def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path) -> None:
    location = str(tmp_path / "policy.safetensors")
    policy = tiny_policy()
    fields = vars(policy.config) | {"num_layers": 3}
    save_weights(location, policy, kind="llamagen", config=fields)
    with pytest.raises(CheckpointError, match=r"7 missing \(layers\.2\.attention"):
        load(location)


def test_without_dropped_labels_there_is_no_null_row() -> None:
    policy = tiny_llamagen(has_null_class=False)
    assert policy.cls_embedding.get_parameter("embedding_table.weight").shape[0] == 4
    assert policy.null_class is None


@torch.no_grad()
def test_norm_eps_and_rope_base_are_used() -> None:
    plain = tiny_llamagen()
    class_ids_B, tokens_BL = random_images(plain, 2)
    logits = plain.teacher_forced(class_ids_B, tokens_BL)
    for fields in ({"norm_eps": 1e-2}, {"rope_base": 100.0}):
        other = tiny_llamagen(**fields).teacher_forced(class_ids_B, tokens_BL)
        assert (other - logits).abs().max() > 1e-3, fields


def test_rotary_angles_keep_their_precision_whatever_the_model_has() -> None:
    policy = tiny_llamagen()
    table = policy.rotary(0, 9).clone()
    policy.to(torch.bfloat16)
    assert policy.output.weight.dtype == torch.bfloat16
    assert torch.equal(policy.rotary(0, 9), table)
    with torch.device("meta"):
        empty = LlamaGen(policy.config)
    assert torch.equal(empty.to_empty(device="cpu").rotary(0, 9), table)


@torch.no_grad()
def test_a_head_width_that_is_no_power_of_two_serves() -> None:
    policy = tiny_llamagen(width=40, num_heads=2)  # as the 3B model's heads of 100
    class_ids_B, tokens_BL = random_images(policy, 1)
    found = policy.teacher_forced(class_ids_B, tokens_BL)[0]
    expected = by_hand(policy, 0, tokens_BL[0].tolist())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
