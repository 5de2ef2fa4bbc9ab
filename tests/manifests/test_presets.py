"""The presets of published models: complete, true to the table of models, and planned at once."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlgen.config.base import REQUIRED
from rlgen.config.imagenet import imagenet_class_names
from rlgen.config.load import dump_yaml, load_config
from rlgen.config.model_plan import memory_estimates
from rlgen.config.model_sizes import policy_sizes
from rlgen.config.models import MODELS, architecture_of
from rlgen.config.plan import (
    check_local_files,
    check_required,
    describe_plan,
    named_files,
    required_files,
    uses_embedded,
)
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError

pytestmark = pytest.mark.manifests

JOBS = Path(__file__).resolve().parents[2] / "jobs"
POLICIES = [name for name, spec in MODELS.items() if not spec.is_tokenizer]
LARGE = ("xxl", "3b", "d30", "d36", "1.4b")


def preset(name: str, *overrides: str) -> RunConfig:
    return load_config(str(JOBS / f"{name}.yaml"), overrides)


@pytest.mark.parametrize("name", POLICIES)
def test_every_published_policy_has_a_preset_for_itself(name: str) -> None:
    config, spec = preset(name), MODELS[name]
    assert config.policy.model == name
    assert config.tokenizer.model == spec.tokenizer
    assert config.policy.checkpoint == config.tokenizer.checkpoint == REQUIRED
    text = (JOBS / f"{name}.yaml").read_text()
    assert f"--config jobs/{name}.yaml" in text
    for file in spec.files:
        assert Path(file).name in text, "the preset names the file that it wants"


@pytest.mark.parametrize("name", POLICIES)
def test_the_tokenizer_makes_images_of_the_policy_s_tokens(name: str) -> None:
    config, spec = preset(name), MODELS[name]
    assert config.tokenizer.model is not None
    sizes = policy_sizes(spec.family, architecture_of(name, config.policy.architecture))
    fields = architecture_of(config.tokenizer.model, config.tokenizer.architecture)
    if spec.family == "var":
        assert sizes.block_sizes == tuple(side**2 for side in fields["patch_nums"])
        assert spec.image_size == 16 * fields["patch_nums"][-1]
    else:
        size = fields.get("image_size") or fields["resolution"]
        assert size == spec.image_size and sizes.num_tokens == (size // 16) ** 2
    codes = [fields.get(key) for key in ("codebook_size", "n_embed", "vocab_size")]
    assert sizes.codebook_size in codes


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_of_the_digits_slips_into_a_preset(name: str) -> None:
    config = preset(name)
    assert not uses_embedded(config)
    assert named_files(config) == {}
    prompts = [scorer.prompt for scorer in config.reward.active_scorers.values()]
    assert prompts and not any("digit" in prompt for prompt in prompts)
    assert "zero" not in config.class_names
    assert config.rollout.cfg_scale == 1.0, "the policy has to be good without guidance"


@pytest.mark.parametrize("name", POLICIES)
def test_a_preset_fits_cards_of_80_gb(name: str) -> None:
    config = preset(name)
    roles = {estimate.role: estimate.total / 1e9 for estimate in memory_estimates(config)}
    if config.learner.num_gpus < 1:  # the roles share one card with the scorers
        assert sum(roles.values()) < 60
        assert config.rollout.num_gpus + config.reward.num_gpus + config.learner.num_gpus == 1
    assert max(roles.values()) < 70
    is_large = any(size in name.split("-") for size in LARGE)
    assert (config.learner.lora is not None) == is_large
    assert config.learner.gradient_checkpointing or not is_large


def test_guidance_is_left_out_where_there_is_no_null_class() -> None:
    config = preset("vqgan-1.4b-256")
    assert config.evaluation.cfg_scales == ()
    assert "also with guidance" not in describe_plan(config)


def test_the_dry_run_says_what_is_needed_and_takes_no_time() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "rlgen.jobs.grpo", "--dry-run"]
    start = time.monotonic()
    run = subprocess.run(
        [*command, "--config", str(JOBS / "llamagen-l-256.yaml")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert time.monotonic() - start < 2.0
    imported = {line.rsplit("|", 1)[-1].strip() for line in run.stderr.splitlines()}
    assert not imported & {"torch", "open_clip", "ray", "numpy"}
    for wanted in (
        "12 conditions x 12 images = 144 images a step",
        "policy llamagen-l-256: 342,910,976 parameters, all trained",
        "tokenizer llamagen-vq-ds16: 71,883,403 parameters",
        "256 tokens of 16,384 codes an image, 36,864 tokens a step",
        "policy.checkpoint: to be given: weights of llamagen-l-256, published as c2i_L_256.pt",
        "evaluation.judge: to be given",
    ):
        assert wanted in run.stdout
    for role in ("rollout", "reward", "learner"):
        assert any(f"  {role} " in line and "GiB:" in line for line in run.stdout.splitlines())


def test_a_run_needs_every_path_and_is_told_of_all_at_once() -> None:
    config = preset("llamagen-b-256")
    check_local_files(config)
    with pytest.raises(ConfigError) as caught:
        check_required(config)
    wanted = required_files(config)
    assert len(wanted) == 8 and "leaves 8 paths to you" in str(caught.value)
    for key, meaning in wanted.items():
        assert f"{key}=" in str(caught.value) and meaning in str(caught.value)
    given = preset("llamagen-b-256", *(f"{key}=s3://bucket/file" for key in wanted))
    check_required(given)
    assert set(named_files(given)) == set(wanted)
    one_left = preset("llamagen-b-256", *(f"{key}=/x" for key in list(wanted)[1:]))
    with pytest.raises(ConfigError, match=r"(?s)leaves 1 path to you.*policy\.checkpoint="):
        check_required(one_left)


def test_a_text_preset_wants_captions() -> None:
    assert required_files(preset("llamagen-t2i-xl-256"))["policy.captions"] == "encoded captions"


def test_imagenet_stands_for_its_thousand_names(tmp_path: Path) -> None:
    names = imagenet_class_names()
    assert len(names) == 1000
    assert (names[0], names[1], names[207], names[999]) == (
        "tench",
        "goldfish",
        "Golden Retriever",
        "toilet paper",
    )
    config = load_config(None, ["class_names=imagenet", "evaluation.grid_images_per_class=1"])
    assert config.class_names == names
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    assert load_config(str(path)) == config


def test_a_missing_open_clip_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="open_clip is not installed"):
        imagenet_class_names()


def test_an_open_clip_without_the_list_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Found:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / "zero_shot_metadata.py").write_text("IMAGENET_CLASSNAMES = ['tench']\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Found)
    with pytest.raises(ConfigError, match="has no such list"):
        imagenet_class_names()
