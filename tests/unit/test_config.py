"""The configuration and the command line: layers, messages, the plan, and answers at once."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import rlgen
from rlgen.config import EMBEDDED, RunConfig, config_sha256, dump_yaml, load_config
from rlgen.config.plan import check_local_files, describe_plan, named_files, uses_embedded
from rlgen.errors import ConfigError
from rlgen.jobs.cli import parse_request

PACKAGE = Path(rlgen.__file__).parent


def all_fields(annotation: Any, owner: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Owner, name and definition of every field below a section, in unions and dicts too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield annotation.__name__, name, field
            yield from all_fields(field.annotation, annotation.__name__)
    for part in get_args(annotation):
        yield from all_fields(part, owner)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def refused(*overrides: str) -> str:
    """The message about these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return str(caught.value)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


# -- layers ------------------------------------------------------------------------------------


def test_without_anything_the_defaults_load() -> None:
    config = load_config()
    assert config == RunConfig()
    assert config.images_per_step == 60 * 8 and config.num_units == 4
    assert uses_embedded(config)


def test_yaml_holds_everything_and_loads_to_an_equal_config(tmp_path) -> None:
    config = load_config(
        None,
        ["seed=5", "class_names=[a, b]", "reward.scorers.clip=null", "evaluation.cfg_scales=[2]"],
    )
    again = load_config(written(tmp_path, dump_yaml(config)))
    assert again == config
    assert config_sha256(again) == config_sha256(config) != config_sha256(RunConfig())


def test_the_shipped_yaml_files_load() -> None:
    shipped = sorted((PACKAGE.parent / "jobs").glob("*.yaml"))
    configs = [path for path in shipped if "apiVersion" not in path.read_text()]
    if not configs:
        pytest.skip("an installed package has no jobs/ folder beside it")
    for path in configs:
        load_config(str(path))


def test_file_and_then_overrides_replace_defaults(tmp_path) -> None:
    path = written(tmp_path, "steps: 7\nrollout:\n  group_size: 4\n  temperature: 0.7\n")
    config = load_config(path, ["rollout.group_size=6", "rollout.group_size=2"])
    assert config.steps == 7
    assert config.rollout.temperature == 0.7
    assert config.rollout.group_size == 2
    assert config.rollout.conditions_per_step == 60, "the rest of the section stays"


def test_an_empty_file_is_the_default(tmp_path) -> None:
    assert load_config(written(tmp_path, "# nothing\n")) == RunConfig()


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("2E5", 2e5), ("1.5e-3", 1.5e-3), ("3", 3.0), (".5", 0.5)]
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value) -> None:
    assert load_config(None, [f"learner.lr={text}"]).learner.lr == value
    path = written(tmp_path, f"learner:\n  lr: {text}\n")
    assert load_config(path).learner.lr == value


def test_words_that_look_like_numbers_stay_words() -> None:
    assert load_config(None, ["policy.checkpoint=1e-4x"]).policy.checkpoint == "1e-4x"
    assert load_config(None, ["policy.checkpoint='12'"]).policy.checkpoint == "12"


def test_null_removes_a_scorer_or_the_distribution_reward() -> None:
    config = load_config(None, ["reward.scorers.clip=null", "reward.loo_fid=null"])
    assert list(config.reward.active_scorers) == ["preference"]
    assert config.reward.loo_fid is None


def test_a_new_scorer_joins_the_others() -> None:
    config = load_config(None, ["reward.scorers.second={type: clip, weight: 0.5}"])
    assert list(config.reward.active_scorers) == ["clip", "preference", "second"]
    assert config.reward.active_scorers["second"].weight == 0.5


def test_another_type_replaces_a_section_and_the_same_type_merges() -> None:
    same = load_config(
        None, ["reward.scorers.clip.prompt=p", "reward.scorers.clip={type: clip, weight: 2}"]
    )
    assert same.reward.active_scorers["clip"].prompt == "p"
    other = load_config(
        None, ["reward.scorers.clip.prompt=p", "reward.scorers.clip={type: hpsv2, weight: 2}"]
    )
    clip = other.reward.active_scorers["clip"]
    assert (clip.type, clip.weight) == ("hpsv2", 2.0)
    assert clip.prompt != "p", "the old type's settings must not leak"


def test_values_by_dotted_key_are_checked_like_any_other() -> None:
    config = RunConfig().with_values({"rollout.group_size": 4, "reward.loo_fid.decay": 0.1})
    assert (config.rollout.group_size, config.reward.loo_fid.decay) == (4, 0.1)
    assert RunConfig().rollout.group_size == 8
    with pytest.raises(ValueError, match="can't be split"):
        RunConfig().with_values({"learner.num_workers": 7})


def test_a_config_never_changes() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().rollout.group_size = 4


def test_the_digest_depends_on_every_value() -> None:
    digests = {
        config_sha256(load_config(None, overrides))
        for overrides in ([], ["seed=1"], ["reward.scorers.clip=null"], ["learner.lr=1e-4"])
    }
    assert len(digests) == 4


