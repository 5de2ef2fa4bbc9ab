"""The `ray up` file against the schema that the installed Ray brings along, without a network."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

pytestmark = pytest.mark.manifests

ROOT = Path(__file__).resolve().parents[2]
Cluster = dict[str, Any]


@pytest.fixture
def cluster() -> Cluster:
    return yaml.safe_load((ROOT / "cluster" / "ray_up.yaml").read_text(encoding="utf-8"))


def test_fits_rays_schema(cluster: Cluster) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("section", [None, "auth"])
def test_misspelt_field_is_found(cluster: Cluster, section: str | None) -> None:
    broken = copy.deepcopy(cluster)
    fields = broken if section is None else broken[section]
    name = min(fields)
    fields[f"{name}x"] = fields[name]
    with pytest.raises(ValidationError, match=f"{name}x"):
        validate_config(prepare_config(broken))


def test_installs_the_pinned_versions(cluster: Cluster) -> None:
    assert any("-c infra/constraints.txt" in command for command in cluster["setup_commands"])
