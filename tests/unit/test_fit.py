"""A published file that does not fit: what is listed, and what the cause is said to be."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from rlgen.config.models import architecture_of
from rlgen.errors import CheckpointError
from rlgen.nn.fit import explain_mismatch
from rlgen.nn.public_files import load_public_state
from rlgen.nn.weights import shapes_of
from tests.published import TINY, build


def shapes(name: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    return shapes_of(build(name, **changes).state_dict())


MISMATCHES: list[tuple[str, str, dict[str, Any], str, str]] = [
    # asked for, file, its changes, its name, what is told
    (
        "llamagen-b-256",
        "llamagen-l-384",
        {},
        "c2i_L_384.pt",
        r"looks like llamagen-l-384 \(num_layers 24, width 1024.*set policy\.model=llamagen-l-384",
    ),
    (
        "llamagen-b-256",
        "llamagen-l-256",
        {},
        "weights.pt",
        r"num_layers = 24 where 12 is asked.*policy\.model=llamagen-l-256 or llamagen-l-384",
    ),
    (
        "llamagen-l-256",
        "llamagen-l-256",
        {"num_classes": 100},
        "mine.pt",
        r"num_classes = 100 where 1000.*set policy\.architecture\.num_classes=100",
    ),
    (
        "llamagen-xl-256",
        "llamagen-t2i-xl-256",
        {},
        "t2i_XL_stage1_256.pt",
        r"class-conditional and the file text-cond.*set policy\.model=llamagen-t2i-xl-256\b",
    ),
    (
        "llamagen-t2i-xl-512",
        "llamagen-xl-384",
        {},
        "c2i_XL_384.pt",
        r"text-conditional and the file class-cond.*set policy\.model=llamagen-xl-384",
    ),
    ("var-d16-256", "var-d20-256", {}, "var_d20.pth", r"depth = 20 .*policy\.model=var-d20-256"),
    (
        "var-d16-256",
        "var-d16-256",
        {"patch_nums": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)},
        "var.pth",
        r"another resolution: 2240 tokens where 680 are asked for; no published model",
    ),
    ("var-d16-256", "llamagen-b-256", {}, "c2i_B_256.pt", r"looks like .*llamagen-b-256.*; set"),
    (
        "vqgan-1.4b-256",
        "vqgan-1.4b-256",
        {"grid_size": 32},
        "last.ckpt",
        r"another resolution: 1024 tokens where 256",
    ),
    (
        "llamagen-b-256",
        "llamagen-vq-ds16",
        {},
        "vq_ds16_c2i.pt",
        r"a tokenizer and no policy: give it as tokenizer\.checkpoint",
    ),
    (
        "var-vq",
        "var-d16-256",
        {},
        "var_d16.pth",
        r"a policy and no tokenizer: give it as policy\.checkpoint",
    ),
    (
        "llamagen-vq-ds16",
        "llamagen-vq-ds8",
        {},
        "vq_ds8_c2i.pt",
        r"stride = 8 where 16 is asked for; set tokenizer\.model=llamagen-vq-ds8",
    ),
    (
        "vqgan-f16-16384",
        "vqgan-f16-1024",
        {},
        "last.ckpt",
        r"n_embed = 1024 where 16384.*tokenizer\.model=vqgan-f16-1024",
    ),
]


@pytest.mark.parametrize(
    ("asked", "given", "changes", "file_name", "told"),
    MISMATCHES,
    ids=[f"{case[1]} for {case[0]}" for case in MISMATCHES],
)
def test_a_wrong_file_is_recognised(
    asked: str, given: str, changes: dict[str, Any], file_name: str, told: str
) -> None:
    text = explain_mismatch(shapes(asked), shapes(given, **changes), file_name=file_name)
    assert re.search(told, text), text


def test_an_incomplete_file_and_a_foreign_one_are_told_apart() -> None:
    own = shapes("llamagen-b-256")
    less = {name: shape for name, shape in own.items() if not name.startswith("norm")}
    assert "the file is incomplete" in explain_mismatch(own, less, file_name="x.pt")
    foreign = {"visual.conv1.weight": (1024, 3, 14, 14)}
    told = explain_mismatch(own, foreign, file_name="x.pt")
    assert "none of the tensors" in told and "visual.conv1.weight" in told


def test_a_mismatch_lists_the_tensors_and_leaves_the_module_alone() -> None:
    name = "llamagen-b-256"
    module = build(name, "cpu", **TINY[name])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    del state["norm.weight"]
    state["output.weight"] = torch.zeros(33, 128)
    state["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        load_public_state(module, state, "s3://key:secret@bucket/c2i.pt", model_name=name)
    message = str(caught.value)
    assert message.startswith("s3://bucket/c2i.pt does not fit llamagen-b-256: tensors 1 missing")
    assert "1 missing (norm.weight)" in message and "1 unexpected (extra)" in message
    assert "output.weight [33, 128] instead of [32, 128]" in message
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())


def test_a_llamagen_file_for_another_resolution_is_refused_by_its_name() -> None:
    """Its tensors fit, and the images would be bad."""
    module = build("llamagen-b-256", "cpu", **TINY["llamagen-b-256"])
    state = dict(module.state_dict())
    with pytest.raises(CheckpointError, match=r"for 384 px.*Set policy\.model=llamagen-b-384"):
        load_public_state(module, state, "/w/c2i_B_384.pt", model_name="llamagen-b-256")
    for fine in ("c2i_B_256.pt", "mine.pt", "run384b/policy.pt", "step3840.pt"):
        load_public_state(module, state, f"/w/{fine}", model_name="llamagen-b-256")
    load_public_state(module, state, "/w/c2i_B_384.pt", model_name=None)


def test_number_formats_become_the_module_s() -> None:
    module = nn.Linear(3, 2)
    state = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    load_public_state(module, state, "w.pt")
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, torch.ones(2, 3))


def test_architecture_changes_reach_the_module() -> None:
    assert architecture_of("llamagen-b-256", {"num_classes": 3})["num_classes"] == 3
    assert shapes("llamagen-b-256", num_classes=3)["cls_embedding.embedding_table.weight"] == (
        4,
        768,
    )
