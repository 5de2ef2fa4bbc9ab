"""Styled digits, the captions that name them, and the judge that tells them apart."""

from pathlib import Path

import pytest
import torch

from rlgen.config import load_config
from rlgen.config.digits import DigitsConfig
from rlgen.config.reward import PythonRewardConfig
from rlgen.digits.assets import DigitsAssets, locate_assets, resolve_embedded
from rlgen.digits.captions import PROMPTS, STYLED_PROMPTS, make_caption_table
from rlgen.digits.damage import swap_style
from rlgen.digits.data import CLASS_NAMES, load_digits_data
from rlgen.digits.style_judge import StyleJudge, joint_ids
from rlgen.digits.styles import STYLES, apply_style, in_all_styles, in_style
from rlgen.digits.train_features import train_judge, train_style_judge
from rlgen.errors import ConfigError
from rlgen.features.extractor import save_convnet
from rlgen.rewards.load import load_reward
from rlgen.rewards.prompts import prompts_of
from rlgen.rewards.protocol import Asked
from rlgen.tokenizers.conv_vq import ConvVQ, ConvVQConfig

ROOT = Path(__file__).parents[2]
PRESET = str(ROOT / "jobs" / "digits_style.yaml")
CPU = torch.device("cpu")
CONFIG = DigitsConfig(augmentations=2, style="slanted", feature_steps=450)


@pytest.fixture(scope="module")
def plain():
    return load_digits_data(CONFIG)


@pytest.fixture(scope="module")
def styled(plain):
    return in_all_styles(plain)


@pytest.fixture(scope="module")
def style_net(styled, tmp_path_factory) -> str:
    net = train_style_judge(styled, CONFIG)
    path = str(tmp_path_factory.mktemp("nets") / "style_judge.safetensors")
    save_convnet(path, net)
    return path


def test_a_slanted_digit_leans_to_the_right_about_its_center():
    bar = torch.zeros(1, 1, 16, 16)
    bar[..., 7:9] = 1.0
    slanted = apply_style(bar, "slanted")[0, 0]
    x = torch.arange(16) + 0.5
    center_of_row = (slanted * x).sum(1) / slanted.sum(1)
    # 5.5 rows above the center at shear 0.6: 3.3 pixels to the right.
    torch.testing.assert_close(center_of_row[2], torch.tensor(8 + 3.3), atol=0.05, rtol=0)
    torch.testing.assert_close(center_of_row[13], torch.tensor(8 - 3.3), atol=0.05, rtol=0)


def test_a_thick_digit_covers_the_plain_one_and_an_inverted_one_is_its_negative(plain):
    images = plain.heldout.images_01
    thick = apply_style(images, "thick")
    assert (thick >= images - 1e-6).all()
    assert 1.3 < thick.mean() / images.mean() < 2.5
    assert torch.equal(apply_style(images, "inverted"), 1 - images)
    assert torch.equal(apply_style(images, "plain"), images)


def test_every_digit_stands_in_every_style_and_keeps_its_label_and_its_part(plain, styled):
    for part, before in ((styled.train, plain.train), (styled.heldout, plain.heldout)):
        assert len(part.labels_N) == len(STYLES) * len(before.labels_N)
        for style in STYLES:
            block = in_style(part, style)
            assert torch.equal(block.images_01, apply_style(before.images_01, style))
            assert torch.equal(block.labels_N, before.labels_N)
            assert torch.equal(block.sources_N, before.sources_N)
    assert not set(styled.train.sources_N.tolist()) & set(styled.heldout.sources_N.tolist())


def test_style_judge_tells_class_and_style_of_real_digits_that_no_training_saw(styled, style_net):
    heldout = styled.heldout
    for style in STYLES:
        block = in_style(heldout, style)
        shares = {
            question: StyleJudge(device=CPU, style=style, question=question, net=style_net)(
                block.images_rgb_01, [""] * len(block.labels_N), block.labels_N
            ).mean()
            for question in ("style", "class", "both")
        }
        assert shares["class"] > 0.85, style
        # A real plain digit may be thick, or slanted, as it was written.
        assert shares["style"] > 0.9, style
        assert shares["both"] <= min(shares["style"], shares["class"])
        others = heldout.take((heldout.styles_N != STYLES.index(style)).nonzero().flatten())
        judge = StyleJudge(device=CPU, style=style, question="style", net=style_net)
        wrong = judge(others.images_rgb_01, [""] * len(others.labels_N), others.labels_N).mean()
        assert wrong < 0.06, style


def test_style_judge_answers_for_the_class_that_was_asked_for(styled, style_net):
    block = in_style(styled.heldout, "slanted")
    wrong_labels = (block.labels_N + 1) % len(CLASS_NAMES)
    judge = StyleJudge(device=CPU, style="slanted", question="both", net=style_net)
    assert judge(block.images_rgb_01, [""] * len(wrong_labels), wrong_labels).mean() < 0.05


