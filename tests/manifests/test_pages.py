"""Every page of documentation: links lead somewhere, commands and settings are what there is."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rlgen.config.load import load_config
from rlgen.config.reward import SCORER_TYPES
from rlgen.config.run import RunConfig

pytestmark = pytest.mark.manifests

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("rlgen", "jobs", "cluster", "infra")
PAGES = sorted(
    page
    for pattern in ("*.md", ".github/**/*.md", *(f"{f}/**/*.md" for f in FOLDERS))
    for page in ROOT.glob(pattern)
)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
each_page_of_today = pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # which names what is gone
    ids=lambda page: str(page.relative_to(ROOT)),
)


def commands_in(page: Path, start: str) -> list[list[str]]:
    """The words after the start of every such command, in blocks and in lines."""
    joined = page.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(rf"{re.escape(start)}([^`\n|]*)", joined)
    return [shlex.split(words, comments=True) for words in found]


def anchors_of(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, hyphens for spaces, no other signs."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def fields_below(section: Any, path: str) -> Iterator[str]:
    """Dotted keys of a section and of all sections in it."""
    if isinstance(section, type) and issubclass(section, BaseModel):
        for name, field in section.model_fields.items():
            yield f"{path}{name}"
            yield from fields_below(field.annotation, f"{path}{name}.")
    for part in get_args(section):
        yield from fields_below(part, path)


FIELDS = set(fields_below(RunConfig, ""))
SCORER_FIELDS = {name for scorer in SCORER_TYPES.values() for name in scorer.model_fields}
SECTIONS = {key.partition(".")[0] for key in FIELDS if "." in key}


def is_setting(key: str) -> bool:
    scorer = re.fullmatch(r"reward\.scorers\.[A-Za-z]\w*(?:\.(\w+).*)?", key)
    if scorer is not None:
        return scorer[1] is None or scorer[1] in SCORER_FIELDS
    return key in FIELDS or key.startswith("policy.architecture.")


def test_all_pages_are_found() -> None:
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md", "rlgen/README.md"} <= names
    assert {"jobs/README.md", "jobs/TUNING.md", "cluster/README.md", "infra/README.md"} <= names


def test_every_configuration_and_every_job_is_on_the_page_of_jobs() -> None:
    text = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)", text))
    there = {file.name for file in (ROOT / "jobs").glob("*.yaml")}
    there |= {f"kubernetes/{job.parent.name}" for job in ROOT.glob("jobs/kubernetes/*/rayjob.yaml")}
    assert there - linked == set()


def test_every_folder_has_its_line_in_the_order_in_which_they_import() -> None:
    text = (ROOT / "rlgen" / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| \[(\w+)/\]\(\1\) \|", text, flags=re.MULTILINE)
    assert sorted(told) == sorted(f.parent.name for f in ROOT.glob("rlgen/*/__init__.py"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rank = {m.strip(): number for number, layer in enumerate(layers) for m in layer.split("|")}
    ranks = [rank[f"rlgen.{name}"] for name in told]
    assert ranks == sorted(ranks)


@each_page
def test_links_and_their_anchors_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    lost = []
    for path, anchor in links:
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or ROOT not in target.parents:
            lost.append(path)
        elif anchor and anchor not in anchors_of(target):
            lost.append(f"{path}#{anchor}")
    assert lost == []


@each_page
def test_commands_of_the_main_job_load(page: Path) -> None:
    for words in commands_in(page, "python -m rlgen.jobs.grpo"):
        named = [word for word in words if re.fullmatch(r"jobs/[\w.-]+\.yaml", word)]
        assert [path for path in named if not (ROOT / path).exists()] == []
        load_config([str(ROOT / p) for p in named], [w for w in words if re.match(r"[a-z_.]+=", w)])


@each_page
def test_modules_that_are_run_exist(page: Path) -> None:
    named = re.findall(r"python -m (rlgen[\w.]*\w)", page.read_text(encoding="utf-8"))
    assert [module for module in named if find_spec(module) is None] == []


@each_page_of_today
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"\b((?:tests|jobs|cluster|infra)/[\w./-]+\.(?:py|sh|yaml|json|txt))\b", text
    )
    real = [path for path in named if "NAME" not in path]
    assert [p for p in real if not ((ROOT / p).exists() or (ROOT / "rlgen" / p).exists())] == []


@each_page
def test_settings_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    spans = [span for code in re.findall(r"`([^`]+)`", text) for span in code.split()]
    keys = [re.match(r"([a-z_]+(?:\.\w+)+)(?==|$)", span) for span in spans]
    named = [key[1] for key in keys if key and key[1].partition(".")[0] in SECTIONS]
    files = r".*\.(safetensors|pt|json|yaml|py|md|txt|npz|jsonl)"
    assert [k for k in named if not is_setting(k) and not re.fullmatch(files, k)] == []
