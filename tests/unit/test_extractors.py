"""Feature extractors: which file is which, DINOv2 by its formula, and an open_clip tower."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from rlgen.errors import CheckpointError
from rlgen.features.clip_tower import ClipTowerExtractor
from rlgen.features.convnet import ConvNet, ConvNetConfig
from rlgen.features.dinov2 import (
    DinoConfig,
    DinoExtractor,
    DinoVisionTransformer,
    dinov2_from_state,
)
from rlgen.features.extractor import ConvNetExtractor, load_extractor, save_convnet
from rlgen.features.open_clip_files import (
    CONFIG_FILE,
    build_open_clip,
    save_open_clip,
)

DINO = DinoConfig(width=128, num_blocks=2, num_heads=2, patch_size=14, hidden=96, table_size=5)
CLIP_CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 28,
        "patch_size": 7,
        "width": 32,
        "layers": 1,
        "head_width": 16,
    },
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def dino_state() -> dict[str, Tensor]:
    """A published state at tiny size, with the mask token that only training uses."""
    state = {}
    for number, (name, tensor) in enumerate(DinoVisionTransformer(DINO).state_dict().items()):
        generator = torch.Generator().manual_seed(number)
        state[name] = 0.3 * torch.randn(tensor.shape, generator=generator)
    return state | {"mask_token": torch.zeros(1, DINO.width)}


def images_u8(height: int = 60, width: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)


def as_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def cubic(x: float, a: float = -0.75) -> float:
    """The kernel of torch's bicubic resize without antialiasing."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def position_rows(side: int, size: int) -> Tensor:
    """[size, side] weights of a resize whose step is side / (size + 0.1), edges repeated."""
    weights = torch.zeros(size, side, dtype=torch.float64)
    for row in range(size):
        center = (row + 0.5) * side / (size + 0.1) - 0.5
        for tap in range(math.floor(center) - 1, math.floor(center) + 3):
            weights[row, min(max(tap, 0), side - 1)] += cubic(center - tap)
    return weights


