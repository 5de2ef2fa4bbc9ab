"""Scorers that users write: finding and making them, and what they can do wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlgen.config.load import load_config
from rlgen.config.plan import check_required, named_files
from rlgen.config.reward import PythonRewardConfig
from rlgen.errors import ConfigError, RewardError
from rlgen.rewards.instance import InstanceReward
from rlgen.rewards.prompts import Prompts, prompts_of
from rlgen.rewards.protocol import Asked
from rlgen.rewards.user import find_scorer_class, load_user_scorer

CPU = torch.device("cpu")
MODULE = """
import torch

class Mean:
    def __init__(self, *, device, factor=1.0):
        if factor < 0:
            raise RuntimeError("no weights for this factor")
        self.factor, self.device = factor, device

    def __call__(self, images_01, prompts, class_ids):
        return images_01.mean(dim=(1, 2, 3)) * self.factor

class NotCallable:
    def __init__(self, *, device): ...

class NoDevice:
    def __call__(self, images_01, prompts, class_ids): ...

class TwoInputs:
    def __init__(self, *, device): ...
    def __call__(self, images_01, prompts): ...

class Network(torch.nn.Module):
    def __init__(self, *, device):
        super().__init__()
    def forward(self, images_01, prompts, class_ids):
        return images_01.amax(dim=(1, 2, 3))

def mean(images_01): ...
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a module that can be imported; returns its name, which no other test has."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"rewards_{abs(hash((tmp_path, source)))}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def configured(target: str, **fields: object) -> PythonRewardConfig:
    return PythonRewardConfig(target=target, **fields)


