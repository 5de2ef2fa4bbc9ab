"""CLIP and HPSv2 from a single published file: layouts, architectures, and what is refused."""

import json
import warnings
from pathlib import Path

import fsspec
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlgen.errors import CheckpointError, ConfigError
from rlgen.features.open_clip_files import build_open_clip, save_open_clip
from rlgen.features.open_clip_published import check_activation, named_config
from rlgen.nn.torchscript import read_torchscript_state
from rlgen.rewards.clip import load_clip_scorer
from rlgen.rewards.hpsv2 import HpsScorer, load_hps_scorer

SIZES = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 28,
        "patch_size": 7,
        "width": 32,
        "layers": 1,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PLAIN, QUICK = "rlgen-tiny-14", "rlgen-tiny-14-quickgelu"
COUNTERS = {"input_resolution": 28, "context_length": 12, "vocab_size": 49408}


@pytest.fixture(scope="module", autouse=True)
def tiny_models(tmp_path_factory) -> None:
    """Two architectures that open_clip knows by name for this test run."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{PLAIN}.json").write_text(json.dumps(SIZES))
    (folder / f"{QUICK}.json").write_text(json.dumps(SIZES | {"quick_gelu": True}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_open_clip(SIZES, "memory").state_dict()


def scores_of(scorer) -> Tensor:
    images_01 = torch.rand(3, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    return scorer(images_01, ["a cat", "snow", "a cat"], torch.zeros(3, dtype=torch.int64))


@pytest.fixture
def expected(state, tmp_path) -> dict[str, Tensor]:
    """Scores of the same weights from folders, per scorer and activation."""
    net = build_open_clip(SIZES, "memory")
    net.load_state_dict(state)
    found = {}
    for name, config in ((PLAIN, SIZES), (QUICK, SIZES | {"quick_gelu": True})):
        save_open_clip(str(tmp_path / name), net, config)
        found[name] = scores_of(load_clip_scorer(str(tmp_path / name)))
    found["hps"] = scores_of(load_hps_scorer(str(tmp_path / PLAIN)))
    return found


class Holder(nn.Module):
    """A module tree with the tensors of a state dict, so that TorchScript can save it."""

    def __init__(self, state: dict[str, Tensor], counters: dict[str, int]) -> None:
        super().__init__()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            first, dot, rest = name.partition(".")
            if dot:
                parts.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))
        for name, part in parts.items():
            self.add_module(name, Holder(part, {}))
        for name, count in counters.items():
            self.register_buffer(name, torch.tensor(count))

    def forward(self, x: Tensor) -> Tensor:
        return x


def write(path: Path, state: dict[str, Tensor], layout: str) -> str:
    """Write weights as they are published."""
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            half = {name: tensor.half() for name, tensor in state.items()}
            torch.jit.save(torch.jit.script(Holder(half, COUNTERS)), str(path))
    else:
        wrapped = {
            "flat": state,
            "state_dict": {"epoch": 3, "state_dict": state},
            "ddp": {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
            "openai": state | {name: torch.tensor(count) for name, count in COUNTERS.items()},
        }
        torch.save(wrapped[layout], path)
    return str(path)


@pytest.mark.parametrize("layout", ["safetensors", "flat", "state_dict", "ddp"])
def test_a_single_file_gives_the_scores_of_its_folder(tmp_path, state, expected, layout) -> None:
    path = write(tmp_path / "open_clip_model.bin", state, layout)
    assert torch.equal(scores_of(load_clip_scorer(path, model=PLAIN)), expected[PLAIN])
    assert torch.equal(scores_of(load_hps_scorer(path, model=PLAIN)), expected["hps"])


@pytest.mark.parametrize("layout", ["openai", "torchscript"])
def test_openais_file_is_read_with_quickgelu_and_refused_without(
    tmp_path, state, expected, layout
) -> None:
    path = write(tmp_path / "ViT-L-14.pt", state, layout)
    scores_B = scores_of(load_clip_scorer(path, model=QUICK))
    # The archive holds half precision: 5e-4 of each weight.
    torch.testing.assert_close(scores_B, expected[QUICK], rtol=0, atol=2e-3)
    assert (scores_B.dtype, expected[QUICK].std() > 1e-2) == (torch.float32, True)
    if layout == "openai":
        assert torch.equal(scores_B, expected[QUICK])
        assert not torch.equal(expected[QUICK], expected[PLAIN])
    with pytest.raises(CheckpointError, match=rf"QuickGELU, and {PLAIN} has.*model={QUICK}"):
        load_clip_scorer(path, model=PLAIN)


def test_a_files_name_can_tell_that_it_is_openais(tmp_path, state) -> None:
    path = write(tmp_path / "vit_l_14-OpenAI.safetensors", state, "safetensors")
    with pytest.raises(CheckpointError, match="holds OpenAI's weights"):
        load_clip_scorer(path, model=PLAIN)


def test_half_precision_under_an_architecture_of_openai_is_warned_about() -> None:
    """Without marks in the file nothing is certain, and LAION's weights are right as ViT-L-14."""
    half = {"visual.conv1.weight": torch.full((2, 2), 0.1).half().float()}
    full = {"visual.conv1.weight": torch.full((2, 2), 0.1)}
    with pytest.warns(UserWarning, match="if they are OpenAI's, use model=ViT-L-14-quickgelu"):
        check_activation("weights.bin", "ViT-L-14", half, is_openai=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_activation("weights.bin", "ViT-L-14", full, is_openai=False)
        check_activation("weights.bin", "ViT-L-14-quickgelu", half, is_openai=True)
        check_activation("HPS_v2.1_compressed.pt", "ViT-g-14", half, is_openai=False)


def test_a_torchscript_archive_gives_tensors_and_runs_nothing(tmp_path, state) -> None:
    path = tmp_path / "model.pt"
    write(path, state, "torchscript")
    found = read_torchscript_state(path, "model.pt")
    assert found.keys() == state.keys() | COUNTERS.keys()
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in state.items())
    cut = tmp_path / "cut.pt"
    cut.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="cut short"):
        load_clip_scorer(str(cut), model=QUICK)


