"""Every family through the same learner, loader and embedded default."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.config import RunConfig, load_config
from rlgen.config.digits import DigitsConfig
from rlgen.digits.train_policy import make_policy
from rlgen.errors import CheckpointError, ConfigError
from rlgen.jobs import export
from rlgen.learner.learner import Learner
from rlgen.learner.preflight import check_inputs
from rlgen.nn.weights import state_sha256
from rlgen.policies.captions import Captions, load_captions, save_captions
from rlgen.policies.load import build_policy, load_policy, save_policy
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig
from rlgen.tokenizers.load import build_tokenizer, save_tokenizer
from rlgen.tokenizers.multiscale_conv_vq import MultiScaleConvVQ, MultiScaleConvVQConfig
from rlgen.tokenizers.published import open_tokenizer
from tests.tiny import CPU, sampled_batch, tiny_config

FAMILIES = ["llamagen", "vqgan", "vqgan_null", "var", "text"]
TEN = tuple("abcdefghij")
TINY_LLAMAGEN: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "width": 32,
    "grid_size": 4,
    "codebook_size": 33,
    "num_classes": 4,
    "ffn_multiple_of": 32,
}


def roughened(policy: Any) -> Any:
    """Weights large enough that distributions are far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2, generator=generator)
    return policy


def captions_of(count: int) -> Captions:
    generator = torch.Generator().manual_seed(2)
    return Captions(
        prompts=tuple(f"caption {i}" for i in range(count)),
        features_NTW=torch.randn(count, 7, 12, generator=generator),
        num_valid_N=torch.tensor([1 + i % 7 for i in range(count)]),
    )


def policy_of(family: str) -> Any:
    """A tiny policy, the same at every call."""
    torch.manual_seed(0)
    if family == "text":
        fields = TINY_LLAMAGEN | {"caption_width": 12, "num_caption_slots": 7}
        policy = build_policy("llamagen", fields, "here")
        policy.set_captions(captions_of(10))
        return roughened(policy)
    digits = DigitsConfig(
        family=family.removesuffix("_null"),  # type: ignore[arg-type]
        policy_width=32,
        policy_layers=2,
        policy_heads=2,
        class_dropout=0.0 if family == "vqgan" else 0.1,
    )
    tokenizer = (
        MultiScaleConvVQ(MultiScaleConvVQConfig()) if family == "var" else ConvVQ(ConvVQConfig())
    )
    return roughened(make_policy(tokenizer, digits))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout__cfg_scale": 2.0, "rollout__temperature": 0.7},
        {"rollout__cfg_scale": 2.0, "rollout__cfg_interval": 2, "rollout__top_k": 20},
        {"rollout__top_p": 0.9, "grpo__ratio": "sequence", "grpo__scale_weight_alpha": 0.7},
    ],
    ids=str,
)
def test_on_policy_the_ratio_is_one_and_an_update_helps(family, settings) -> None:
    if family == "vqgan" and settings.get("rollout__cfg_scale", 1.0) > 1.0:
        pytest.skip("has no null class")
    config = tiny_config(
        class_names=TEN, grpo__kl_coef=0.0, learner__lr=1e-3, evaluation__num_images=100, **settings
    )
    learner = Learner(policy_of(family), config, device=CPU)
    batch = sampled_batch(policy_of(family), config)
    first = learner.update(batch)
    assert first["policy/ratio_max_deviation"] < 1e-4  # the gate's own bar; float32
    assert first["policy/ratio_clipped_frac"] == 0.0
    again = learner.update(dataclasses.replace(batch, step=1))
    assert again["loss/policy"] < first["loss/policy"] - 1e-4, "good images became likelier"


@pytest.mark.parametrize("family", ["vqgan", "vqgan_null", "var", "text"])
def test_a_policy_file_gives_the_policy_back(family, tmp_path: Path) -> None:
    policy = policy_of(family)
    save_policy(str(tmp_path / "policy.safetensors"), policy)
    changes = {"policy.checkpoint": str(tmp_path / "policy.safetensors")}
    if family == "var":
        tokenizer = MultiScaleConvVQ(MultiScaleConvVQConfig())
        tokenizer.quantize.load_state_dict(policy.quantizer.state_dict())
        save_tokenizer(str(tmp_path / "tokenizer.safetensors"), tokenizer)
        changes["tokenizer.checkpoint"] = str(tmp_path / "tokenizer.safetensors")
    if family == "text":
        save_captions(str(tmp_path / "captions.safetensors"), captions_of(10))
        changes["policy.captions"] = str(tmp_path / "captions.safetensors")
    loaded = load_policy(RunConfig().with_values(changes), device=CPU)
    assert state_sha256(loaded.state_dict()) == state_sha256(policy.state_dict())
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(policy.codebook_size, (3, policy.num_tokens), generator=generator)
    class_ids = torch.tensor([0, 5, 9])
    with torch.no_grad():
        assert torch.equal(
            loaded.teacher_forced(class_ids, tokens), policy.teacher_forced(class_ids, tokens)
        )


