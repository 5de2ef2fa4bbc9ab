"""The doctor's look at what is installed: versions, what they ask of each other, and their makes.

Owns no list of version numbers: what rlgen wants stands in its own metadata, and what the packages
want of each other in theirs.
"""

import platform
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from rlgen.config.run import RunConfig
from rlgen.jobs.doctor_check import Finding

_NAME = "versions"
_PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
_ALSO = ("boto3", "aiobotocore", "mlflow-skinny", "hpsv2", "transformers")
"""Installed by the side, and known to want other versions than their neighbours have."""
_SHOWN = ("torch", "torchvision", "ray", "open_clip_torch", "mlflow", "protobuf")


def find_versions(config: RunConfig) -> list[Finding]:
    """Python, what rlgen wants, conflicts between packages, and what a server would lack."""
    return [check_python(), check_requirements(), check_conflicts(), check_make(), *_boto3(config)]


def check_python() -> Finding:
    """Whether rlgen runs on this Python."""
    wanted, _ = _wanted()
    found = platform.python_version()
    if wanted.contains(found, prereleases=True):
        return Finding("python", "ok", found)
    return Finding("python", "failure", f"{found}, not {wanted}", f"install Python {wanted}")


def check_requirements() -> Finding:
    """Whether everything that rlgen imports is there, in a version that it knows."""
    unmet = [
        f"{requirement.name} {_version(requirement.name) or 'missing'} ({requirement.specifier})"
        for requirement in _wanted()[1]
        if not _is_met(requirement)
    ]
    if unmet:
        return Finding(
            _NAME,
            "failure",
            f"not what rlgen wants: {', '.join(unmet)}",
            "pip install -c infra/constraints.txt . in the image of head and workers",
        )
    shown = [f"{name} {found}" for name in _SHOWN if (found := _version(name))]
    return Finding(_NAME, "ok", ", ".join(shown))


def check_conflicts() -> Finding:
    """Whether the packages have of each other what they ask for."""
    asking = {requirement.name: requirement.extras for requirement in _wanted()[1]}
    asking |= {name: set() for name in _ALSO}
    unmet = [
        f"{name} {_version(name)} wants {wanted.name}{wanted.specifier} and finds "
        f"{_version(wanted.name) or 'none'}"
        for name, extras in asking.items()
        for wanted in _asked_by(name, extras)
        if not _is_met(wanted)
    ]
    if not unmet:
        return Finding("conflicts", "ok", f"none between {len(asking)} packages")
    return Finding(
        "conflicts",
        "failure",
        "; ".join(unmet),
        "install both again in one command, with -c infra/constraints.txt",
    )


def check_make() -> Finding:
    """Whether torch and torchvision were built for the same device."""
    builds = {name: _build(name) for name in ("torch", "torchvision")}
    torch, torchvision = (Version(build).local or "" for build in builds.values())
    if torch == torchvision:
        return Finding("torch make", "ok", torch or "both of the default index")
    return Finding(
        "torch make",
        "failure" if torch and torchvision else "warning",
        f"torch {builds['torch']} and torchvision {builds['torchvision']} are built for different "
        "devices, so torchvision's operators may be missing",
        "install both from the same index",
    )


def _boto3(config: RunConfig) -> list[Finding]:
    """An MLflow server whose artifacts are on S3 needs boto3, which MLflow doesn't bring."""
    if not (config.tracking.uri or "").startswith("http"):
        return []
    found = _version("boto3")
    if found:
        return [Finding("boto3", "ok", found)]
    return [
        Finding(
            "boto3",
            "warning",
            "not installed: an MLflow server in this image could store no artifact on S3",
            "pip install boto3 where `mlflow server` runs",
        )
    ]


def _wanted() -> tuple[SpecifierSet, list[Requirement]]:
    """Python's version and the packages that rlgen wants, by its source or its installation."""
    if _PROJECT.is_file():
        project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
        python, words = project["requires-python"], project["dependencies"]
    else:
        own = metadata.distribution("rlgen")
        python, words = own.metadata["Requires-Python"], own.requires or []
    requirements = [Requirement(word) for word in words]
    return SpecifierSet(python), [r for r in requirements if _applies(r, set())]


def _asked_by(name: str, extras: set[str]) -> Iterator[Requirement]:
    try:
        words = metadata.distribution(name).requires or []
    except metadata.PackageNotFoundError:
        return
    for word in words:
        requirement = Requirement(word)
        if _applies(requirement, extras):
            yield requirement


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras})


def _is_met(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.distribution(name).version
    except metadata.PackageNotFoundError:
        return None


def _build(name: str) -> str:
    """The version with what it was built for, which metadata may leave out."""
    try:
        text = Path(str(metadata.distribution(name).locate_file(f"{name}/version.py"))).read_text()
    except (metadata.PackageNotFoundError, OSError):
        return _version(name) or "0"
    told = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return told[1] if told else _version(name) or "0"