def test_an_archive_with_a_foreign_object_is_refused(tmp_path) -> None:
    import pickle
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("evil/constants.pkl", b"")
        archive.writestr("evil/data.pkl", pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"an object of builtins\.print"):
        load_clip_scorer(str(tmp_path / "evil.pt"), model=QUICK)


def test_a_file_is_read_from_a_url(state, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RLGEN_CACHE", str(tmp_path / "cache"))
    local = write(tmp_path / "weights.safetensors", state, "safetensors")
    with fsspec.open("memory://clip/weights.safetensors", "wb") as stream:
        stream.write(Path(local).read_bytes())
    scorer = load_clip_scorer("memory://clip/weights.safetensors", model=PLAIN)
    assert torch.equal(scores_of(scorer), expected[PLAIN])


@pytest.mark.parametrize(
    ("name", "close"),
    [("ViT-L/14-quickgelu", "ViT-L-14-quickgelu"), ("vit-h-14", "ViT-H-14"), ("HPSv2", "none has")],
)
def test_an_unknown_architecture_lists_close_names(tmp_path, state, name, close) -> None:
    path = write(tmp_path / "weights.pt", state, "flat")
    with pytest.raises(ConfigError, match=f"has no model '{name}'; .*{close}"):
        load_clip_scorer(path, model=name)


def test_a_file_without_an_architecture_and_a_folder_with_one_are_refused(tmp_path, state) -> None:
    path = write(tmp_path / "weights.pt", state, "flat")
    with pytest.raises(CheckpointError, match=r"single weight file.*model=ViT-L-14-quickgelu"):
        load_clip_scorer(path)
    with pytest.raises(CheckpointError, match=f"is a folder and model={PLAIN}"):
        load_clip_scorer(str(tmp_path), model=PLAIN)
    with pytest.raises(CheckpointError, match=r"none\.pt is no file"):
        load_clip_scorer(str(tmp_path / "none.pt"), model=PLAIN)


def test_weights_of_another_size_are_refused(tmp_path, state) -> None:
    path = write(
        tmp_path / "weights.pt", state | {"visual.positional_embedding": torch.zeros(5, 32)}, "flat"
    )
    with pytest.raises(CheckpointError, match=r"1 mis-shaped \(visual.positional_embedding"):
        load_clip_scorer(path, model=PLAIN)


def test_hpsv2_has_plain_gelu(tmp_path, state) -> None:
    path = write(tmp_path / "HPS_v2.1_compressed.pt", state, "state_dict")
    with pytest.raises(ConfigError, match=r"plain GELU.*model=ViT-H-14"):
        load_hps_scorer(path, model=QUICK)
    scorer = load_hps_scorer(path, model=PLAIN)
    assert isinstance(scorer, HpsScorer)
    assert (scorer.preprocess.resize_mode, scorer.preprocess.resampling) == ("longest", "float")


def test_preprocessing_follows_the_weights_that_open_clip_knows() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        openai = named_config("ViT-L-14-quickgelu")["preprocess_cfg"]
        siglip = named_config("ViT-B-16-SigLIP")["preprocess_cfg"]
        assert named_config("ViT-H-14")["preprocess_cfg"]["interpolation"] == "bicubic"
    assert openai["mean"][0] == 0.48145466
    assert siglip["mean"] == (0.5, 0.5, 0.5) and siglip["resize_mode"] == "squash"
    with pytest.warns(UserWarning, match="weights of ViT-L-14 differ.*laion2b_s32b_b82k"):
        named_config("ViT-L-14")
