"""Scorers: preprocessing against open_clip's own, text cache, geometry, files, bad scores."""

import json

import numpy as np
import open_clip
import PIL
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from rlgen.config.digits import DigitsConfig
from rlgen.config.reward import (
    AestheticRewardConfig,
    ClipRewardConfig,
    PreferenceRewardConfig,
)
from rlgen.digits.captions import PROMPTS
from rlgen.digits.damage import DAMAGES
from rlgen.digits.data import load_digits_data
from rlgen.digits.train_clip import train_clip
from rlgen.digits.train_preference import train_preference
from rlgen.digits.train_tokenizer import train_tokenizer
from rlgen.errors import CheckpointError, ConfigError, RewardError
from rlgen.nn.weights import state_sha256
from rlgen.rewards.clip import ClipScorer, load_clip_scorer
from rlgen.rewards.hpsv2 import HpsScorer, load_hps_scorer
from rlgen.rewards.load import check_scorer
from rlgen.rewards.open_clip_model import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Preprocess,
    build_open_clip,
    default_preprocess,
    load_open_clip,
    save_open_clip,
)
from rlgen.rewards.protocol import Asked, check_scores

MODEL_CONFIG = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 28,
        "patch_size": 7,
        "width": 32,
        "layers": 1,
        "head_width": 16,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    location = str(tmp_path_factory.mktemp("models") / "tiny")
    model = build_open_clip(MODEL_CONFIG, location)
    save_open_clip(location, model, MODEL_CONFIG)
    return location


@pytest.fixture
def copied(folder, tmp_path):
    """A folder that a test may damage."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with open(f"{folder}/{name}", "rb") as stream:
            (tmp_path / name).write_bytes(stream.read())
    return tmp_path


def textured_images_u8(height, width, *, num=4):
    """Texture at the scale of a pixel, black and white included, where bicubic overshoots."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (num, height, width, 3), dtype=np.uint8)


def as_tensor(images_u8) -> Tensor:
    return torch.from_numpy(images_u8).permute(0, 3, 1, 2).float() / 255


def unnormalise(pixels, preprocess):
    mean = torch.tensor(preprocess.mean).view(-1, 1, 1)
    std = torch.tensor(preprocess.std).view(-1, 1, 1)
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize(
    "size", [(256, 256), (180, 256), (256, 201), (100, 131), (224, 224)], ids=str
)
def test_preprocessing_is_open_clips_to_the_last_bit(resize_mode, size):
    if int(PIL.__version__.split(".")[0]) < 13 and size[0] > size[1]:
        pytest.skip(f"Pillow {PIL.__version__} takes the width first, also of portraits")
    images_u8 = textured_images_u8(*size)
    config = PreprocessCfg(size=224, resize_mode=resize_mode)
    reference = image_transform_v2(config, is_train=False)
    expected = torch.stack([reference(Image.fromarray(image)) for image in images_u8])
    ours = Preprocess((224, 224), config.mean, config.std, resize_mode=resize_mode)
    assert torch.equal(ours(as_tensor(images_u8)), expected)


def test_bicubic_overshoot_is_clamped_for_clip_and_kept_for_hps():
    edges = torch.zeros(1, 3, 20, 20)
    edges[..., 10:] = 1.0
    clip = default_preprocess(28)
    hps = HpsScorer(torch.nn.Linear(1, 1), clip, lambda texts: torch.zeros(0)).preprocess
    assert unnormalise(clip(edges), clip).max() <= 255 + 1e-3
    assert unnormalise(hps(edges), hps).max() > 260


@pytest.mark.parametrize(
    ("size", "inner", "offset"),
    [((40, 80), (14, 28), (7, 0)), ((80, 40), (28, 14), (0, 7)), ((80, 42), (28, 15), (0, 6))],
    ids=["wide", "tall", "odd"],
)
def test_hps_fits_the_longer_side_and_pads_with_black(folder, size, inner, offset):
    hps = load_hps_scorer(folder)
    pixels = hps.preprocess(torch.ones(2, 3, *size))
    assert pixels.shape == (2, 3, 28, 28)
    restored = unnormalise(pixels, hps.preprocess) / 255
    expected = torch.zeros(28, 28)
    # An odd remainder goes to the bottom or the right, hence the offset rounds down.
    expected[offset[0] : offset[0] + inner[0], offset[1] : offset[1] + inner[1]] = 1.0
    torch.testing.assert_close(restored[1, 2], expected, atol=1e-5, rtol=0)