# -- messages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rollout.num_worker=3", ["unknown key rollout.num_worker", "did you mean num_workers?"]),
        ("rolout.num_workers=3", ["unknown key rolout", "did you mean rollout?"]),
        ("learner.quux=3", ["unknown key learner.quux", "known here: beta1, beta2,"]),
        ("reward.scorers.clip.wieght=1", ["unknown key reward.scorers.clip.wieght", "weight?"]),
        ("rollout.num_workers=many", ["rollout.num_workers = 'many' (str)", "integer"]),
        ("rollout.num_workers=2.5", ["rollout.num_workers = 2.5 (float)", "integer"]),
        ("rollout.num_workers=true", ["rollout.num_workers = True (bool)", "integer"]),
        ("learner.lr='1e-4'", ["learner.lr = '1e-4' (str)", "number"]),
        ("rollout=3", ["rollout = 3 (int)"]),
        ("rollout.num_workers=0", ["rollout.num_workers = 0", "greater than or equal to 1"]),
        ("rollout.group_size=1", ["rollout.group_size = 1", "greater than or equal to 2"]),
        ("rollout.cfg_scale=0.5", ["rollout.cfg_scale = 0.5"]),
        ("learner.lr=.nan", ["learner.lr = nan"]),
        ("advantage.combine=both", ["advantage.combine = 'both'", "'normalize_then_sum'"]),
        ("reward.scorers.clip.type=clap", ["reward.scorers.clip", "'clap'", "hpsv2"]),
        (
            "rollout.conditions_per_unit=7",
            ["conditions_per_step = 60", "conditions_per_unit = 7", "use 1, 2, 3,", "or 60"],
        ),
        (
            "learner.num_workers=7",
            ["conditions_per_step = 60", "8 images", "learner.num_workers = 7", "or 60 ranks"],
        ),
        ("entropy.min_coef=0.5", ["entropy", "min_coef = 0.5 is above max_coef = 0.02"]),
        ("digits.image_size=20", ["digits.image_size = 20", "multiple of 16"]),
        ("seed=-1", ["seed = -1"]),
        ("seed=4294967296", ["seed = 4294967296"]),
    ],
)
def test_wrong_values_are_named_with_the_way_out(override, parts) -> None:
    message = refused(override)
    for part in parts:
        assert part in message, message


def test_several_mistakes_are_told_at_once() -> None:
    message = refused("rollout.num_worker=3", "learner.lr=fast")
    assert "rollout.num_worker;" in message and "learner.lr = 'fast'" in message


def test_a_run_without_any_reward_is_refused() -> None:
    gone = ["reward.scorers.clip=null", "reward.scorers.preference=null"]
    assert "there is no reward" in refused(*gone, "reward.loo_fid=null")
    assert "every reward has weight 0" in refused(*gone, "reward.loo_fid.weight=0")
    load_config(None, gone)


def test_a_split_that_fits_is_accepted() -> None:
    config = load_config(None, ["learner.num_workers=2", "rollout.conditions_per_unit=12"])
    assert config.num_units == 5


@pytest.mark.parametrize("word", ["seed", "=3", "Seed=3", "a..b=3", "--seed=3", "seed 3"])
def test_words_that_are_no_overrides_are_refused(word) -> None:
    message = refused(word)
    assert repr(word) in message and "section.key=value" in message


def test_values_and_files_that_are_not_yaml_are_refused(tmp_path) -> None:
    assert "the value of 'class_names=[a' is not YAML" in refused("class_names=[a")
    with pytest.raises(ConfigError, match=r"run\.yaml is not YAML"):
        load_config(written(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match=r"run\.yaml holds a list; it must hold sections"):
        load_config(written(tmp_path, "- 1\n"))


def test_files_that_can_not_be_read_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml can't be read \(FileNotFoundError\)"):
        load_config(str(tmp_path / "nothing.yaml"))
    with pytest.raises(ConfigError, match=r"can't be read \(IsADirectoryError\)"):
        load_config(str(tmp_path))
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"weights\.yaml can't be read \(UnicodeDecodeError\)"):
        load_config(str(binary))