def test_a_published_policy_loads_by_name_with_other_sizes_and_comes_back(tmp_path: Path) -> None:
    policy = roughened(build_policy("llamagen", TINY_LLAMAGEN, "here"))
    torch.save({"model": policy.state_dict(), "epoch": 3}, tmp_path / "c2i_tiny.pt")
    config = RunConfig().with_values(
        {
            "policy.checkpoint": str(tmp_path / "c2i_tiny.pt"),
            "policy.model": "llamagen-b-256",
            "policy.architecture": TINY_LLAMAGEN,
        }
    )
    loaded = load_policy(config, device=CPU)
    assert loaded.config.num_layers == 2 and loaded.num_classes == 4
    assert state_sha256(loaded.state_dict()) == state_sha256(policy.state_dict())
    save_policy(str(tmp_path / "trained.safetensors"), loaded)
    exported = tmp_path / "exported.pt"
    words = ["--checkpoint", str(tmp_path / "trained.safetensors"), "--output", str(exported)]
    assert export.main(words) == 0
    state = torch.load(exported, weights_only=True)["model"]
    assert state_sha256(state) == state_sha256(policy.state_dict())


def test_a_published_file_of_another_size_says_which(tmp_path: Path) -> None:
    policy = build_policy("llamagen", TINY_LLAMAGEN, "here")
    torch.save(policy.state_dict(), tmp_path / "c2i.pt")
    config = RunConfig().with_values(
        {"policy.checkpoint": str(tmp_path / "c2i.pt"), "policy.model": "llamagen-b-256"}
    )
    with pytest.raises(CheckpointError, match=r"missing.*width 32|mis-shaped"):
        load_policy(config, device=CPU)


def test_a_digest_that_differs_is_refused(tmp_path: Path) -> None:
    policy = policy_of("vqgan")
    save_policy(str(tmp_path / "policy.safetensors"), policy)
    config = RunConfig().with_values(
        {"policy.checkpoint": str(tmp_path / "policy.safetensors"), "policy.sha256": "0" * 64}
    )
    with pytest.raises(CheckpointError, match="0000"):
        load_policy(config, device=CPU)


def test_a_published_tokenizer_loads_by_name_with_other_sizes(tmp_path: Path) -> None:
    sizes = {"ch": 32, "z_channels": 32, "codebook_size": 33, "num_res_blocks": 1, "image_size": 64}
    torch.manual_seed(0)
    made = build_tokenizer("llamagen_vq", sizes)
    torch.save({"model": made.state_dict()}, tmp_path / "vq.pt")
    config = RunConfig().with_values(
        {
            "tokenizer.checkpoint": str(tmp_path / "vq.pt"),
            "tokenizer.model": "llamagen-vq-ds16",
            "tokenizer.architecture": sizes,
        }
    )
    loaded = open_tokenizer(config.tokenizer, device=CPU)
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded.decode(tokens), made.decode(tokens))


def test_var_without_a_multi_scale_tokenizer_is_refused(tmp_path: Path) -> None:
    save_policy(str(tmp_path / "policy.safetensors"), policy_of("var"))
    save_tokenizer(str(tmp_path / "tokenizer.safetensors"), ConvVQ(ConvVQConfig()))
    config = RunConfig().with_values(
        {
            "policy.checkpoint": str(tmp_path / "policy.safetensors"),
            "tokenizer.checkpoint": str(tmp_path / "tokenizer.safetensors"),
        }
    )
    with pytest.raises(ConfigError, match="VAR policy, which needs a multi-scale tokenizer"):
        load_policy(config, device=CPU)


@pytest.mark.parametrize("asked", ["evaluation.cfg_scales=[1.5]", "rollout.cfg_scale=1.5"])
def test_guidance_without_a_null_class_is_refused_before_anything_starts(asked, tmp_path) -> None:
    save_policy(str(tmp_path / "policy.safetensors"), policy_of("vqgan"))
    save_tokenizer(str(tmp_path / "tokenizer.safetensors"), ConvVQ(ConvVQConfig()))
    words = [
        f"policy.checkpoint={tmp_path}/policy.safetensors",
        f"tokenizer.checkpoint={tmp_path}/tokenizer.safetensors",
        "evaluation.cfg_scales=[]",
        asked,
    ]
    with pytest.raises(ConfigError, match=r"guidance \[1.5\].*has no null class"):
        check_inputs(load_config(None, words))


def test_a_text_policy_without_captions_is_refused(tmp_path: Path) -> None:
    save_policy(str(tmp_path / "policy.safetensors"), policy_of("text"))
    config = RunConfig().with_values({"policy.checkpoint": str(tmp_path / "policy.safetensors")})
    with pytest.raises(ConfigError, match=r"set policy.captions"):
        load_policy(config, device=CPU)


def test_captions_come_back(tmp_path: Path) -> None:
    save_captions(str(tmp_path / "c.safetensors"), captions_of(3))
    found = load_captions(str(tmp_path / "c.safetensors"))
    assert found.prompts == ("caption 0", "caption 1", "caption 2")
    np.testing.assert_array_equal(found.num_valid_N.numpy(), [1, 2, 3])