def test_clip_crops_what_hps_keeps(folder):
    clip, hps = load_clip_scorer(folder), load_hps_scorer(folder)
    wide = torch.zeros(1, 3, 28, 56)
    edges = wide.clone()
    edges[..., :8] = 1.0  # outside the center crop
    prompts, classes = ["a cat"], torch.zeros(1, dtype=torch.int64)
    assert torch.equal(clip(wide, prompts, classes), clip(edges, prompts, classes))
    assert not torch.equal(hps(wide, prompts, classes), hps(edges, prompts, classes))
    square = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(clip(square, prompts, classes), hps(square, prompts, classes))


def test_scores_are_open_clips_cosines_of_each_image_with_its_own_prompt(folder):
    scorer = load_clip_scorer(folder)
    images_u8 = textured_images_u8(28, 28, num=6)
    prompts = ["a red fox", "snow", "a red fox", "a very old boat", "snow", "snow"]
    scores_B = scorer(as_tensor(images_u8), prompts, torch.zeros(6, dtype=torch.int64))
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    with torch.no_grad():
        image = model.encode_image(
            torch.stack([transform(Image.fromarray(i)) for i in images_u8]), normalize=True
        )
        expected = (image * model.encode_text(tokens, normalize=True)).sum(-1)
    assert scores_B.dtype == torch.float32
    # Both normalise the same pixels; another batch size may take another kernel.
    torch.testing.assert_close(scores_B, expected, atol=2e-6, rtol=0)
    assert scores_B.std() > 1e-3


def test_text_features_are_computed_once_per_prompt(folder):
    model, preprocess, tokenizer = load_open_clip(folder)
    seen = []

    def counting(texts):
        seen.extend(texts)
        return tokenizer(texts)

    scorer = ClipScorer(model, preprocess, counting)
    first = scorer.text_features(["b", "a", "b"])
    assert seen == ["b", "a"]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    second = scorer.text_features(["a", "c", "b"])
    assert seen == ["b", "a", "c"]
    assert torch.equal(second[0], first[1])
    assert torch.equal(second[2], first[0])


def test_a_prompt_short_of_the_images_is_refused(folder):
    with pytest.raises(ValueError, match="2 prompts for 3 images"):
        load_clip_scorer(folder)(torch.rand(3, 3, 28, 28), ["a", "b"], torch.zeros(3))


def test_loading_leaves_the_global_generator_alone(folder):
    before = torch.get_rng_state()
    load_open_clip(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["ViT-B-32", "hf-hub:org/model", "/no/such/folder"])
def test_names_are_not_looked_up(name):
    with pytest.raises(CheckpointError, match=r"not an open_clip model folder.*not looked up"):
        load_open_clip(name)


def test_missing_weights(copied):
    (copied / WEIGHTS_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_FILE} does not exist"):
        load_open_clip(str(copied))


