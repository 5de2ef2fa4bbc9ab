"""Export to the public layouts: what is written, and that it comes back bit for bit."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlgen.errors import CheckpointError, ConfigError
from rlgen.jobs.export import main
from rlgen.learner.checkpoint import commit_checkpoint, write_parts
from rlgen.learner.state_io import POLICY
from rlgen.nn.public_files import read_public_state, select_state
from rlgen.nn.weights import save_weights, weight_bytes
from rlgen.policies.load import build_policy
from rlgen.policies.public_layout import public_layout
from rlgen.tokenizers.load import build_tokenizer
from rlgen.tokenizers.multiscale import MultiScaleConfig, MultiScaleQuantizer

PATCH_NUMS = (1, 2, 3)
FIELDS: dict[str, dict[str, Any]] = {
    "llamagen": {
        "num_layers": 2,
        "num_heads": 2,
        "width": 16,
        "grid_size": 3,
        "codebook_size": 17,
        "num_classes": 4,
    },
    "var": {
        "depth": 2,
        "width": 16,
        "num_heads": 2,
        "patch_nums": PATCH_NUMS,
        "codebook_size": 17,
        "code_dim": 4,
        "num_classes": 4,
    },
    "vqgan_gpt": {
        "num_layers": 2,
        "num_heads": 2,
        "width": 16,
        "grid_size": 3,
        "codebook_size": 17,
        "num_classes": 4,
    },
}


def policy_of(kind: str) -> Any:
    quantizer = MultiScaleQuantizer(
        MultiScaleConfig(
            codebook_size=17, code_dim=4, patch_nums=PATCH_NUMS, num_phi=2, quant_resi=0.5
        )
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        policy = build_policy(kind, FIELDS[kind], kind, quantizer if kind == "var" else None)
        for parameter in policy.parameters():
            nn.init.normal_(parameter)
    return policy


def vqgan() -> Any:
    return build_tokenizer(
        "taming_vqgan",
        {"n_embed": 17, "embed_dim": 8, "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
        | {"z_channels": 8, "resolution": 6, "attn_resolutions": [3]},
    )


def written(tmp_path: Path, kind: str, policy: Any) -> str:
    path = tmp_path / f"{kind}.safetensors"
    save_weights(str(path), policy, kind=kind, config=asdict(policy.config))
    return str(path)


def assert_same(found: dict[str, Tensor], policy: nn.Module) -> None:
    own = policy.state_dict()
    assert found.keys() == own.keys()
    for name, tensor in own.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", FIELDS)
def test_an_exported_policy_comes_back_bit_for_bit(tmp_path: Path, kind: str, suffix: str) -> None:
    policy = policy_of(kind)
    output = tmp_path / f"out.{suffix}"
    assert main(["--checkpoint", written(tmp_path, kind, policy), "--output", str(output)]) == 0
    assert_same(select_state(read_public_state(str(output)), kind), policy)


def test_a_run_s_checkpoint_is_exported_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    policy = policy_of("llamagen")
    uri = str(tmp_path / "step-00004")
    payload = weight_bytes(policy, kind="llamagen", config=asdict(policy.config))
    commit_checkpoint(uri, write_parts(uri, {POLICY: lambda: payload}), meta={})
    output = tmp_path / "out.pt"
    main(["--checkpoint", uri, "--output", str(output)])
    assert_same(read_public_state(str(output)), policy)

    (Path(uri) / POLICY).write_bytes(payload[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        main(["--checkpoint", uri, "--output", str(tmp_path / "other.pt")])
    assert not (tmp_path / "other.pt").exists()


def test_llamagen_lies_under_model() -> None:
    state = policy_of("llamagen").state_dict()
    layout = public_layout("llamagen", FIELDS["llamagen"], state)
    assert layout.keys() == {"model"} and layout["model"].keys() == state.keys()


def test_var_has_the_tables_that_its_strict_loading_asks_for() -> None:
    layout = public_layout("var", FIELDS["var"], policy_of("var").state_dict())
    levels = layout["lvl_1L"]
    assert levels.tolist() == [[0] + [1] * 4 + [2] * 9] and levels.dtype == torch.int64
    mask = layout["attn_bias_for_masking"]
    assert mask.shape == (1, 1, 14, 14) and mask.dtype == torch.float32
    for query in range(14):
        for key in range(14):
            is_seen = levels[0, query] >= levels[0, key]
            assert mask[0, 0, query, key] == (0.0 if is_seen else -torch.inf)
    for index in range(2):
        zeros = layout[f"blocks.{index}.attn.zero_k_bias"]
        assert zeros.shape == (16,) and not zeros.any()
    assert "blocks.2.attn.zero_k_bias" not in layout


def test_a_taming_file_holds_the_transformer_with_masks_and_its_vqgan(tmp_path: Path) -> None:
    policy, tokenizer = policy_of("vqgan_gpt"), vqgan()
    place = tmp_path / "vqgan.ckpt"
    strays = {"loss.perceptual_loss.net.0.weight": torch.ones(1)}
    torch.save({"state_dict": tokenizer.state_dict() | strays}, place)
    output = tmp_path / "out.ckpt"
    source = written(tmp_path, "vqgan_gpt", policy)
    main(["--checkpoint", source, "--output", str(output), "--tokenizer", str(place)])
    content = torch.load(output, weights_only=True)["state_dict"]
    mask = content["transformer.blocks.1.attn.mask"]
    assert torch.equal(mask, torch.ones(9, 9).tril()[None, None])
    assert not any("loss." in name for name in content)
    both = read_public_state(str(output))
    assert_same(select_state(both, "vqgan_gpt"), policy)
    assert_same(select_state(both, "taming_vqgan"), tokenizer)


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    policy = policy_of("llamagen")
    output = tmp_path / "out.pt"
    output.write_bytes(b"precious")
    command = ["--checkpoint", written(tmp_path, "llamagen", policy), "--output", str(output)]
    with pytest.raises(ConfigError, match="--force"):
        main(command)
    assert output.read_bytes() == b"precious"
    main([*command, "--force"])
    assert_same(read_public_state(str(output)), policy)


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    llamagen = written(tmp_path, "llamagen", policy_of("llamagen"))
    output = str(tmp_path / "out.pt")
    with pytest.raises(ConfigError, match=r"must end in \.pt"):
        main(["--checkpoint", llamagen, "--output", str(tmp_path / "out.bin")])
    with pytest.raises(ConfigError, match=r"--tokenizer is for a vqgan_gpt"):
        main(["--checkpoint", llamagen, "--output", output, "--tokenizer", llamagen])
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        main(["--checkpoint", str(tmp_path), "--output", output])
    with pytest.raises(CheckpointError, match="'conv_vq' have no public layout"):
        public_layout("conv_vq", {}, {})