def asked(num_images: int = 6, group_size: int = 3) -> Asked:
    class_ids_B = (torch.arange(num_images) // group_size) + 4
    names = [f"name{class_id}" for class_id in class_ids_B.tolist()]
    indices = list(range(10, 10 + num_images // group_size))
    return Asked(class_ids_B, names, group_size=group_size, condition_indices_P=indices)


# -- finding and making ------------------------------------------------------------------------


def test_the_class_is_found_and_made_with_its_arguments(module: Callable[[str], str]) -> None:
    scorer = load_user_scorer(configured(f"{module(MODULE)}:Mean", arguments={"factor": 2.0}), CPU)
    scores_B = scorer(torch.full((3, 3, 4, 4), 0.25), ["a"] * 3, torch.zeros(3))
    torch.testing.assert_close(scores_B, torch.full((3,), 0.5))


def test_a_torch_module_can_be_a_scorer(module: Callable[[str], str]) -> None:
    scorer = load_user_scorer(configured(f"{module(MODULE)}:Network"), CPU)
    assert scorer(torch.full((2, 3, 4, 4), 0.25), ["a"] * 2, torch.zeros(2)).tolist() == [0.25] * 2


@pytest.mark.parametrize(
    ("class_name", "arguments", "message"),
    [
        ("Meen", {}, r"be used: it has no class of this name; did you mean Mean\?"),
        ("Quux", {}, r"no class of this name; .*\.py was looked into"),
        ("mean", {}, r"it is <function mean at .*>, no class"),
        ("NotCallable", {}, "the class has no __call__"),
        ("NoDevice", {}, r"its __init__\(.*\) is called with \(device=\.\.\.\): got an unexpected"),
        ("Mean", {"faktor": 1}, r"with \(device=\.\.\., faktor=\.\.\.\): .*'faktor'"),
        ("TwoInputs", {}, r"its __call__\(self, images_01, prompts\) .*too many positional"),
        ("Mean", {"factor": -1}, r"made on cpu: its __init__ raised RuntimeError: no weights for "
         r"this factor \(rewards_\d+\.py, line 7\)"),
        ("Mean", {"factor": "x"}, r"its __init__ raised TypeError: .*line 6\)"),
    ],
)  # fmt: skip
def test_a_class_that_does_not_fit_is_named_with_the_reason(
    module: Callable[[str], str], class_name: str, arguments: dict[str, object], message: str
) -> None:
    target = f"{module(MODULE)}:{class_name}"
    with pytest.raises(ConfigError, match=rf"the scorer {target} can't .*{message}"):
        load_user_scorer(configured(target, arguments=arguments), CPU)


def test_a_module_that_is_not_there_is_told_apart_from_one_that_misses_something(
    module: Callable[[str], str],
) -> None:
    with pytest.raises(ConfigError, match=r"no module 'my_rewardz' in .*--working-dir"):
        find_scorer_class(configured("my_rewardz:Ink"))
    with pytest.raises(ConfigError, match=r"no module 'rlgen\.nowhere' in "):
        find_scorer_class(configured("rlgen.nowhere.at_all:Ink"))
    needs = module("\nimport lightning_from_nowhere\n")
    with pytest.raises(ConfigError, match=r"No module named 'lightning_from_nowhere' \(.*line 2\)"):
        find_scorer_class(configured(f"{needs}:Ink"))
    with pytest.raises(ConfigError, match=r"can't be imported: ZeroDivisionError: .*line 1\)"):
        find_scorer_class(configured(f"{module('1 / 0')}:Ink"))
    with pytest.raises(
        ConfigError, match=r"imported: SyntaxError: .* \(rewards_\d+\.py, line 1\)\.$"
    ):
        find_scorer_class(configured(f"{module('class :')}:Ink"))


# -- what it returns ---------------------------------------------------------------------------


def test_each_template_is_one_call_and_the_mean_counts() -> None:
    seen = []

    def scorer(images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        seen.append((prompts, class_ids_B.tolist()))
        return torch.full((len(images_01),), float(len(prompts[0])))

    prompts = Prompts(("{class}", "a {class}!!"), ("{class}?",), negative_weight=0.5)
    scores_B = InstanceReward("mine", scorer, prompts)(torch.rand(2, 3, 4, 4), asked(2, 1))
    assert seen == [
        (["name4", "name5"], [4, 5]),
        (["a name4!!", "a name5!!"], [4, 5]),
        (["name4?", "name5?"], [4, 5]),
    ]
    assert scores_B.tolist() == [(5 + 9) / 2 - 0.5 * 6] * 2


def test_a_scorer_that_writes_into_its_input_changes_no_one_else_s() -> None:
    def scorer(images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        class_ids_B.fill_(99)
        prompts.clear()
        return images_01.mul_(2).mean(dim=(1, 2, 3))

    images_01, batch = torch.full((6, 3, 4, 4), 0.25), asked()
    scores_B = InstanceReward("mine", scorer, Prompts(("a", "b")))(images_01, batch)
    assert scores_B.tolist() == [0.5] * 6, "each template sees fresh images"
    assert images_01.unique().tolist() == [0.25]
    assert batch.class_ids_B.tolist() == [4, 4, 4, 5, 5, 5]


def test_a_scorer_that_raises_is_named_with_the_conditions_and_its_error() -> None:
    def scorer(images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        raise KeyError("no such breed")

    with pytest.raises(
        RewardError,
        match=r"scorer 'mine' failed on 6 images of condition 10 \(class 4, 'name4'\) to "
        r"condition 11 \(class 5, 'name5'\): KeyError: 'no such breed' "
        r"\(test_user_scorer\.py, line \d+\)\.",
    ) as caught:
        InstanceReward("mine", scorer, Prompts())(torch.rand(6, 3, 4, 4), asked())
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_inside_torch_is_told_with_the_users_line() -> None:
    def scorer(images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        return torch.nn.Linear(7, 1)(images_01)

    with pytest.raises(RewardError, match=r"RuntimeError: .*mat1 .*\(test_user_scorer\.py, line"):
        InstanceReward("mine", scorer, Prompts())(torch.rand(6, 3, 4, 4), asked())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, 0.0, 0.0, 0.0, float("nan"), 0.0], r"nan for condition 11 \(class 5, 'name5'\), "
         r"sample 1, asked for 'a name5'; 1 of 6"),
        ([float("-inf")] * 6, r"-inf for condition 10 \(class 4, 'name4'\), sample 0, .*6 of 6"),
    ],
)  # fmt: skip
def test_a_score_that_is_not_finite_names_its_image(scores: list[float], message: str) -> None:
    reward = InstanceReward("mine", lambda *_: torch.tensor(scores), Prompts(("a {class}",)))
    with pytest.raises(RewardError, match=f"scorer 'mine' returned {message}"):
        reward(torch.rand(6, 3, 4, 4), asked())


def test_the_second_template_s_scores_are_checked_too() -> None:
    def scorer(images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        return torch.full((6,), torch.nan if prompts[0] == "oil" else 0.0)

    with pytest.raises(RewardError, match="asked for 'oil'"):
        InstanceReward("mine", scorer, Prompts(("a", "oil")))(torch.rand(6, 3, 4, 4), asked())


@pytest.mark.parametrize("result", [None, 0.5, torch.zeros(6, 1), torch.zeros(6).double()])
def test_anything_but_float32_per_image_is_refused_and_never_taken_for_zero(result) -> None:
    with pytest.raises(RewardError, match=r"scorer 'mine' returned .*float32"):
        InstanceReward("mine", lambda *_: result, Prompts())(torch.rand(6, 3, 4, 4), asked())


# -- configuration -----------------------------------------------------------------------------


def test_the_yaml_names_target_arguments_and_prompts() -> None:
    text = "{type: python, target: 'a.b:C', arguments: {x: [1, 2], y: {z: null}}, weight: 2}"
    scorer = load_config(None, [f"reward.scorers.mine={text}"]).reward.active_scorers["mine"]
    assert isinstance(scorer, PythonRewardConfig)
    assert (scorer.target, scorer.weight) == ("a.b:C", 2.0)
    assert scorer.arguments == {"x": [1, 2], "y": {"z": None}}
    assert prompts_of(scorer) == Prompts(("{class}",)), "the name alone"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("{type: python}", ["reward.scorers.mine.target is not given"]),
        ("{target: 'a:B'}", ["mine.type is not given", "clip, hpsv2, aesthetic, python"]),
        ("{type: python, target: a.b}", ["mine.target: 'a.b' names no class", "module:Class"]),
        ("{type: python, target: 'a/b.py:C'}", ["names no class"]),
        ("{type: python, target: 'a:B', arguments: {device: cpu}}", ["mine.arguments: ", "itself"]),
        ("{type: python, target: 'a:B', argument: {}}", ["mine.argument; did you mean arguments?"]),
        ("{type: python, target: 'a:B', quux: {}}", ["known here: arguments, negative_prompts,"]),
    ],
)
def test_a_wrong_section_is_told_like_any_other(value: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"reward.scorers.mine={value}"])
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["loo_fid", "a.b", "a/b", "1st", "''"])
def test_a_name_that_can_be_no_metric_is_refused(name: str) -> None:
    section = f"{{{name}: {{type: python, target: 'a:B'}}}}"
    with pytest.raises(ConfigError, match=r"reward\.scorers: .* can't be the name of a scorer"):
        load_config(None, [f"reward.scorers={section}"])


def test_arguments_are_no_inputs_of_rlgen_but_may_be_left_to_the_user() -> None:
    arguments = "{checkpoint: /nowhere, reference: x, weights: required}"
    config = load_config(
        None,
        [f"reward.scorers.mine={{type: python, target: 'a:B', arguments: {arguments}}}"],
    )
    assert named_files(config) == {}
    with pytest.raises(ConfigError, match=r"reward\.scorers\.mine\.arguments\.weights=\.\.\."):
        check_required(config)
