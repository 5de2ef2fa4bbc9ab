"""FID's Inception against torch-fidelity on the same weights, and the files that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from rlgen.errors import CheckpointError
from rlgen.features.extractor import load_extractor
from rlgen.features.inception import Inception, InceptionExtractor, inception_from_state
from rlgen.parity.rule import is_made, make_tensor

LAYERS = ["2048", "logits_unbiased", "768", "192", "64"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A file as pt_inception-2015-12-05-6726825d.pth, with weights of the parity rule."""
    state = {
        name: make_tensor(3, name, tensor.shape) if is_made(name) else tensor
        for name, tensor in Inception().state_dict().items()
    }
    location = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, location)
    return location


@pytest.fixture(scope="module")
def extractor(path) -> InceptionExtractor:
    loaded = load_extractor(str(path))
    assert isinstance(loaded, InceptionExtractor)
    return loaded


@pytest.fixture(scope="module")
def images_u8() -> torch.Tensor:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (2, 3, 8, 10))
    fine = generator.integers(-40, 40, (2, 3, 64, 80))
    return torch.from_numpy((np.kron(coarse, np.ones((8, 8))) + fine).clip(0, 255)).to(torch.uint8)


def test_features_and_logits_are_torch_fidelitys(path, extractor, images_u8) -> None:
    reference = FeatureExtractorInceptionV3(
        "reference", LAYERS, feature_extractor_weights_path=str(path)
    )
    expected = dict(zip(LAYERS, reference(images_u8), strict=True))
    images_01 = images_u8.float() / 255
    found = extractor.outputs(images_01)
    # Float32 rounding over 94 convolutions in another order of operations, as the golden case has.
    close = {"rtol": 0, "atol": 2e-5}
    assert expected["2048"].std() > 0.1
    torch.testing.assert_close(found.features_BF, expected["2048"], **close)
    torch.testing.assert_close(found.logits_BC, expected["logits_unbiased"], **close)
    assert torch.equal(extractor(images_01), found.features_BF)
    assert extractor.num_features == found.features_BF.shape[1] == 2048


def test_spatial_features_are_the_first_channels_of_the_first_branch_of_mixed_6(
    path, extractor, images_u8
) -> None:
    reference = FeatureExtractorInceptionV3(
        "reference", ["2048"], feature_extractor_weights_path=str(path)
    )
    seen: list[torch.Tensor] = []
    # TensorFlow counts the blocks from `mixed` on: its mixed_6 is the seventh, Mixed_6d here.
    layer = reference.Mixed_6d.branch1x1
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    reference(images_u8)
    found = extractor.outputs(images_u8.float() / 255).spatial_BS
    assert found.shape == (2, 7 * 17 * 17) and found.std() > 0.01
    torch.testing.assert_close(found, seen[0][:, :7].flatten(1), rtol=0, atol=2e-5)


def test_images_count_as_saved_with_8_bits(extractor, images_u8) -> None:
    images_01 = images_u8[:1].float() / 255
    between = (images_01 + 0.4 / 255).clamp(0, 1)
    assert torch.equal(extractor(images_01), extractor(between))
    assert not torch.equal(extractor(images_01), extractor((images_01 + 1 / 255).clamp(0, 1)))


def test_the_feature_space_names_the_weights(path, extractor) -> None:
    assert extractor.feature_space.startswith("fid-inception-2015:u8-tf1-299:")
    assert load_extractor(str(path)).feature_space == extractor.feature_space
    state = torch.load(path, weights_only=True)
    without = {name: t for name, t in state.items() if "num_batches" not in name}
    again = inception_from_state(without, "file")
    assert again.feature_space == extractor.feature_space, "counters are no weights"
    changed = state | {"fc.bias": state["fc.bias"] + 1}
    assert inception_from_state(changed, "file").feature_space != extractor.feature_space


@pytest.mark.parametrize("has_auxiliary", [True, False])
def test_torchvisions_inception_is_refused_with_the_reason(path, tmp_path, has_auxiliary) -> None:
    state = torch.load(path, weights_only=True)
    state["fc.weight"], state["fc.bias"] = state["fc.weight"][:1000], state["fc.bias"][:1000]
    if has_auxiliary:
        state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    torch.save(state, tmp_path / "inception_v3_google.pth")
    with pytest.raises(CheckpointError, match=r"torchvision's .*another feature space"):
        load_extractor(str(tmp_path / "inception_v3_google.pth"))


def test_a_missing_tensor_is_named(path, tmp_path) -> None:
    state = torch.load(path, weights_only=True)
    del state["Mixed_7c.branch_pool.bn.running_var"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"1 missing \(Mixed_7c.branch_pool.bn.running_var"):
        load_extractor(str(tmp_path / "cut.pth"))
