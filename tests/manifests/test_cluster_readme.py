"""The commands in cluster/README.md name what is there and do what they say."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rlgen.config.load import load_config
from tests.manifests.rendered import FOLDERS, ROOT, files, needs_kustomize, objects

pytestmark = [pytest.mark.manifests, needs_kustomize]

README = (ROOT / "cluster" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]


def test_every_folder_that_is_applied_is_one_that_is_tested() -> None:
    applied = {word for line in COMMANDS for word in re.findall(r"-k (\S+)", line)}
    assert {"cluster/namespace", "cluster/overlays/cpu", "jobs/kubernetes/digits"} <= applied
    assert applied <= set(FOLDERS)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / "cluster" / link).exists()] == []


def test_image_and_bucket_are_put_in_everywhere(tmp_path: Path) -> None:
    for folder in ("cluster", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    edits = [line for line in COMMANDS if line.startswith("sed ")]
    assert len(edits) == 2
    for edit in edits:
        subprocess.run(edit, shell=True, cwd=tmp_path, check=True)
    for folder in FOLDERS[1:]:
        text = yaml.safe_dump_all(objects(str(tmp_path / folder)))
        assert set(re.findall(r"image: (\S+)", text)) == {"registry.example.com/rlgen:0.1.0"}
        assert set(re.findall(r"s3://([^/]+)", text)) <= {"BUCKET"}


def test_names_of_objects_are_those_that_are_made() -> None:
    named = {name for line in COMMANDS for name in re.findall(r"(?:rayjob|job/)\s*(\S+)", line)}
    made = {m["metadata"]["name"] for folder in FOLDERS for m in objects(folder)}
    assert named and named <= made
    assert "service/rlgen-head-svc" in README and "rlgen" in made, "KubeRay adds -head-svc"


def test_what_is_submitted_loads(tmp_path: Path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(files("cluster/overlays/cpu", "rlgen-pool")["pool.yaml"])
    submitted = [shlex.split(line) for line in COMMANDS if line.startswith("ray job submit")]
    assert len(submitted) == 2
    for words in submitted:
        names = [words[i + 1] for i, word in enumerate(words) if word == "--config"]
        load_config([name.replace("/etc/rlgen/pool.yaml", str(pool)) for name in names])