def test_truncated_weights(copied):
    payload = (copied / WEIGHTS_FILE).read_bytes()
    (copied / WEIGHTS_FILE).write_bytes(payload[: len(payload) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        load_open_clip(str(copied))


def test_weights_of_another_size_are_not_resized_silently(copied):
    """open_clip would interpolate the position embedding without a word."""
    config = json.loads((copied / CONFIG_FILE).read_text())
    config["model_cfg"]["vision_cfg"]["image_size"] = 42
    (copied / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mis-shaped \(visual.positional_embedding"):
        load_open_clip(str(copied))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "lacks model_cfg"),
        ('{"model_cfg": {"embed_dim": 8}}', "lacks model_cfg with vision_cfg"),
        (
            '{"model_cfg": {"embed_dim": 8, "vision_cfg": {"depth": 3}, "text_cfg": {}}}',
            "can't build its model_cfg",
        ),
        (
            '{"model_cfg": {"embed_dim": 8, "vision_cfg": {},'
            ' "text_cfg": {"hf_model_name": "roberta-base"}}}',
            "fetch from the network",
        ),
    ],
    ids=["no-json", "no-dict", "no-vision", "unknown-field", "network"],
)
def test_bad_configurations(copied, content, message):
    (copied / CONFIG_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_open_clip(str(copied))


def test_tiny_clip_learns_classes_and_preference_learns_damage():
    """A few steps of the real recipes, far from converged."""
    config = DigitsConfig(augmentations=2, tokenizer_steps=80, clip_steps=140, preference_steps=25)
    data = load_digits_data(config)
    heldout, labels_N = data.heldout.images_rgb_01, data.heldout.labels_N
    prompts = [PROMPTS[label] for label in labels_N.tolist()]
    before = torch.get_rng_state()
    tokenizer = train_tokenizer(data, config)
    clip, clip_config = train_clip(data, config)
    clip_digest = state_sha256(clip.state_dict())
    preference = train_preference(data, clip, clip_config, tokenizer, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert state_sha256(clip.state_dict()) == clip_digest, "the preference model is a copy"

    preprocess = default_preprocess(config.image_size)
    simple = SimpleTokenizer(context_length=clip_config["text_cfg"]["context_length"])
    clip_scorer = ClipScorer(clip, preprocess, simple)
    similarity = clip_scorer.image_features(heldout) @ clip_scorer.text_features(PROMPTS).T
    accuracy = (similarity.argmax(1) == labels_N).float().mean()
    assert accuracy > 0.35, "chance is 0.1, 140 steps reach 0.56 to 0.86 over three seeds"

    hps = HpsScorer(preference, preprocess, simple)
    clean_N = hps(heldout, prompts, labels_N)
    noisy = DAMAGES["add_noise"](
        data.heldout, torch.arange(len(labels_N)), tokenizer, torch.Generator().manual_seed(0)
    )
    assert (clean_N > hps(noisy, prompts, labels_N)).float().mean() > 0.75, "chance is 0.5"

    again, _ = train_clip(data, config.model_copy(update={"clip_steps": 3}))
    repeated, _ = train_clip(data, config.model_copy(update={"clip_steps": 3}))
    assert state_sha256(again.state_dict()) == state_sha256(repeated.state_dict())


def asked(class_ids_B, **places) -> Asked:
    names = [f"class{class_id}" for class_id in class_ids_B.tolist()]
    return Asked(class_ids_B, names, **places)


def test_check_scores_accepts_what_it_should():
    scores_B = torch.tensor([0.5, -1.0])
    assert check_scores("clip", scores_B, asked(torch.tensor([3, 4])), ["a", "b"]) is scores_B


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_scores_names_scorer_condition_class_and_sample(bad):
    scores_B = torch.zeros(12)
    scores_B[7] = bad
    classes_B = torch.tensor([5, 2, 9]).repeat_interleave(4)
    prompts = [f"a photo of {index}" for index in range(12)]
    message = (
        r"'hpsv2' returned -?(nan|inf) for condition {} \(class 2, 'class2'\), sample 3, "
        r"asked for 'a photo of 7'; 1 of 12"
    )
    with pytest.raises(RewardError, match=message.format(1)):
        check_scores("hpsv2", scores_B, asked(classes_B, group_size=4), prompts)
    in_step = asked(classes_B, group_size=4, condition_indices_P=[30, 31, 32])
    with pytest.raises(RewardError, match=message.format(31)):
        check_scores("hpsv2", scores_B, in_step, prompts)


@pytest.mark.parametrize(
    ("scores_B", "message"),
    [
        (torch.zeros(4, 1), r"shape \[4, 1\] for 4 images"),
        (torch.zeros(3), r"shape \[3\] for 4 images"),
        (torch.zeros(4, dtype=torch.float64), "torch.float64"),
        ([0.0] * 4, "returned list"),
        (None, "returned NoneType"),
    ],
    ids=["column", "short", "double", "list", "none"],
)
def test_check_scores_refuses_wrong_shapes_and_types(scores_B, message):
    with pytest.raises(RewardError, match=f"'mine'.*{message}"):
        check_scores("mine", scores_B, asked(torch.zeros(4, dtype=torch.int64)), ["a"] * 4)


def test_a_scorer_s_files_are_found_before_any_model_is_built(tmp_path):
    file = str(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(b"PK")
    check_scorer(ClipRewardConfig(checkpoint=file, model="ViT-L-14-quickgelu"))
    check_scorer(PreferenceRewardConfig(checkpoint=file))
    check_scorer(ClipRewardConfig())
    with pytest.raises(CheckpointError, match="single weight file"):
        check_scorer(ClipRewardConfig(checkpoint=file))
    with pytest.raises(ConfigError, match="ViT-L-14"):
        check_scorer(ClipRewardConfig(checkpoint=file, model="ViT-L-41"))
    with pytest.raises(CheckpointError, match="not an open_clip model folder"):
        check_scorer(PreferenceRewardConfig(checkpoint=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        check_scorer(AestheticRewardConfig(checkpoint=file, model="ViT-L-14-quickgelu", head=file))