def dino_by_formula(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The network written out head by head in float64, without a module."""
    state = {name: tensor.double() for name, tensor in state.items()}
    patches = pixels.double().unfold(2, 14, 14).unfold(3, 14, 14)  # (B, 3, h, w, 14, 14)
    grid = patches.shape[2]
    kernel = state["patch_embed.proj.weight"]
    x = torch.einsum("bchwij,dcij->bhwd", patches, kernel) + state["patch_embed.proj.bias"]
    table = state["pos_embed"][0, 1:].view(DINO.table_size, DINO.table_size, -1)
    rows = position_rows(DINO.table_size, grid)
    positions = torch.einsum("rs,ct,std->rcd", rows, rows, table)
    x = (x + positions).flatten(1, 2)
    first = (state["cls_token"][0, 0] + state["pos_embed"][0, 0]).expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1)

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    width, head = DINO.width, DINO.width // DINO.num_heads
    for block in (f"blocks.{index}" for index in range(DINO.num_blocks)):
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(width, dim=-1)
        mixed = []
        for start in range(0, width, head):
            part = slice(start, start + head)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(head)
            mixed.append(scores.softmax(-1) @ v[..., part])
        attended = linear(torch.cat(mixed, dim=-1), f"{block}.attn.proj")
        x = x + attended * state[f"{block}.ls1.gamma"]
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, f"{block}.mlp.fc2") * state[f"{block}.ls2.gamma"]
    return norm(x, "norm")[:, 0]


def test_dinov2_is_its_formula_from_pil_images_on(tmp_path) -> None:
    state = dino_state()
    torch.save(state, tmp_path / "dinov2_vitl14_pretrain.pth")
    extractor = load_extractor(str(tmp_path / "dinov2_vitl14_pretrain.pth"))
    images = images_u8()
    resized = np.stack(
        [Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC) for image in images]
    )
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = dino_by_formula(state, (as_tensor(resized) - mean) / std)
    found = extractor(as_tensor(images))
    assert found.dtype == torch.float32 and found.shape == (3, extractor.num_features)
    assert expected.std(dim=0).mean() > 1e-3, "images differ in their features"
    # Float32 against float64 over two blocks; features are about 0.5 in size.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_dinov2_at_its_own_size_takes_the_position_table_as_it_is() -> None:
    net = DinoVisionTransformer(DINO)
    assert net.positions(5, 5) is net.pos_embed
    assert net.positions(16, 16).shape == (1, 257, DINO.width)


def test_dinov2s_sizes_are_read_from_the_shapes() -> None:
    extractor = dinov2_from_state(dino_state(), "file")
    assert extractor.net.config == DINO
    assert extractor.num_features == 128
    assert extractor.feature_space.startswith("dinov2-128x2:u8-pil-bicubic-squash-224:")
    assert DinoExtractor(DinoVisionTransformer(DINO)).feature_space != extractor.feature_space


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"register_tokens": torch.zeros(1, 4, 128)}, "DINOv2 with register tokens"),
        ({"blocks.0.mlp.w12.weight": torch.zeros(1)}, "gated MLP"),
        ({"blocks.9.ls1.gamma": torch.zeros(128)}, "missing"),
    ],
)
def test_another_dinov2_is_refused(tmp_path, extra, message) -> None:
    torch.save(dino_state() | extra, tmp_path / "dino.pth")
    with pytest.raises(CheckpointError, match=message):
        load_extractor(str(tmp_path / "dino.pth"))


@pytest.fixture
def clip_folder(tmp_path) -> str:
    location = str(tmp_path / "clip")
    save_open_clip(location, build_open_clip(CLIP_CONFIG, location), CLIP_CONFIG)
    return location


def test_a_clip_tower_gives_open_clips_features_of_pil_images(clip_folder) -> None:
    extractor = load_extractor(clip_folder)
    assert isinstance(extractor, ClipTowerExtractor)
    images = images_u8()
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        expected = model.encode_image(pixels)
    found = extractor(as_tensor(images))
    assert found.shape == (3, 24) and extractor.num_features == 24
    # The same pixels to the last bit; kernels may take another order of operations.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found.norm(dim=1), torch.ones(3), atol=0.05), "not normalised"


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model_cfg", "quick_gelu", False),
        ("preprocess_cfg", "mean", [0.5, 0.5, 0.5]),
        ("preprocess_cfg", "resize_mode", "squash"),
    ],
)
def test_a_clip_feature_space_is_more_than_its_weights(clip_folder, part, key, value) -> None:
    """The weights alone stay the same under another activation, mean or resize."""
    before = load_extractor(clip_folder).feature_space
    assert load_extractor(clip_folder).feature_space == before
    path = f"{clip_folder}/{CONFIG_FILE}"
    with open(path) as stream:
        config = json.load(stream)
    config[part][key] = value
    with open(path, "w") as stream:
        json.dump(config, stream)
    assert load_extractor(clip_folder).feature_space != before


def test_texts_play_no_part_in_a_clip_feature_space(clip_folder) -> None:
    before = load_extractor(clip_folder).feature_space
    model = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")[0]
    model.token_embedding.weight.data.zero_()
    save_open_clip(clip_folder, model, CLIP_CONFIG)
    assert load_extractor(clip_folder).feature_space == before


def test_rlgens_own_nets_are_told_by_their_metadata_whatever_their_name(tmp_path) -> None:
    net = ConvNet(ConvNetConfig(width=8, num_features=24))
    save_convnet(str(tmp_path / "features"), net)
    loaded = load_extractor(str(tmp_path / "features"))
    assert isinstance(loaded, ConvNetExtractor)
    assert loaded.feature_space == ConvNetExtractor(net).feature_space


def test_what_is_no_extractor_is_refused_with_what_is_accepted(tmp_path) -> None:
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "other.pth")
    accepted = r"pt_inception-2015-12-05-6726825d.pth.*dinov2_vitl14_pretrain.pth.*open_clip"
    with pytest.raises(CheckpointError, match=rf"{accepted}.*begin with encoder.weight"):
        load_extractor(str(tmp_path / "other.pth"))
    clip = {"visual.conv1.weight": torch.zeros(3), "visual.proj": torch.zeros(3)}
    torch.save(clip, tmp_path / "clip.pt")
    with pytest.raises(CheckpointError, match=rf"{accepted}.*It is a CLIP.*{CONFIG_FILE}"):
        load_extractor(str(tmp_path / "clip.pt"))
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        load_extractor(str(tmp_path / "none.pth"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not an open_clip model folder"):
        load_extractor(str(tmp_path / "empty"))


def test_features_do_not_depend_on_the_batch_they_came_in() -> None:
    extractor = dinov2_from_state(dino_state(), "file")
    images_01 = as_tensor(images_u8())
    alone = torch.cat([extractor(image[None]) for image in images_01])
    torch.testing.assert_close(extractor(images_01), alone, rtol=0, atol=1e-5)
    assert F.cosine_similarity(alone[0], alone[1], dim=0) < 0.99999
