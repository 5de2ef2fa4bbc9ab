"""The doctor before other versions than those that are installed."""

from importlib import metadata
from pathlib import Path

import pytest

from rlgen.config import RunConfig, load_config
from rlgen.jobs import doctor_versions


def config_of(*settings: str) -> RunConfig:
    return load_config(None, settings)


class Installed:
    """Another version of a package than the one that is installed."""

    def __init__(self, version: str, folder: Path, *, requires: tuple[str, ...] = ()) -> None:
        self.version, self.requires, self._folder = version, list(requires), folder

    def locate_file(self, path: str) -> Path:
        return self._folder / path


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Pretend that packages have these versions, or with None that they are missing."""

    def pretend(**versions: str | None) -> None:
        real = metadata.distribution

        def distribution(name: str):
            if name not in versions:
                return real(name)
            version = versions[name]
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return Installed(version, tmp_path)

        monkeypatch.setattr(doctor_versions.metadata, "distribution", distribution)

    return pretend


def test_what_is_installed_here_is_fine() -> None:
    found = doctor_versions.find_versions(config_of("tracking.uri=http://mlflow:5000"))
    assert [f.verdict for f in found if f.name in ("python", "versions")] == ["ok", "ok"]
    assert f"torch {metadata.version('torch')}" in found[1].found


def test_an_old_or_missing_package_fails(install) -> None:
    install(ray="2.10.0", s3fs=None)
    found = doctor_versions.check_requirements()
    assert found.verdict == "failure" and "constraints.txt" in found.remedy
    assert "ray 2.10.0 (>=2.60)" in found.found and "s3fs missing (>=2025.3)" in found.found


def test_a_package_that_another_can_not_use_fails(install) -> None:
    install(protobuf="2.6.1")
    found = doctor_versions.check_conflicts()
    assert found.verdict == "failure"
    assert "wants protobuf" in found.found and "finds 2.6.1" in found.found


def test_a_conflict_that_only_an_extra_brings_is_found(install) -> None:
    """Ray's dashboard needs more than Ray; rlgen asks for both."""
    install(**{"aiohttp-cors": None, "aiohttp_cors": None})
    assert "aiohttp" in doctor_versions.check_conflicts().found


@pytest.mark.parametrize(
    ("torch", "torchvision", "verdict"),
    [
        ("2.15.0+cu132", "0.30.0+cpu", "failure"),
        ("2.15.0", "0.30.0+cpu", "warning"),
        ("2.15.0+cpu", "0.30.0+cpu", "ok"),
    ],
)
def test_two_makes_do_not_go_together(
    install, tmp_path: Path, torch: str, torchvision: str, verdict: str
) -> None:
    """Metadata may leave out what a package was built for, and version.py says it."""
    install(torch="2.15.0", torchvision="0.30.0")
    for name, version in (("torch", torch), ("torchvision", torchvision)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "version.py").write_text(f"__version__ = '{version}'\n")
    found = doctor_versions.check_make()
    assert found.verdict == verdict
    assert verdict == "ok" or (torch in found.found and "same index" in found.remedy)


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    found = doctor_versions.check_python()
    assert found.verdict == "failure" and "3.9.1, not >=3.11" in found.found


def test_a_server_of_artifacts_on_s3_would_lack_boto3(install) -> None:
    install(boto3=None)
    found = doctor_versions.find_versions(config_of("tracking.uri=http://mlflow:5000"))[-1]
    assert (found.name, found.verdict) == ("boto3", "warning")
    assert doctor_versions.find_versions(config_of())[-1].name != "boto3"