def test_yaml_can_not_make_objects(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(written(tmp_path, "seed: !!python/object/apply:os.getpid []\n"))


# -- plan --------------------------------------------------------------------------------------


def test_local_inputs_that_do_not_exist_are_named(tmp_path) -> None:
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    config = load_config(
        None,
        [
            f"policy.checkpoint={there}",
            "tokenizer.checkpoint=/nowhere/vq.safetensors",
            "evaluation.judge=s3://bucket/judge.safetensors",
        ],
    )
    assert named_files(config).keys() == {
        "policy.checkpoint", "tokenizer.checkpoint", "evaluation.judge",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_local_files(config)
    message = str(caught.value)
    assert "tokenizer.checkpoint = /nowhere/vq.safetensors does not exist" in message
    assert "there.safetensors" not in message and "s3://" not in message
    assert f"`{EMBEDDED}`" in message


def test_every_input_of_a_run_is_checked(tmp_path) -> None:
    keys = [
        "policy.checkpoint", "tokenizer.checkpoint", "reward.scorers.clip.checkpoint",
        "reward.scorers.preference.checkpoint", "reward.loo_fid.extractor",
        "reward.loo_fid.reference", "evaluation.judge", "evaluation.judge_reference",
        "checkpoint.resume_from",
    ]  # fmt: skip
    for key in keys:
        with pytest.raises(ConfigError, match=f"{key} = {tmp_path}/none does not exist"):
            check_local_files(load_config(None, [f"{key}={tmp_path}/none"]))
    check_local_files(load_config(None, ["grpo.reference=ema"]))


def test_the_plan_shows_the_batch_algebra() -> None:
    config = load_config(
        None,
        [
            "rollout.conditions_per_step=24",
            "rollout.conditions_per_unit=6",
            "rollout.group_size=10",
            "rollout.num_workers=3",
            "learner.num_workers=2",
            "learner.micro_batch_size=50",
            "grpo.inner_epochs=2",
            "reward.scorers.preference=null",
        ],
    )
    plan = describe_plan(config)
    for part in (
        "24 conditions x 10 images = 240 images a step",
        "4 work units of 6 conditions = 60 images, for 3 rollout workers",
        "120 images a learner rank in 3 micro-batch(es) of up to 50, 2 inner epoch(s)",
        "3 x rollout",
        "2 x learner",
        "loo_fid x 1 (full, decay 0.5)",
        "the embedded digits preset",
    ):
        assert part in plan, plan
    assert "preference" not in plan
    local = describe_plan(load_config(None, ["runtime=local"]))
    assert "without Ray" in local and "Actors" not in local


# -- guards of the house style -----------------------------------------------------------------


def test_every_field_and_section_has_a_help_text() -> None:
    silent = []
    for owner, name, field in all_fields(RunConfig):
        sections = sections_in(field.annotation)
        if not (field.description or (sections and all(s.__doc__ for s in sections))):
            silent.append(f"{owner}.{name}")
    assert not silent, "write a docstring under each of these fields"


def test_every_field_is_read_outside_config() -> None:
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "config":
            tree = ast.parse(path.read_text())
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # The type of a union's member is read by pydantic, and code asks for its class.
    fields = {name for _, name, _ in all_fields(RunConfig)} - {"type"}
    assert len(fields) > 80
    assert not fields - read, "remove these fields, or use them"


def test_each_scorers_type_has_a_scorer() -> None:
    text = (PACKAGE / "rewards" / "load.py").read_text()
    for section in sections_in(
        dict(RunConfig().reward.__class__.model_fields)["scorers"].annotation
    ):
        assert section.__name__ in text, section


# -- the command -------------------------------------------------------------------------------


def run_job(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlgen.jobs.grpo", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.timing
@pytest.mark.parametrize("argument", ["--help", "--dry-run"])
def test_help_and_plan_come_in_two_seconds_and_leave_nothing(tmp_path, argument) -> None:
    durations = []
    for _ in range(3):  # the best of three, because other processes share the cores
        started = time.perf_counter()
        done = run_job(tmp_path, argument)
        durations.append(time.perf_counter() - started)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        if durations[-1] < 2.0:
            break
    assert min(durations) < 2.0
    expected = {"--help": "--output DIR", "--dry-run": "480 images a step"}[argument]
    assert expected in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_heavy_library() -> None:
    code = (
        "import sys; from rlgen.jobs.grpo import main; main(['--dry-run', 'seed=3']); "
        "print(*sorted({'torch', 'numpy', 'ray', 'mlflow', 'rich'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "seed 3" in done.stdout
    assert done.stdout.splitlines()[-1] == "", "these were imported"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rollout.num_worker=3"], ["unknown key rollout.num_worker", "num_workers"]),
        (["steps=many"], ["steps = 'many'", "integer"]),
        (["learner.num_workers=7"], ["60", "7 ranks"]),
        (["policy.checkpoint=gone.safetensors"], ["policy.checkpoint = gone.safetensors", "exist"]),
        (["--config", "gone.yaml"], ["gone.yaml can't be read", "check --config"]),
    ],
    ids=["unknown key", "wrong type", "impossible split", "missing input", "missing file"],
)
def test_a_wrong_request_is_one_paragraph_and_nothing_is_written(
    tmp_path, arguments, parts
) -> None:
    done = run_job(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in parts:
        assert part in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_settings_may_stand_before_and_after_options(tmp_path) -> None:
    path = written(tmp_path, "steps: 9\n")
    for words in (
        ["--dry-run", "--config", path, "seed=1", "rollout.num_workers=3"],
        ["seed=1", "rollout.num_workers=3", "--dry-run", "--config", path],
        ["seed=1", "--dry-run", "--config", path, "rollout.num_workers=3"],
    ):
        request = parse_request(words, job="grpo", description="")
        assert request.is_dry_run and request.output is None
        assert (request.config.seed, request.config.steps) == (1, 9)
        assert request.config.rollout.num_workers == 3
    request = parse_request(["--output", "here"], job="grpo", description="")
    assert request.output == Path("here") and not request.is_dry_run


def test_yaml_of_the_config_is_plain() -> None:
    assert yaml.safe_load(dump_yaml(RunConfig()))["rollout"]["group_size"] == 8
