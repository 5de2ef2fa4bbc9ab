"""The digits: split by content, balance, determinism, augmentation, captions and damages."""

import pytest
import torch
from sklearn.datasets import load_digits

from rlgen.config.digits import DigitsConfig
from rlgen.digits.captions import PROMPTS, make_caption_table
from rlgen.digits.damage import DAMAGES
from rlgen.digits.data import (
    CLASS_NAMES,
    DigitImages,
    load_digits_data,
    split_rows,
    transform_images,
)
from rlgen.digits.train_clip import contrastive_loss
from rlgen.digits.train_tokenizer import train_tokenizer
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig

CONFIG = DigitsConfig(augmentations=3)


@pytest.fixture(scope="module")
def data():
    return load_digits_data(CONFIG)


@pytest.fixture(scope="module")
def tokenizer(data):
    return train_tokenizer(data, CONFIG.model_copy(update={"tokenizer_steps": 80}))


def test_heldout_digits_are_never_in_training(data):
    written = load_digits().images
    contents = [
        {written[row].tobytes() for row in part.sources_N.tolist()}
        for part in (data.train, data.heldout)
    ]
    assert len(contents[0]) == 1797 - CONFIG.num_heldout
    assert len(contents[1]) == CONFIG.num_heldout
    assert not contents[0] & contents[1]


def test_images_are_what_their_sources_say(data):
    """The digit written in the source correlates more with its copies than with others."""
    labels = torch.from_numpy(load_digits().target)
    for part in (data.train, data.heldout):
        assert torch.equal(part.labels_N, labels[part.sources_N])
        written = torch.from_numpy(load_digits().images).float()
        small = torch.nn.functional.avg_pool2d(part.images_01[:600], 2).flatten(1)
        small = small - small.mean(1, keepdim=True)
        own = written[part.sources_N[:600]].flatten(1)
        own = own - own.mean(1, keepdim=True)
        right = torch.cosine_similarity(small, own, dim=1)
        wrong = torch.cosine_similarity(small, own.roll(CONFIG.augmentations, 0), dim=1)
        # A shifted copy can be nearer to a neighbor of its class; a wrong order gives 0.5.
        assert (right > wrong).float().mean() > 0.95
        assert right.mean() > 0.8


def test_split_is_stratified(data):
    totals = torch.bincount(torch.from_numpy(load_digits().target))
    expected = totals * CONFIG.num_heldout / 1797
    counts = torch.bincount(data.heldout.labels_N, minlength=10) / CONFIG.augmentations
    assert (counts - expected).abs().max() <= 1
    assert (len(data.train.labels_N), len(data.heldout.labels_N)) == (1500 * 3, 297 * 3)


def test_same_seed_same_data_other_seed_other_data(data):
    again = load_digits_data(CONFIG)
    assert torch.equal(again.train.images_01, data.train.images_01)
    assert torch.equal(again.heldout.images_01, data.heldout.images_01)
    assert (split_rows(297, seed=0)[1] != split_rows(297, seed=1)[1]).any()
    assert not torch.equal(data.train.images_01[0], data.train.images_01[1]), "copies differ"


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    load_digits_data(DigitsConfig(augmentations=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("image_size", [16, 32])
def test_ranges(image_size):
    images = load_digits_data(DigitsConfig(image_size=image_size, augmentations=1)).train
    assert images.images_01.shape == (1500, 1, image_size, image_size)
    assert images.images_01.dtype == torch.float32
    assert images.images_01.min() == 0
    assert 0.99 < images.images_01.max() <= 1
    assert images.images_rgb_01.shape == (1500, 3, image_size, image_size)


def test_transform_moves_as_documented():
    dot = torch.zeros(1, 1, 16, 16)
    dot[0, 0, 2, 8] = 1.0  # above the center

    def center(**change):
        amounts = {"rotation_deg_N": 0.0, "scale_N": 1.0, "shift_x_N": 0.0, "shift_y_N": 0.0}
        amounts = {name: torch.tensor([value]) for name, value in (amounts | change).items()}
        moved = transform_images(dot, **amounts)[0, 0]
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        return (moved * x).sum() / moved.sum(), (moved * y).sum() / moved.sum()

    x, y = center()
    assert (x, y) == (8, 2), "no change leaves every pixel"
    assert center(shift_x_N=1 / 16)[0] == pytest.approx(9, abs=1e-4)
    assert center(shift_y_N=1 / 16)[1] == pytest.approx(3, abs=1e-4)
    assert center(rotation_deg_N=14.0)[0] > 8.9, "the top turns to the right"
    assert center(scale_N=0.8)[1] > 2.7, "smaller is nearer to the center"


def test_captions_are_true_of_their_images(data):
    table = make_caption_table()
    assert len(set(table.texts)) == len(table.texts)
    assert set(PROMPTS) <= set(table.texts)
    truth_NU = table.truth_NU(data.train)
    assert truth_NU.any(1).all(), "every image has a caption"
    assert truth_NU.any(0).all(), "every caption has an image"
    for column, text in enumerate(table.texts):
        described = truth_NU[:, column]
        name = CLASS_NAMES[int(data.train.labels_N[described][0])]
        assert name in text
        assert data.train.labels_N[described].unique().numel() == 1
        if "leaning left" in text:
            assert data.train.rotation_deg_N[described].max() < -4
        if "large" in text:
            assert data.train.scale_N[described].min() > 1.03


def test_contrastive_loss_is_the_usual_one_for_single_positives_and_shares_among_several():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(5)
    usual = torch.nn.functional.cross_entropy
    expected = (usual(logits, labels) + usual(logits.T, labels)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5).double()), expected)
    # Two images of one caption: the best logits treat both alike, at a loss of ln(2) / 2 from
    # the text side, which must choose between them.
    positives = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(positives * 100, positives)
    assert loss.item() == pytest.approx(0.5 * 0.5 * torch.tensor(2.0).log().item(), abs=1e-5)


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_change_every_image_reproducibly_and_stay_in_range(data, tokenizer, name):
    images, rows = data.heldout, torch.arange(0, 891, 9)

    def damage(seed):
        generator = torch.Generator().manual_seed(seed)
        return DAMAGES[name](images, rows, tokenizer, generator)

    damaged = damage(0)
    assert damaged.shape == (len(rows), 3, 16, 16)
    assert (damaged.min() >= 0) and (damaged.max() <= 1 + 1e-6)
    assert torch.equal(damaged, damage(0))
    assert not torch.equal(damaged, damage(1))
    changed = (damaged - images.images_rgb_01[rows]).abs().amax((1, 2, 3))
    assert (changed > 0.05).float().mean() > 0.97


def test_swapped_digits_are_of_another_class(data):
    """The damage takes clean images: find each among the held-out ones and compare labels."""

    class Identity(ConvVQ):
        def encode(self, images_01):
            return images_01

        def decode(self, tokens_BL):
            return tokens_BL

    images: DigitImages = data.heldout
    rows = torch.arange(200)
    generator = torch.Generator().manual_seed(0)
    swapped = DAMAGES["swap_class"](images, rows, Identity(ConvVQConfig()), generator)
    found = torch.cdist(swapped[:, 0].flatten(1), images.images_01.flatten(1)).argmin(1)
    assert (images.labels_N[found] != images.labels_N[rows]).all()
