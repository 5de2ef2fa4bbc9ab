"""Every configuration that ships loads, and what the README shows is what the code says."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from rlgen.config.load import load_config
from rlgen.config.plan import describe_plan
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError

pytestmark = pytest.mark.manifests

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run_configs() -> list[Path]:
    """YAML files in jobs/ that configure a run; the others are Kubernetes objects."""
    files = sorted((ROOT / "jobs").glob("*.yaml"))
    return [f for f in files if "kind" not in next(yaml.safe_load_all(f.read_text()))]


def readme_commands() -> list[list[str]]:
    """The words after `python -m rlgen.jobs.grpo` of every such command in the README."""
    joined = README.replace("\\\n", " ")
    found = re.findall(r"python -m rlgen\.jobs\.grpo([^`\n]*)", joined)
    return [shlex.split(words, comments=True) for words in found]


@pytest.mark.parametrize("path", run_configs(), ids=lambda path: path.name)
def test_config_loads(path: Path) -> None:
    load_config(str(path))


def test_digits_yaml_is_the_default() -> None:
    shipped = load_config(str(ROOT / "jobs" / "digits.yaml")).flattened()
    default = RunConfig().flattened()
    assert {k: (v, default[k]) for k, v in shipped.items() if v != default[k]} == {}


def test_misspelt_key_does_not_load(tmp_path: Path) -> None:
    text = (ROOT / "jobs" / "digits.yaml").read_text()
    misspelt = tmp_path / "digits.yaml"
    misspelt.write_text(text.replace("group_size", "groupsize"))
    with pytest.raises(ConfigError, match=r"rollout\.groupsize; did you mean group_size"):
        load_config(str(misspelt))


def test_readme_settings_load() -> None:
    commands = readme_commands()
    assert len(commands) >= 5
    for words in commands:
        load_config(None, [word for word in words if re.match(r"[a-z_.]+=", word)])


def test_readme_files_exist() -> None:
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    configs = [word for words in readme_commands() for word in words if word.endswith(".yaml")]
    named = [path for path in linked + configs if not path.startswith("runs/")]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_readme_shows_the_plan() -> None:
    shown = re.search(r"<!-- plan -->\n```\n(.*?)\n```", README, flags=re.DOTALL)
    assert shown is not None, "README.md has no block after <!-- plan -->"
    assert shown[1] == describe_plan(RunConfig()), "run --dry-run and copy its output"
