"""Aesthetic heads: both published versions, what is refused, and the scorer on a CLIP tower."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlgen.errors import CheckpointError
from rlgen.features.open_clip_files import build_open_clip, load_vision, save_open_clip
from rlgen.rewards.aesthetic import head_from_state, load_aesthetic_scorer, load_head

MODEL_CONFIG = {
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


def v2_network(width: int) -> nn.Sequential:
    """The published training network: linear layers, dropouts between, nothing else."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(width, 64),
            nn.Dropout(0.2),
            nn.Linear(64, 32),
            nn.Dropout(0.2),
            nn.Linear(32, 16),
            nn.Dropout(0.1),
            nn.Linear(16, 8),
            nn.Linear(8, 1),
        ).eval()


def v2_state(width: int) -> dict[str, Tensor]:
    return {f"layers.{name}": tensor for name, tensor in v2_network(width).state_dict().items()}


def v1_state(width: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(1, width, generator=generator),
        "bias": torch.randn(1, generator=generator),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    location = str(tmp_path_factory.mktemp("models") / "tiny")
    save_open_clip(location, build_open_clip(MODEL_CONFIG, location), MODEL_CONFIG)
    return location


def test_v2_equals_its_layers_on_unit_features() -> None:
    features_BD = 7 * torch.randn(50, 768, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = v2_network(768)(features_BD / features_BD.norm(dim=1, keepdim=True))[:, 0]
    found = head_from_state(v2_state(768), "head")(features_BD)
    assert found.dtype == torch.float32
    assert found.std() > 1e-3
    # Float32 rounding of five layers in a row.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_v1_is_linear_in_unit_features() -> None:
    state = v1_state(16)
    features_BD = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    expected = F.linear(F.normalize(features_BD, dim=1), state["weight"], state["bias"])[:, 0]
    head = head_from_state(state, "head")
    torch.testing.assert_close(head(features_BD), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(head(100 * features_BD), expected, rtol=0, atol=1e-6)


def test_a_scorer_rates_images_by_the_tower_and_ignores_prompts(folder, tmp_path) -> None:
    path = str(tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(v2_state(24), path)
    scorer = load_aesthetic_scorer(folder, path)
    images_01 = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    class_ids = torch.arange(6)
    scores_B = scorer(images_01, ["a cat"] * 6, class_ids)
    assert scores_B.dtype == torch.float32 and scores_B.std() > 1e-4
    net, preprocess = load_vision(folder)
    with torch.no_grad():
        features = F.normalize(net.encode_image(preprocess(images_01)), dim=1)
        expected = v2_network(24)(features)[:, 0]
    torch.testing.assert_close(scores_B, expected, rtol=0, atol=1e-6)
    assert torch.equal(scores_B, scorer(images_01, ["something else"] * 6, class_ids))


def test_a_head_for_other_features_is_refused(folder, tmp_path) -> None:
    path = str(tmp_path / "head.pth")
    torch.save(v1_state(768), path)
    with pytest.raises(CheckpointError, match=r"width 768 and .* gives 24; .*ViT-L/14"):
        load_aesthetic_scorer(folder, path)


def test_a_head_with_activations_is_refused() -> None:
    """Its layers lie at other places, and multiplying them would be silently wrong."""
    relu = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1))
    state = {f"layers.{name}": tensor for name, tensor in relu.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"has layers \[0, 3\].*activations"):
        head_from_state(state, "relu.pth")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(1, 8)}, "tensors fc.weight"),
        ({"weight": torch.zeros(3, 8), "bias": torch.zeros(3)}, r"\(3,\) numbers an image"),
        (v2_state(8) | {"layers.2.weight": torch.zeros(32, 63)}, "do not fit together"),
    ],
    ids=["names", "three-numbers", "chain"],
)
def test_other_networks_are_no_heads(state, message) -> None:
    with pytest.raises(CheckpointError, match=message):
        head_from_state(state, "head.pth")


def test_a_missing_head(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="is no file"):
        load_head(str(tmp_path / "none.pth"))
