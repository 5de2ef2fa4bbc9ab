"""Published weight files: every layout, what is ignored, what is refused, and what went wrong."""

import argparse
import pathlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlgen.config.models import model_spec
from rlgen.errors import CheckpointError
from rlgen.nn.public_files import load_public_state, read_public_state, select_state
from tests.published import TINY, build

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def saved(tmp_path: Path, content: Any, name: str = "w.pt", **options: Any) -> str:
    path = tmp_path / name
    torch.save(content, path, **options)
    return str(path)


def assert_is_state(found: dict[str, Tensor], wanted: dict[str, Tensor] = STATE) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def refused(location: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_public_state(location)
    return str(caught.value)


# -- layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "content",
    [
        {"model": STATE},
        {"module": STATE},
        {"state_dict": STATE},
        STATE,
        {"model": STATE, "ema": OTHER, "optimizer": {"state": {0: OTHER}}, "steps": 7},
        {"module": STATE, "state_dict": OTHER, "lr_scheduler": None},
        {"ema": STATE, "steps": 7},
        {"state_dict": {"module": STATE}},
        {"model": {"width": 3}, "state_dict": STATE},
        STATE | {"step": 7},
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {"model": {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}},
        {"model": STATE, "args": argparse.Namespace(lr=1e-4, name="B", betas=(0.9, 0.95))},
    ],
    ids=lambda content: "+".join(content),
)
def test_every_layout_gives_the_state(tmp_path: Path, content: Any, is_zip: bool) -> None:
    path = saved(tmp_path, content, _use_new_zipfile_serialization=is_zip)
    assert_is_state(read_public_state(path))


def test_the_content_tells_the_format_and_not_the_name(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.pt")
    assert_is_state(read_public_state(str(tmp_path / "model.pt")))
    assert_is_state(read_public_state(saved(tmp_path, STATE, "model.safetensors")))
    assert_is_state(read_public_state(f"file://{tmp_path}/model.safetensors"))


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(2)}
    assert_is_state(read_public_state(saved(tmp_path, state)), state)


def test_a_checkpoint_of_var_s_trainer_gives_both_models(tmp_path: Path) -> None:
    parts = {"config": {"label_smooth": 0.0}, "var_wo_ddp": STATE, "vae_local": OTHER}
    content = {"epoch": 3, "trainer": {**parts, "var_opt": {"optimizer": {}}}, "args": {"bs": 8}}
    state = read_public_state(saved(tmp_path, content))
    assert_is_state(select_state(state, "var"), STATE)
    assert_is_state(select_state(state, "var_vqvae"), OTHER)


def test_a_lightning_file_loads_without_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old files name the class of a callback; it is neither imported nor needed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
        path = saved(tmp_path, {"callbacks": {callback: {"best": 1.0}}, "state_dict": STATE})
    assert_is_state(read_public_state(path))
    assert name not in sys.modules


def test_tensors_are_mapped_from_the_disk(tmp_path: Path) -> None:
    """A checkpoint with its optimiser must not be read as a whole."""
    path = saved(tmp_path, {"model": STATE, "optimizer": {"state": {0: torch.zeros(4_000_000)}}})
    state = read_public_state(path)
    assert path in Path("/proc/self/maps").read_text()
    assert_is_state(state)


# -- what is refused ---------------------------------------------------------------------------