def test_style_judge_refuses_what_it_cannot_answer(plain, tmp_path, style_net):
    with pytest.raises(ValueError, match="bold, style"):
        StyleJudge(device=CPU, style="bold", question="style", net=style_net)
    plain_net = str(tmp_path / "judge.safetensors")
    judge = train_judge(plain, CONFIG.model_copy(update={"feature_steps": 2}))
    save_convnet(plain_net, judge)
    scorer = PythonRewardConfig(
        target="rlgen.digits.style_judge:StyleJudge",
        arguments={"style": "thick", "question": "style", "net": plain_net},
    )
    with pytest.raises(ConfigError, match="knows 10 classes, and no styles"):
        load_reward("styled", scorer, CPU)


def test_captions_name_styles_only_where_they_are_true(styled):
    table = make_caption_table(names_styles=True)
    assert len(set(table.texts)) == len(table.texts)
    assert set(STYLED_PROMPTS) <= set(table.texts)
    truth_NU = table.truth_NU(styled.train)
    assert truth_NU.any(1).all() and truth_NU.any(0).all()
    for column, text in enumerate(table.texts):
        styles = styled.train.styles_N[truth_NU[:, column]].unique().tolist()
        named = [i for i, style in enumerate(STYLES) if style in text.split()]
        if named or "leaning" in text or "upright" in text:
            assert styles == (named or [0]), text
        else:
            assert styles == [0, 1, 2, 3], text


def test_prompts_stand_in_the_order_of_joint_ids(styled):
    ids = joint_ids(styled.train.labels_N, styled.train.styles_N)
    for row in range(0, len(ids), 997):
        prompt = STYLED_PROMPTS[ids[row]]
        style = STYLES[styled.train.styles_N[row]]
        assert CLASS_NAMES[styled.train.labels_N[row]] in prompt
        assert style == "plain" or style in prompt.split()


def test_without_styles_captions_are_as_if_there_were_none():
    table = make_caption_table()
    assert not any(style in text.split() for text in table.texts for style in STYLES)
    assert set(PROMPTS) <= set(table.texts)
    settings = DigitsConfig().model_dump(mode="json")
    assert settings["style"] is None


def test_swapped_styles_are_the_same_digit_in_another_style(styled):
    class Identity(ConvVQ):
        def encode(self, images_01):
            return images_01

        def decode(self, tokens_BL):
            return tokens_BL

    images = styled.heldout
    rows = torch.arange(0, len(images.labels_N), 13)
    generator = torch.Generator().manual_seed(0)
    swapped = swap_style(images, rows, Identity(ConvVQConfig()), generator)
    found = torch.cdist(swapped[:, 0].flatten(1), images.images_01.flatten(1)).argmin(1)
    assert (images.styles_N[found] != images.styles_N[rows]).all()
    assert torch.equal(images.sources_N[found], images.sources_N[rows])


def test_one_folder_of_nets_serves_all_styles_and_plain_digits_have_their_own():
    def folder(style):
        return locate_assets(DigitsConfig(style=style)).folder

    assert folder("slanted") == folder("thick") == folder("inverted") != folder(None)


@pytest.mark.parametrize("style", ["slanted", "inverted"])
def test_style_preset_asks_for_its_style_everywhere(style):
    from rlgen.jobs.ablation_plan import style_settings

    config = load_config(PRESET, style_settings(style))
    folder = Path("/nets")
    resolved = resolve_embedded(config, DigitsAssets(folder, folder / "t", folder / "p"))
    assert resolved.reward.loo_fid is not None
    assert resolved.reward.loo_fid.reference == f"/nets/reference_moments-{style}.npz"
    assert resolved.evaluation.judge_reference == f"/nets/judge_reference-{style}.npz"
    judges = 0
    for scorer in resolved.reward.active_scorers.values():
        if isinstance(scorer, PythonRewardConfig):
            judges += 1
            assert scorer.arguments["net"] == "/nets/style_judge.safetensors"
            assert scorer.arguments["style"] == style
            assert scorer.weight == 0, "the style judge rewards nothing"
        else:
            assert scorer.weight > 0
            [three] = prompts_of(scorer).fill(["three"])[0]
            assert three in STYLED_PROMPTS and style in three
    assert judges == 3


def test_style_judge_reports_as_a_scorer(styled, style_net):
    config = load_config(PRESET).reward.active_scorers["styled_class"]
    assert isinstance(config, PythonRewardConfig)
    scorer = config.model_copy(update={"arguments": {**config.arguments, "net": style_net}})
    reward = load_reward("styled_class", scorer, CPU)
    block = in_style(styled.heldout, "slanted").take(torch.arange(0, 20))
    asked = Asked(
        block.labels_N,
        [CLASS_NAMES[label] for label in block.labels_N.tolist()],
        group_size=20,
        condition_indices_P=[0],
    )
    assert reward(block.images_rgb_01, asked).mean() > 0.7
