"""Templates: filling, several at once, negative ones, and what the configuration refuses."""

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from rlgen.config.digits import DigitsConfig
from rlgen.config.load import dump_yaml, load_config
from rlgen.config.reward import AestheticRewardConfig, ClipRewardConfig
from rlgen.digits.train_clip import clip_model_config
from rlgen.errors import ConfigError
from rlgen.rewards.clip import ClipScorer
from rlgen.rewards.instance import InstanceReward
from rlgen.rewards.open_clip_model import build_open_clip, default_preprocess
from rlgen.rewards.prompts import Prompts, prompts_of
from rlgen.rewards.protocol import Asked

NAMES = ["cat", "old {class} dog", "cat", "boat"]


@pytest.fixture(scope="module")
def clip() -> ClipScorer:
    config = clip_model_config(DigitsConfig())
    model = build_open_clip(config, "tiny")
    length = config["text_cfg"]["context_length"]
    return ClipScorer(model, default_preprocess(16), SimpleTokenizer(context_length=length))


@pytest.fixture(scope="module")
def images_01() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def asked() -> Asked:
    return Asked(torch.tensor([0, 1, 0, 2]), NAMES)


def refused(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    return str(caught.value)


# -- filling -----------------------------------------------------------------------------------


def test_every_class_placeholder_is_filled_and_nothing_in_a_name_is() -> None:
    prompts = Prompts(("a {class}, {class}!", "oil painting"), negatives=("blurry {class}",))
    filled = prompts.fill(NAMES[:2])
    assert filled == [
        ["a cat, cat!", "a old {class} dog, old {class} dog!"],
        ["oil painting", "oil painting"],
        ["blurry cat", "blurry old {class} dog"],
    ]


def test_the_configuration_s_templates_arrive_in_order() -> None:
    overrides = [
        "reward.scorers.clip.prompt=['a painting of a {class}', in oil]",
        "reward.scorers.clip.negative_prompts=[a photo]",
        "reward.scorers.clip.negative_weight=0.5",
    ]
    scorers = load_config(None, overrides).reward.active_scorers
    style = Prompts(("a painting of a {class}", "in oil"), ("a photo",), 0.5)
    assert prompts_of(scorers["clip"]) == style
    assert prompts_of(scorers["preference"]) == Prompts(("a photo of the digit {class}",))
    assert prompts_of(AestheticRewardConfig()) == Prompts(("{class}",))


# -- arithmetic --------------------------------------------------------------------------------


def test_one_template_changes_no_bit(clip: ClipScorer, images_01: torch.Tensor) -> None:
    expected_B = clip(images_01, [f"a {name}" for name in NAMES], torch.zeros(4))
    reward = InstanceReward("clip", clip, Prompts(("a {class}",)))
    assert torch.equal(reward(images_01, asked()), expected_B)


def test_several_templates_give_the_mean_and_negative_ones_are_taken_off(
    clip: ClipScorer, images_01: torch.Tensor
) -> None:
    def cosines(template: str) -> torch.Tensor:
        texts = [template.replace("{class}", name, 1) for name in NAMES]
        return clip(images_01, texts, torch.zeros(4)).double()

    templates, negatives = ("a {class}", "{class} in oil", "a painting"), ("a photo", "blur")
    prompts = Prompts(templates, negatives, negative_weight=0.7)
    expected_B = sum(cosines(t) for t in templates) / 3 - 0.7 * sum(map(cosines, negatives)) / 2
    found_B = InstanceReward("clip", clip, prompts)(images_01, asked())
    assert found_B.dtype == torch.float32
    # Five cosines in float32, each rounded at 6e-8.
    torch.testing.assert_close(found_B.double(), expected_B, atol=3e-7, rtol=0)
    without = Prompts(templates, negatives, negative_weight=0.0)
    assert not torch.equal(found_B, InstanceReward("clip", clip, without)(images_01, asked()))


def test_an_image_goes_through_the_model_once_for_all_templates(
    clip: ClipScorer, images_01: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = clip.model.encode_image
    monkeypatch.setattr(clip.model, "encode_image", lambda *a: calls.append(1) or encode(*a))
    InstanceReward("clip", clip, Prompts(("a", "b", "c"), ("d",)))(images_01, asked())
    assert len(calls) == 1


# -- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("prompt='a {name}'", ["clip.prompt: ", "'a {name}' has {name}", "{class} is all"]),
        ("prompt='a {}'", ["has {};"]),
        ("prompt=[a cat, 'a { class }']", ["has { class };"]),
        ("prompt=[]", ["[] is neither a template nor a list"]),
        ("prompt=3", ["clip.prompt: 3 is neither"]),
        ("prompt=[3]", ["clip.prompt: 3 is no template"]),
        ("prompt=' '", ["' ' is no template", "'a photo of a {class}'"]),
        ("negative_prompts=blurry", ["clip.negative_prompts: 'blurry' is no list"]),
        ("negative_prompts=['{x}']", ["clip.negative_prompts: ", "has {x};"]),
        ("negative_weight=-1", ["clip.negative_weight = -1", "greater than or equal to 0"]),
        ("model=ViT-L-14", ["reward.scorers.clip: model = ViT-L-14", "give the file's path"]),
    ],
)
def test_what_can_not_be_filled_is_refused(override: str, parts: list[str]) -> None:
    message = refused(f"reward.scorers.clip.{override}")
    for part in parts:
        assert part in message, message
    assert message.count("reward.scorers") == 1, "one mistake is told once"


def test_an_open_brace_alone_is_a_letter() -> None:
    assert ClipRewardConfig(prompt="smile :-{ {class}").prompt == "smile :-{ {class}"


def test_templates_survive_the_yaml_file(tmp_path) -> None:
    config = load_config(
        None,
        [
            "reward.scorers.clip.prompt=['a {class}', 'oil']",
            "reward.scorers.preference.negative_prompts=[blurry]",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(str(path)) == config
    assert config.with_values({"seed": 0}) == config


def test_an_aesthetic_scorer_asks_for_its_files_and_takes_no_words() -> None:
    from rlgen.config.plan import check_required, named_files

    config = load_config(None, ["reward.scorers.beauty={type: aesthetic}"])
    with pytest.raises(ConfigError, match=r"(?s)leaves 2 paths.*beauty\.checkpoint=.*beauty\.head"):
        check_required(config)
    given = "reward.scorers.beauty={type: aesthetic, checkpoint: /a, head: /b}"
    assert set(named_files(load_config(None, [given]))) == {
        "reward.scorers.beauty.checkpoint",
        "reward.scorers.beauty.head",
    }
    assert "unknown key reward.scorers.beauty.prompt; known here: checkpoint, head" in refused(
        "reward.scorers.beauty={type: aesthetic, prompt: a}"
    )
    assert "no aesthetic model" in refused(
        "reward.scorers.beauty={type: aesthetic, checkpoint: embedded}"
    )