class Payload:
    """Runs a command when it is unpickled by a reader that is not careful."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_executed(tmp_path: Path, is_zip: bool) -> None:
    trap = Payload(f"touch {tmp_path}/executed")
    path = saved(tmp_path, {"model": STATE, "x": trap}, _use_new_zipfile_serialization=is_zip)
    message = refused(path)
    assert "posix.system" in message and "weights_only=False" in message
    assert not (tmp_path / "executed").exists()


def test_an_unknown_object_is_named_with_the_way_out(tmp_path: Path) -> None:
    content = {"model": STATE, "args": argparse.Namespace(path=pathlib.PurePosixPath("/data"))}
    message = refused(saved(tmp_path, content))
    assert "pathlib.PurePosixPath" in message and "torch.save({'model': state}" in message


@pytest.mark.parametrize(
    ("content", "wanted"),
    [({"steps": 3}, "steps"), ({}, r"\[\]"), (torch.ones(2), "Tensor"), ({"model": {}}, "model")],
    ids=["numbers", "empty", "tensor", "empty model"],
)
def test_a_file_without_weights_says_what_it_holds(
    tmp_path: Path, content: Any, wanted: str
) -> None:
    with pytest.raises(CheckpointError, match=f"no weights where .* it holds .*{wanted}"):
        read_public_state(saved(tmp_path, content))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kept", [0.5, 0.99], ids=["half", "all but the end"])
def test_a_file_that_is_cut_short_is_damaged(tmp_path: Path, kind: str, kept: float) -> None:
    path = tmp_path / "w.pt"
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for size in {int(len(whole) * kept), 3}:
        path.write_bytes(whole[:size])
        assert "get it again" in refused(str(path))


def test_what_is_no_weight_file_is_told(tmp_path: Path) -> None:
    page = tmp_path / "c2i_B_256.pt"
    page.write_bytes(b"<!doctype html><html>Sign in</html>")
    assert "neither a safetensors nor a torch file" in refused(str(page))
    page.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    assert "Git LFS pointer" in refused(str(page))
    assert "is no file" in refused(str(tmp_path / "missing.pt"))


def test_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"not {'f' * 64}"):
        read_public_state(saved(tmp_path, STATE), sha256="f" * 64)


# -- a model's own tensors ---------------------------------------------------------------------

STRAYS = {
    "llamagen": ["freqs_cis", "layers.0.attention.kv_cache.k_cache"],
    "var": ["lvl_1L", "attn_bias_for_masking", "blocks.1.attn.zero_k_bias"],
    "vqgan_gpt": ["blocks.0.attn.mask"],
    "llamagen_vq": ["quantize.codebook_used", "loss.discriminator.main.0.weight"],
    "var_vqvae": ["quantize.ema_vocab_hit_SV"],
    "taming_vqgan": ["loss.perceptual_loss.net.slice1.0.weight", "quantize.used"],
}
BESIDE = {
    "vqgan_gpt": ("transformer.", ["first_stage_model.quant_conv.bias", "cond_stage_model.w"]),
    "taming_vqgan": ("first_stage_model.", ["transformer.pos_emb", "transformer.head.weight"]),
    "var": ("var_wo_ddp.", ["vae_local.quant_conv.bias"]),
    "var_vqvae": ("vae_local.", ["var_wo_ddp.pos_start"]),
}


def tiny(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(name, "cpu", **TINY[name])


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("is_beside", [False, True], ids=["alone", "beside others"])
def test_a_model_s_own_tensors_are_picked_and_load(
    tmp_path: Path, name: str, is_beside: bool
) -> None:
    family = model_spec(name).family
    own = {key: torch.randn_like(value) for key, value in tiny(name).state_dict().items()}
    content = own | {stray: torch.zeros(3) for stray in STRAYS[family]}
    if is_beside and family in BESIDE:
        prefix, others = BESIDE[family]
        content = {prefix + key: value for key, value in content.items()}
        content |= {other: torch.zeros(3) for other in others}
    state = select_state(read_public_state(saved(tmp_path, {"state_dict": content})), family)
    assert_is_state(state, own)
    module = tiny(name)
    load_public_state(module, state, "w.ckpt", model_name=name)
    assert_is_state(dict(module.state_dict()), own)


def test_a_flat_transformer_loses_the_parts_that_are_not_its_own() -> None:
    state = {"pos_emb": torch.ones(1), "first_stage_model.x": torch.ones(1)}
    assert select_state(state, "vqgan_gpt").keys() == {"pos_emb"}


def test_a_var_with_a_key_bias_is_refused() -> None:
    state = {"pos_1LC": torch.ones(1), "blocks.7.attn.zero_k_bias": torch.tensor([0.0, -0.5])}
    with pytest.raises(CheckpointError, match=r"blocks\.7\.attn\.zero_k_bias up to 0\.5"):
        select_state(state, "var", location="var_d16.pth")
