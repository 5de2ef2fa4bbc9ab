"""The tiny tokenizer: ranges, nearest codes, straight-through gradients, training, files."""

import pytest
import torch

from rlgen.config.digits import DigitsConfig
from rlgen.digits.data import load_digits_data
from rlgen.digits.train_tokenizer import train_tokenizer
from rlgen.errors import CheckpointError
from rlgen.features.convnet import ConvNet, ConvNetConfig
from rlgen.features.extractor import ConvNetExtractor, load_extractor, save_convnet
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig
from rlgen.tokenizers.load import load_tokenizer, save_tokenizer

# Long enough to pass one reset of dead codes, at step 50.
CONFIG = DigitsConfig(tokenizer_steps=120, augmentations=2)


@pytest.fixture(scope="module")
def data():
    return load_digits_data(CONFIG)


@pytest.fixture(scope="module")
def trained(data):
    return train_tokenizer(data, CONFIG)


def random_tokenizer(**sizes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConvVQ(ConvVQConfig(**sizes))


@pytest.mark.parametrize("image_size", [16, 32])
def test_shapes_and_ranges(image_size):
    tokenizer = random_tokenizer(image_size=image_size, codebook_size=20)
    grid = image_size // 4
    assert (tokenizer.grid_size, tokenizer.num_tokens) == (grid, grid * grid)
    assert tokenizer.codebook_size == 20
    images_01 = torch.rand(5, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    tokens_BL = tokenizer.encode(images_01)
    assert tokens_BL.shape == (5, grid * grid)
    assert tokens_BL.dtype == torch.int64
    assert tokens_BL.min() >= 0 and tokens_BL.max() < 20
    with torch.no_grad():
        tokenizer.codebook.weight *= 100  # drives the decoder far out of range
    decoded = tokenizer.decode(tokens_BL)
    assert decoded.shape == (5, 3, image_size, image_size)
    assert (decoded.min(), decoded.max()) == (0, 1)
    assert torch.equal(decoded[:, 0], decoded[:, 2]), "gray"


def test_encode_takes_the_nearest_code_in_raster_order(trained, data):
    images_01 = data.heldout.images_rgb_01[:8]
    latents = trained.encoder(images_01[:, :1] * 2 - 1)  # (8, C, 4, 4)
    tokens_BL = trained.encode(images_01)
    for row, column in [(0, 0), (1, 2), (3, 1)]:
        distances = torch.cdist(latents[:, :, row, column], trained.codebook.weight)
        assert torch.equal(tokens_BL[:, row * 4 + column], distances.argmin(1))


def test_one_token_changes_its_own_place_most(trained, data):
    tokens_BL = trained.encode(data.heldout.images_rgb_01[:64])
    changed = tokens_BL.clone()
    changed[:, 6] = (changed[:, 6] + 7) % trained.codebook_size  # row 1, column 2
    difference = (trained.decode(changed) - trained.decode(tokens_BL)).abs().mean((0, 1))
    blocks = difference.view(4, 4, 4, 4).mean((1, 3))
    assert blocks.argmax().item() == 6


def test_gradients_pass_straight_through_the_lookup():
    tokenizer = random_tokenizer()
    generator = torch.Generator().manual_seed(0)
    output = tokenizer(torch.rand(4, 3, 16, 16, generator=generator))
    output.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())
    used = output.tokens_BL.unique()
    touched = tokenizer.codebook.weight.grad.abs().sum(1).nonzero().flatten()
    assert torch.equal(used, touched), "exactly the chosen codes are pulled"


def test_training_reconstructs_heldout_digits(trained, data):
    images_01 = data.heldout.images_rgb_01
    error = (trained.decode(trained.encode(images_01)) - images_01).pow(2).mean()
    # The mean image leaves 0.1, 120 steps 0.006; 0.02 leaves room for other machines.
    assert error < 0.02
    assert len(trained.encode(images_01).unique()) > 32


def test_training_is_deterministic_and_leaves_the_global_generator_alone(trained, data):
    torch.rand(3)
    before = torch.get_rng_state()
    again = train_tokenizer(data, CONFIG).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.state_dict().items())


def test_training_depends_on_the_seed(data):
    short = CONFIG.model_copy(update={"tokenizer_steps": 2})
    first = train_tokenizer(data, short)
    other = train_tokenizer(data, short.model_copy(update={"seed": 5}))
    assert not torch.equal(first.codebook.weight, other.codebook.weight)


def test_progress_is_reported(data):
    seen = []
    config = CONFIG.model_copy(update={"tokenizer_steps": 3})
    train_tokenizer(data, config, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_file_round_trip(trained, data, tmp_path):
    path = str(tmp_path / "tokenizer.safetensors")
    save_tokenizer(path, trained)
    loaded = load_tokenizer(path)
    tokens_BL = trained.encode(data.heldout.images_rgb_01[:32])
    assert loaded.config == trained.config
    assert torch.equal(loaded.decode(tokens_BL), trained.decode(tokens_BL))
    with pytest.raises(CheckpointError, match=r"'conv_vq', but 'convnet' is needed"):
        load_extractor(path)


@pytest.mark.parametrize("architecture", ["plain", "residual"])
def test_feature_space_names_the_weights(tmp_path, architecture):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ConvNet(ConvNetConfig(architecture=architecture, width=8, num_features=24))
    generator = torch.Generator().manual_seed(0)
    images_01 = torch.rand(300, 3, 16, 16, generator=generator)  # more than one batch inside
    path = str(tmp_path / "net.safetensors")
    save_convnet(path, net)
    loaded = load_extractor(path)
    made = ConvNetExtractor(net)
    assert loaded.feature_space == made.feature_space
    assert loaded.feature_space.startswith(f"convnet-{architecture}:")
    assert loaded.num_features == 24
    features_BF = loaded(images_01)
    assert features_BF.shape == (300, 24)
    # Batches inside the extractor may take another kernel: a few units in the last place.
    torch.testing.assert_close(features_BF, net.features(images_01), rtol=1e-5, atol=1e-5)
    assert features_BF.min() >= 0
    with torch.no_grad():
        net.head.bias[0] += 1e-3
    assert ConvNetExtractor(net).feature_space != loaded.feature_space
